"""RULER's needles in a haystack: single, multi-key, multi-value, multi-query."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from squeezed.evaluation import data
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import words
from squeezed.evaluation.suites.base import Fitted, SuiteOptions

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent; RULER's 40 places
_MAKE = {"words": words.adjective_noun, "numbers": words.seven_digits, "uuids": words.random_uuid}
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]*[A-Z])")


@dataclass(frozen=True)
class Needle:
    """The parameters of one needle task, as RULER's `synthetic.yaml` names them.

    Attributes:
        haystack: `noise` (one line over and over), `essay`, or `needle` (other needles).
        keys, values: `words`, `numbers` or `uuids`.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


def needle_samples(task: str, options: SuiteOptions, needle: Needle) -> Iterator[Sample]:
    fitted = Fitted(task, options, smallest=20 if needle.haystack == "essay" else 8)
    for index in range(options.count):
        yield _sample(options.id(task, index), task, options, needle, fitted, index)


def _sample(id: str, task: str, options: SuiteOptions, needle: Needle, fitted: Fitted, index: int) -> Sample:
    name = f"{options.seed}/{task}/{index}"
    rng = random.Random(name)
    keys = [_MAKE[needle.keys](rng) for _ in range(needle.num_keys)]
    values = [[_MAKE[needle.values](rng) for _ in range(needle.num_values)] for _ in keys]
    needles = [_needle(needle.values, key, value) for key, own in zip(keys, values, strict=True) for value in own]
    rng.shuffle(needles)
    asked = rng.sample(range(len(keys)), needle.num_queries)
    answers = tuple(value for i in asked for value in values[i])
    one = len(answers) == 1
    kind = needle.values[:-1] if one else needle.values

    def make(size: int) -> str:
        text = _haystack(needle, size, needles, random.Random(name + "/haystack"), options.data)
        if one:
            return (
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {kind} afterwards.\n{text}"
            )
        return (
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{text}"
        )

    context = fitted.build(make)
    names = [keys[i] for i in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    verb, every = ("is", "") if one else ("are", "all ")
    return Sample(
        id=id,
        task=task,
        context=context,
        question=f"What {verb} {every}the special magic {kind} for {query} mentioned in the provided text?",
        answers=answers,
        metric="string_match_all",
        max_new_tokens=128,
        answer_prefix=f"The special magic {kind} for {query} mentioned in the provided text {verb}",
        depth=context.index(answers[0]) / len(context) if one else None,
    )


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _haystack(needle: Needle, size: int, needles: list[str], rng: random.Random, folder: Path | None) -> str:
    if needle.haystack == "essay":
        return _in_essay(size, needles, rng, data.folder(folder, "RULER's PaulGrahamEssays.json"))
    if needle.haystack == "noise":
        lines = [NOISE] * size
    else:
        make_key, make_value = _MAKE[needle.keys], _MAKE[needle.values]
        others = random.Random(rng.random())  # so that places do not depend on how many others there are
        lines = [_needle(needle.values, make_key(others), make_value(others)) for _ in range(size)]
    places = sorted((rng.random() for _ in needles), reverse=True)
    for place, line in zip(places, needles, strict=True):
        lines.insert(int(place * size), line)
    return "\n".join(lines)


def _in_essay(size: int, needles: list[str], rng: random.Random, folder: Path) -> str:
    """`size` words of the essays, needles between sentences at RULER's depths."""
    sentences = _SENTENCE_END.split(" ".join(essay_words(folder, size)))
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    places = [int(len(sentences) * depth / 100) for depth in depths]
    for place, line in sorted(zip(places, needles, strict=True), key=lambda pair: -pair[0]):
        sentences.insert(place, line)
    return " ".join(sentences)


def essay_words(folder: Path, size: int) -> list[str]:
    """The first `size` words of the essays, over again from the beginning where they do not suffice."""
    essays = _essays(folder)
    return (essays * -(-size // len(essays)))[:size]


@lru_cache(maxsize=2)
def _essays(folder: Path) -> list[str]:
    return data.read_essays(folder / data.ESSAYS).split()
