"""Cutting texts into windows of a given length, at the ends of paragraphs where that leaves them nearly full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from squeezed.evaluation import data
from squeezed.evaluation.suites.base import CountTokens

_PARAGRAPH = re.compile(r"\S.*?(?:\n[ \t]*\n\s*|\Z)", re.DOTALL)
_LEAST = 0.9  # of the length asked for; a shorter rest is left out, unless it is all there is


def windows(path: Path, length: int, count_tokens: CountTokens) -> Iterator[tuple[str, str]]:
    """All windows of a folder's texts, one after the other, short texts joined.

    Args:
        path: folder of text files, or one file.
        length: most tokens of a window.

    Yields:
        A name, made of the file that the window begins in and a number, and the text.
    """
    held: list[str] = []
    tokens = number = 0
    name = ""
    for file in data.text_files(path):
        for piece in _pieces(data.read_text(file) + "\n\n", (1 - _LEAST) * length, count_tokens):
            size = count_tokens(piece)
            if held and tokens + size > length:
                text, rest = _fitting(held, length, count_tokens)
                yield f"{name}-{number}", text
                number += 1
                held, name = rest, file.stem
                tokens = sum(map(count_tokens, rest))
            name = name or file.stem
            held.append(piece)
            tokens += size
    text, _ = _fitting(held, length, count_tokens)
    if not number or count_tokens(text) >= _LEAST * length:
        yield f"{name}-{number}", text


def _fitting(pieces: list[str], length: int, count_tokens: CountTokens) -> tuple[str, list[str]]:
    """The text of the first pieces that fit together, and the others; the first alone always fits."""
    kept = len(pieces)
    while kept > 1 and count_tokens("".join(pieces[:kept]).strip()) > length:
        kept -= 1
    return "".join(pieces[:kept]).strip(), pieces[kept:]


def _pieces(text: str, most: float, count_tokens: CountTokens) -> Iterator[str]:
    """Paragraphs, and parts of those that take more than `most` tokens; joined they are the text."""
    for paragraph in _PARAGRAPH.findall(text):
        yield from _halved(paragraph, most, count_tokens)


def _halved(text: str, most: float, count_tokens: CountTokens) -> Iterator[str]:
    """The text, or halves of it where it is too long, cut at a line, a sentence or a space near the middle."""
    if len(text) <= most or len(text) < 2 or count_tokens(text) <= most:
        yield text
        return
    middle = len(text) // 2
    cut = next((found + len(at) for at in ("\n", ". ", " ") if (found := text.rfind(at, 0, middle)) > 0), middle)
    yield from _halved(text[:cut], most, count_tokens)
    yield from _halved(text[cut:], most, count_tokens)
