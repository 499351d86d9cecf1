"""Perplexity and LongPPL on any text: which tokens to score, and the scores.

LongPPL (Fang et al. 2024, arXiv 2410.23771) is the perplexity of the tokens that need the long context: those that the
model finds much likelier with the whole context than with only the last part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from squeezed.errors import InputError
from squeezed.evaluation import data
from squeezed.evaluation.suites.base import CountTokens, drawn

LONG_SHORT_DIFFERENCE = 2.0  # the paper's alpha: log p with the long context less log p with the short one
LONG_LIKELIHOOD = -2.0  # the paper's beta: log p with the long context
_PIECE = re.compile(r"\s*\S+")  # a word and the space before it, as tokenizers have it


@dataclass(frozen=True)
class TextPair:
    """A text cut in two: the fixed context, and what follows it and is scored.

    Attributes:
        id: the file it begins in and a number.
        continuation: begins where the context ends; the two joined are the text as it is in the file.
    """

    id: str
    context: str
    continuation: str


def text_pairs(
    path: Path, length: int, continuation: int, count: int, seed: int, count_tokens: CountTokens
) -> list[TextPair]:
    """Up to `count` windows of a file or folder, drawn from the seed, in the order of the text; none overlap.

    Args:
        path: a text file, or a folder with some.
        length: most tokens of a context.
        continuation: most tokens of what follows it.

    Raises:
        InputError: no text, or none as long as one window.
    """
    found = [
        TextPair(f"{file.stem if file == path else file.relative_to(path)}-{number}", *pair)
        for file in data.text_files(path)
        for number, pair in enumerate(_cut(data.read_text(file), length, continuation, count_tokens))
    ]
    if not found:
        raise InputError(
            f"{path} has no text of {length + continuation} tokens; expected one at least that long, or ask for less"
        )
    return [found[i] for i in drawn(count, len(found), seed)]


def key_tokens(
    long_logprobs: Tensor,
    short_logprobs: Tensor,
    difference: float = LONG_SHORT_DIFFERENCE,
    likelihood: float = LONG_LIKELIHOOD,
) -> Tensor:
    """Which tokens need the long context (LongPPL, section 3).

    Args:
        long_logprobs, short_logprobs: [tokens] natural log of each token's probability, given the whole context before
            it and given only the last part of that.

    Returns:
        [tokens] bool: long - short > `difference` and long > `likelihood`.
    """
    return (long_logprobs - short_logprobs > difference) & (long_logprobs > likelihood)


def _cut(text: str, length: int, continuation: int, count_tokens: CountTokens) -> Iterator[tuple[str, str]]:
    """Contexts and continuations, one after the other; cuts are between words."""
    pieces = _PIECE.findall(text)
    sizes = _sizes(pieces, count_tokens)
    at = 0
    while at < len(pieces):
        middle = _take(pieces, sizes, at, length - 1, count_tokens)  # the first word without its space may cost one
        end = _take(pieces, sizes, middle, continuation, count_tokens)
        if end == len(pieces) and sizes[end] - sizes[middle] < 0.9 * continuation:
            return
        yield "".join(pieces[at:middle]).lstrip(), "".join(pieces[middle:end])
        at = end


def _sizes(pieces: list[str], count_tokens: CountTokens) -> NDArray[np.float64]:
    """[pieces + 1] about how many tokens come before each piece: counted in blocks, shared out by characters."""
    block = 256
    sizes = [0.0]
    for begin in range(0, len(pieces), block):
        part = pieces[begin : begin + block]
        each = count_tokens("".join(part)) / sum(map(len, part))
        sizes += [each * len(piece) for piece in part]
    return np.cumsum(sizes)


def _take(pieces: list[str], sizes: NDArray[np.float64], begin: int, most: int, count_tokens: CountTokens) -> int:
    """The last piece that still fits `most` tokens from `begin` on; at least one is taken."""
    end = int(np.searchsorted(sizes, sizes[begin] + most, side="right")) - 1
    end = max(begin + 1, min(end, len(pieces)))
    while end > begin + 1 and (over := count_tokens("".join(pieces[begin:end])) - most) > 0:
        end = max(begin + 1, end - max(1, over // 2))
    return min(end, len(pieces))
