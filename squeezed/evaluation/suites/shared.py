"""Many requests on one shared context, in the manner of SCBench (Li et al. 2024, arXiv 2412.10319).

Three tasks that need exact retrieval from text that can't be compressed: values of keys in a JSON object, strings by
their beginning and end, variables that were assigned a value over several hops. Texts and wording are ours.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import words
from squeezed.evaluation.suites.base import Fitted, Suite, SuiteOptions
from squeezed.evaluation.suites.ruler_niah import NOISE
from squeezed.evaluation.suites.ruler_tracking import Chain

QUESTIONS = 10  # on each context
_LETTERS = 24  # of a string to find
_ENDS = 5  # letters given of its beginning and its end


@dataclass(frozen=True)
class _Question:
    text: str
    answers: tuple[str, ...]
    answer_prefix: str
    max_new_tokens: int


_T = TypeVar("_T")
_Maker = tuple[Callable[[int], str], list[_Question]]  # size -> context, and what is asked of it


def _samples(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    for task in tasks:
        make, smallest = _TASKS[task]
        fitted = Fitted(task, options, smallest)
        for index in range(options.count):
            number, place = divmod(index, QUESTIONS)
            if place == 0:
                build, questions = make(random.Random(f"{options.seed}/{task}/{number}"))
                context = fitted.build(build)
            asked = questions[place]
            one = asked.answers[0] if len(asked.answers) == 1 else None
            yield Sample(
                id=options.id(task, number, place),
                task=task,
                context=context,
                question=asked.text,
                answers=asked.answers,
                metric="string_match_all",
                max_new_tokens=asked.max_new_tokens,
                answer_prefix=asked.answer_prefix,
                depth=context.index(one) / len(context) if one else None,
            )


def _key_values(rng: random.Random) -> _Maker:
    asked = {words.random_uuid(rng): words.random_uuid(rng) for _ in range(QUESTIONS)}
    filling = rng.getrandbits(64)

    def make(size: int) -> str:
        other = random.Random(filling)
        pairs = {words.random_uuid(other): words.random_uuid(other) for _ in range(size - QUESTIONS)}
        listed = json.dumps(dict(_spread(list(pairs.items()), list(asked.items()), filling)), indent=0)
        return f"The JSON object below has a value for every key. Learn them, you will be asked for some.\n\n{listed}"

    questions = [
        _Question(f'What is the value of the key "{key}"?', (value,), f'The value of the key "{key}" is', 64)
        for key, value in asked.items()
    ]
    return make, questions


def _ends(rng: random.Random) -> _Maker:
    """Every asked string has one neighbour with the same beginning and one with the same end."""
    asked: list[str] = []
    similar: list[str] = []
    while len(asked) < QUESTIONS:
        text = _letters(rng, _LETTERS)
        asked.append(text)
        similar.append(text[:_ENDS] + _letters(rng, _LETTERS - _ENDS))
        similar.append(_letters(rng, _LETTERS - _ENDS) + text[-_ENDS:])
    filling = rng.getrandbits(64)

    def make(size: int) -> str:
        other = random.Random(filling)
        strings = [_letters(other, _LETTERS) for _ in range(size - 3 * QUESTIONS)]
        listed = "\n".join(_spread(strings, asked + similar, filling))
        return f"Below is a list of strings. You will be asked for some by their first and last letters.\n\n{listed}"

    questions = [
        _Question(
            f'Which string of the list begins with "{text[:_ENDS]}" and ends with "{text[-_ENDS:]}"?',
            (text,),
            "The string is",
            48,
        )
        for text in asked
    ]
    return make, questions


def _tracking(rng: random.Random) -> _Maker:
    """One chain of 4 hops for every question; the chains are interleaved."""
    chains: list[Chain] = []
    while len(chains) < QUESTIONS:
        chain = Chain.draw(rng, letters=5)
        if not any(chain.value == other.value or set(chain.names) & set(other.names) for other in chains):
            chains.append(chain)
    order = rng.getrandbits(64)

    def make(size: int) -> str:
        placing = random.Random(order)
        lines: list[tuple[float, str]] = []
        for chain in chains:
            lines += zip(sorted(placing.random() for _ in chain.names), chain.lines(), strict=True)
        lines += [((i + 0.5) / size, NOISE) for i in range(size)]
        listed = "\n".join(line for _, line in sorted(lines, key=lambda line: line[0]))
        return f"The text below hides chains of variable assignments. Track them, you will be asked.\n\n{listed}"

    questions = [
        _Question(
            f"Which variables have the value {chain.value}, directly or by way of other variables?",
            chain.names,
            f"These {len(chain.names)} variables have the value {chain.value}:",
            50,
        )
        for chain in chains
    ]
    return make, questions


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))


def _spread(filling: list[_T], asked: list[_T], seed: int) -> list[_T]:
    """`asked` put at random places in `filling`, the same shares of it whatever its length."""
    rng = random.Random(seed)
    places = [(rng.random(), item) for item in asked]
    places += [((i + 0.5) / max(1, len(filling)), item) for i, item in enumerate(filling)]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


_TASKS: dict[str, tuple[Callable[[random.Random], _Maker], int]] = {
    "kv": (_key_values, QUESTIONS),
    "prefix_suffix": (_ends, 3 * QUESTIONS),
    "tracking": (_tracking, 1),
}

SHARED = Suite("shared", tuple(_TASKS), "nothing", _samples, f"retrieval, {QUESTIONS} questions on each context")
