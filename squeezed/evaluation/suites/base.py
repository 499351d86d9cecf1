"""What a suite is, what it is asked for, and how a context is made as long as asked."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from squeezed.errors import InputError
from squeezed.evaluation.sample import Sample

_T = TypeVar("_T")
CountTokens = Callable[[str], int]
TruncateMiddle = Callable[[str, int], str]
_FULL = 0.98  # of the length asked for; growing a context further is not worth the tokenizer's time


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked of a suite.

    Attributes:
        length: most tokens that a fixed context may take. The caller has already subtracted the model's template, the
            room for the question and the room for the answer.
        count: samples per task. Suites whose contexts are shared spread them over several contexts.
        seed: same seed, same samples; a sample depends on seed, task and its index only, not on `count`.
        count_tokens: tokens of a text, no special tokens.
        truncate_middle: (text, tokens) -> the text with its middle cut out so that it takes at most `tokens`.
        tasks: None is all of the suite's.
        data: folder of the suite's texts, see `Suite.needs`.
        question_room: tokens that the caller has subtracted for a question. A longer one, which only LongBench has,
            makes its context shorter.
    """

    length: int
    count: int
    seed: int
    count_tokens: CountTokens
    truncate_middle: TruncateMiddle
    tasks: tuple[str, ...] | None = None
    data: Path | None = None
    question_room: int = 160

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"a context of {self.length} tokens was asked for: expected at least 1")
        if self.count < 1:
            raise InputError(f"{self.count} samples were asked for: expected at least 1")

    def id(self, task: str, *parts: str | int) -> str:
        """A sample's id: the same in every run with this length, another with any other length."""
        return "/".join(map(str, (task, self.length, *parts)))


@dataclass(frozen=True)
class Suite:
    """A benchmark: samples by task.

    Attributes:
        tasks: all its tasks, in the order in which they are reported.
        needs: what the folder `SuiteOptions.data` must hold, for a user to read.
        make: yields the samples of the given tasks.
        description: one line for a list of suites.
        extra: tasks that are run only when named.
    """

    name: str
    tasks: tuple[str, ...]
    needs: str
    make: Callable[[tuple[str, ...], SuiteOptions], Iterator[Sample]]
    description: str = ""
    extra: tuple[str, ...] = ()

    def samples(self, options: SuiteOptions) -> Iterator[Sample]:
        """The samples asked for; those that share a context come one after another.

        Raises:
            InputError: an unknown task, data that is missing or not as expected, a length too short for a task.
        """
        known = (*self.tasks, *self.extra)
        unknown = [task for task in options.tasks or () if task not in known]
        if unknown:
            raise InputError(f"{self.name} has no task {', '.join(unknown)}; choose among {', '.join(known)}")
        return self.make(options.tasks or self.tasks, options)


def drawn(count: int, of: int, seed: int | str) -> list[int]:
    """`count` of that many, or all if there are no more, in order: those of a smaller count are among a greater's."""
    rng, found = random.Random(seed), set[int]()
    while len(found) < min(count, of):
        found.add(rng.randrange(of))
    return sorted(found)


def in_turn(streams: Sequence[Iterator[_T]]) -> Iterator[_T]:
    """One of each stream after another, until all have ended: a run that is stopped has seen all of them alike."""
    waiting = deque(streams)
    while waiting:
        stream = waiting.popleft()
        for item in stream:
            yield item
            waiting.append(stream)
            break


def token_functions(tokenizer: PreTrainedTokenizerBase) -> tuple[CountTokens, TruncateMiddle]:
    """`count_tokens` and `truncate_middle` of a tokenizer."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def truncate_middle(text: str, tokens: int) -> str:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        kept = min(tokens, len(spans))
        while len(spans) > tokens and kept > 0:
            last = spans[-(kept // 2)][0] if kept > 1 else len(text)
            cut = text[: spans[(kept + 1) // 2 - 1][1]] + text[last:]
            over = count_tokens(cut) - tokens  # the two ends may be tokenised otherwise where they meet
            if over <= 0:
                return cut
            kept -= over
        return text if len(spans) <= tokens else ""

    return count_tokens, truncate_middle


@dataclass
class Fitted:
    """Makes every context of a task nearly as long as asked, with few calls of the tokenizer.

    Attributes:
        smallest: least size that makes sense for the task.
    """

    task: str
    options: SuiteOptions
    smallest: int = 1
    _size: int = 0  # that fitted last time

    def build(self, make: Callable[[int], str]) -> str:
        """The context `make(size)` of nearly the largest size that fits `options.length`.

        Args:
            make: size -> text, growing with the size.

        Raises:
            InputError: not even the smallest size fits.
        """
        length = self.options.length
        size = max(self._size, self.smallest)
        fits, over = self.smallest - 1, None
        best = ""
        while over is None or over - fits > 1:
            text = make(size)
            tokens = self.options.count_tokens(text)
            if tokens <= length:
                fits, best = size, text
                if tokens >= _FULL * length:
                    break
            elif size <= self.smallest:
                raise InputError(
                    f"{self.task} takes at least {tokens} tokens of fixed context, and the length asked for leaves "
                    f"{length} beside template, question and answer; ask for a greater length"
                )
            else:
                over = size
            size = int(size * (1 + _FULL) / 2 * length / tokens)
            size = max(fits + 1, size if over is None else min(size, over - 1))
        self._size = fits
        return best
