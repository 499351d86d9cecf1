"""Cutting texts into windows of a given length, at the ends of paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from squeezed.evaluation import data
from squeezed.evaluation.suites.base import CountTokens

_BREAK = re.compile(r"\n[ \t]*\n\s*")
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
        for paragraph in _paragraphs(data.read_text(file), length, count_tokens):
            size = count_tokens(paragraph + "\n\n")
            if held and tokens + size > length:
                text, rest = _fitting(held, length, count_tokens)
                yield f"{name}-{number}", text
                number += 1
                held, name = rest, file.stem
                tokens = sum(count_tokens(kept + "\n\n") for kept in rest)
            name = name or file.stem
            held.append(paragraph)
            tokens += size
    text, _ = _fitting(held, length, count_tokens)
    if not number or count_tokens(text) >= _LEAST * length:
        yield f"{name}-{number}", text


def _fitting(paragraphs: list[str], length: int, count_tokens: CountTokens) -> tuple[str, list[str]]:
    """The text of the first paragraphs that fit together, and the others; the first alone always fits."""
    kept = len(paragraphs)
    while kept > 1 and count_tokens("\n\n".join(paragraphs[:kept])) > length:
        kept -= 1
    return "\n\n".join(paragraphs[:kept]), paragraphs[kept:]


def _paragraphs(text: str, length: int, count_tokens: CountTokens) -> Iterator[str]:
    for paragraph in _BREAK.split(text):
        yield from _halved(paragraph.rstrip(), length, count_tokens)


def _halved(text: str, length: int, count_tokens: CountTokens) -> Iterator[str]:
    """The text, or its parts where it is longer than a window, cut at a line, a sentence or a space near the middle."""
    if not text.strip():
        return
    if len(text) <= length or count_tokens(text) <= length or len(text) < 2:
        yield text
        return
    middle = len(text) // 2
    cut = next((found + len(at) for at in ("\n", ". ", " ") if (found := text.rfind(at, 0, middle)) > 0), middle)
    yield from _halved(text[:cut].rstrip(), length, count_tokens)
    yield from _halved(text[cut:], length, count_tokens)
