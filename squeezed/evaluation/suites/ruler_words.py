"""RULER's aggregation tasks: the most common words of a list, the most frequent words of a coded text."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import words
from squeezed.evaluation.suites.base import Fitted, SuiteOptions

_COMMON = 10  # words to find
_LONG = 3_584  # RULER changes parameters at prompts of 4,096 tokens; a context this long is part of such a prompt
_CODED_LETTERS = 6
_ZETA_2 = math.pi**2 / 6  # the zeta distribution with RULER's alpha of 2

_CWE_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"


def common_word_samples(task: str, options: SuiteOptions) -> Iterator[Sample]:
    """`cwe`: 10 words occur 30 times, all others 3 times; in prompts below 4,096 tokens 6 times and once."""
    fitted = Fitted(task, options, smallest=_COMMON + 1)
    for index in range(options.count):
        name = f"{options.seed}/{task}/{index}"
        rng = random.Random(name)
        long = options.length >= _LONG
        example_size, example_repeats, repeats = (40, (10, 3), (30, 3)) if long else (20, (3, 1), (6, 1))
        example_words = rng.sample(words.all_words(), example_size)
        listed = _numbered(_repeated(example_words, example_repeats, rng))
        found = _numbered(example_words[:_COMMON])
        example = f"{_CWE_INTRO}{listed}\n{_CWE_QUESTION} {_CWE_PREFIX} {found}\n"
        order = rng.sample(words.all_words(), len(words.all_words()))

        def make(
            size: int,
            example: str = example,
            order: list[str] = order,
            repeats: tuple[int, int] = repeats,
            name: str = name,
        ) -> str:
            shuffling = random.Random(name + "/list")
            if size > len(order):
                _extend(order, size, name)
            return example + _CWE_INTRO + _numbered(_repeated(order[:size], repeats, shuffling))

        yield Sample(
            id=options.id(task, index),
            task=task,
            context=fitted.build(make),
            question=_CWE_QUESTION,
            answers=tuple(order[:_COMMON]),
            metric="string_match_all",
            max_new_tokens=120,
            answer_prefix=_CWE_PREFIX,
        )


def frequent_word_samples(task: str, options: SuiteOptions) -> Iterator[Sample]:
    """`fwe`: coded words whose counts fall as rank ** -2; the first rank is dots, ranks 2 to 4 are asked for."""
    fitted = Fitted(task, options, smallest=100)
    for index in range(options.count):
        rng = random.Random(f"{options.seed}/{task}/{index}")
        coded = _coded_words(rng, max(4, options.length // 50))

        def make(size: int, coded: list[str] = coded, order: int = rng.getrandbits(64)) -> str:
            text = [word for rank, word in enumerate(coded, 1) for _ in range(int(size / (_ZETA_2 * rank * rank)))]
            random.Random(order).shuffle(text)
            return (
                "Read the following coded text and track the frequency of each coded word. "
                f"Find the three most frequently appeared coded words. {' '.join(text)}"
            )

        yield Sample(
            id=options.id(task, index),
            task=task,
            context=fitted.build(make),
            question=(
                "Question: Do not provide any explanation. Please ignore the dots '....'. "
                "What are the three most frequently appeared words in the above coded text?"
            ),
            answers=tuple(coded[1:4]),
            metric="string_match_all",
            max_new_tokens=50,
            answer_prefix=("Answer: According to the coded text above, the three most frequently appeared words are:"),
        )


def _repeated(chosen: Sequence[str], repeats: tuple[int, int], rng: random.Random) -> list[str]:
    repeated = [*chosen[:_COMMON]] * repeats[0] + [*chosen[_COMMON:]] * repeats[1]
    rng.shuffle(repeated)
    return repeated


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def _extend(order: list[str], size: int, name: str) -> None:
    """Pairs of words where the lists are too short, from about 150K tokens on."""
    rng, seen = random.Random(f"{name}/pairs/{len(order)}"), set(order)
    while len(order) < size:
        pair = words.adjective_noun(rng)
        if pair not in seen:
            seen.add(pair)
            order.append(pair)


def _coded_words(rng: random.Random, count: int) -> list[str]:
    found = ["..."]
    seen = set(found)
    while len(found) < count:
        word = "".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))
        if word not in seen:
            seen.add(word)
            found.append(word)
    return found
