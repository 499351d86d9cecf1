"""Reading prose for facts: sections and sentences of plain text or Markdown, without its marks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from squeezed.evaluation.metrics import plain_words

_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")
_UNDERLINE = re.compile(r"(=|-|~|\^){3,}\s*$")
_NUMBERED = re.compile(r"(?:(?:chapter|section|part|appendix)\s+)?((?:\d+\.)*\d+)[.:)]?\s+(?=\S)", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
_NOTE = re.compile(r"^(?:Notes?\s?)?(?:\[\d+\]\s*)+")
_FENCE = re.compile(r"\s*(```|~~~)")
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]*)[^)]*\)")
_EMPHASIS = re.compile(r"(\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=[\w.,!?])[*_](?!\w))")
_CLOSING = "\"'\u201d\u2019)\\]"
_OPENING = "\"'\u201c\u2018(\\["
_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][{_CLOSING}]))\s+(?=[{_OPENING}]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|St|Prof|Sr|Jr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|cf|No|Fig|Eq|Sec|Ch|pp?|approx|vol|ed|trans)|\b[A-Z])\.$"
)


@dataclass(frozen=True)
class Heading:
    """A section's title, its number if it has one, and where it stands in the text (characters)."""

    title: str
    number: str
    level: int
    start: int


@dataclass(frozen=True)
class Sentence:
    """One sentence in one line; `start` is about where it stands in the text, `section` its heading or -1."""

    text: str
    start: int
    section: int


@dataclass(frozen=True)
class Prose:
    """A text with its headings, sentences and links (text and target)."""

    text: str
    headings: tuple[Heading, ...]
    sentences: tuple[Sentence, ...]
    links: tuple[tuple[str, str, int], ...]

    @cached_property
    def plain(self) -> str:
        """All words in lower case, with a space before and after each."""
        return f" {' '.join(plain_words(_unmarked(self.text)))} "

    def occurrences(self, phrase: str) -> int:
        """How often the words of `phrase` stand together in the text."""
        words = " ".join(plain_words(phrase))
        return self.plain.count(f" {words} ") if words else 0


def read_prose(text: str) -> Prose:
    """Split a text into headings and sentences; code blocks, tables and HTML are passed over."""
    headings: list[Heading] = []
    sentences: list[Sentence] = []
    block: list[str] = []
    begin = at = 0
    fenced = False

    def close() -> None:
        if block:
            joined = _unmarked(" ".join(line.strip() for line in block))
            sentences.extend(_sentences(joined, begin, len(headings) - 1))
            block.clear()

    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        heading = _HEADING.match(stripped)
        if _FENCE.match(line):
            close()
            fenced = not fenced
        elif fenced or stripped.startswith(("|", "<")):
            close()
        elif heading:
            close()
            headings.append(_heading(heading.group(2), len(heading.group(1)), at))
        elif len(block) == 1 and _UNDERLINE.match(stripped) and len(stripped) >= len(block[0].strip()) - 2:
            headings.append(_heading(block.pop().strip(), 1 if stripped[0] == "=" else 2, begin))
        elif not stripped:
            close()
        else:
            item = _ITEM.match(line)
            if item:
                close()
            if not block:
                begin = at
            block.append(line[item.end() :] if item else line.lstrip("> "))
        at += len(line)
    close()
    links = tuple((" ".join(found.group(1).split()), found.group(2), found.start()) for found in _LINK.finditer(text))
    return Prose(text, tuple(headings), tuple(sentences), links)


def split_sentences(text: str) -> list[tuple[str, int]]:
    """The sentences of one line of text, each with its place."""
    found: list[tuple[str, int]] = []
    begin = 0
    for end in _END.finditer(text):
        if not _ABBREVIATION.search(text[begin : end.start()]):
            found.append((text[begin : end.start()], begin))
            begin = end.end()
    if text[begin:].strip():
        found.append((text[begin:].strip(), begin))
    return found


def _sentences(text: str, start: int, section: int) -> list[Sentence]:
    found = [(_NOTE.sub("", sentence), place) for sentence, place in split_sentences(text)]
    return [Sentence(sentence, start + place, section) for sentence, place in found if sentence]


def _heading(text: str, level: int, start: int) -> Heading:
    title = _unmarked(text)
    number = _NUMBERED.match(title)
    if number:
        return Heading(title[number.end() :], number.group(1), level, start)
    return Heading(title, "", level, start)


def _unmarked(text: str) -> str:
    return " ".join(_EMPHASIS.sub("", _LINK.sub(r"\1", text)).split())
