"""Words, numbers and identifiers to make needles of."""

from __future__ import annotations

import random
import uuid
from functools import cache

from squeezed.errors import InputError

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    f"{ten}-{one}" if unit else ten: 20 + 10 * place + unit
    for place, ten in enumerate(_TENS)
    for unit, one in enumerate(_UNITS[:10])
}


@cache
def nouns() -> tuple[str, ...]:
    return _wonderwords("noun")


@cache
def adjectives() -> tuple[str, ...]:
    return _wonderwords("adjective")


@cache
def verbs() -> tuple[str, ...]:
    return _wonderwords("verb")


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each once, sorted."""
    return tuple(sorted({*nouns(), *adjectives(), *verbs()}))


def adjective_noun(rng: random.Random) -> str:
    """For example `quiet-harbor`."""
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def seven_digits(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _wonderwords(category: str) -> tuple[str, ...]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise InputError(
            "the package wonderwords, whose word lists RULER uses, is not installed; "
            "run: pip install 'squeezed-attention[evaluation]'"
        ) from error
    return tuple(sorted(set(RandomWord().filter(include_categories=[category]))))
