"""RULER's variable tracking: one chain of assignments, hidden line by line in noise, after one worked example."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Fitted, SuiteOptions
from squeezed.evaluation.suites.ruler_niah import NOISE

_HOPS = 4
_EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Chain:
    """Variables that all have one value: the first is assigned it, each other is assigned the one before."""

    value: str
    names: tuple[str, ...]

    @classmethod
    def draw(cls, rng: random.Random, letters: int, hops: int = _HOPS) -> Chain:
        names: list[str] = []
        while len(names) <= hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in (*names, "VAR"):
                names.append(name)
        return cls(str(rng.randrange(10_000, 99_999)), tuple(names))

    def lines(self) -> list[str]:
        first = f"VAR {self.names[0]} = {self.value}"
        pairs = zip(self.names[1:], self.names, strict=False)
        return [first, *(f"VAR {later} = VAR {earlier}" for later, earlier in pairs)]

    def text(self, noise: int, rng: random.Random) -> str:
        """The task's introduction and `noise` lines of noise with the chain's lines among them, in order."""
        lines = [NOISE] * noise
        places = sorted(rng.random() for _ in self.names)
        for shift, (place, line) in enumerate(zip(places, self.lines(), strict=True)):
            lines.insert(int(place * noise) + shift, line)
        intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        return intro + "\n".join(lines)

    @property
    def question(self) -> str:
        return f"Question: Find all variables that are assigned the value {self.value} in the text above."

    @property
    def answer_prefix(self) -> str:
        return (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(self.names)} variables are assigned the value {self.value}, they are:"
        )


def tracking_samples(task: str, options: SuiteOptions) -> Iterator[Sample]:
    """`vt`: one chain of 4 hops."""
    fitted = Fitted(task, options, smallest=5)
    example_fitted = Fitted(f"{task}'s example", replace(options, length=_EXAMPLE_TOKENS), smallest=5)
    for index in range(options.count):
        rng = random.Random(f"{options.seed}/{task}/{index}")
        shown, asked = Chain.draw(rng, letters=3), Chain.draw(rng, letters=5)
        order = rng.getrandbits(64)

        def worked(noise: int, shown: Chain = shown, order: int = order) -> str:
            text = shown.text(noise, random.Random(order))
            return f"{text}\n{shown.question} {shown.answer_prefix} {' '.join(shown.names)}\n\n"

        example = example_fitted.build(worked)

        def make(noise: int, example: str = example, asked: Chain = asked, order: int = order) -> str:
            return example + asked.text(noise, random.Random(order + 1))

        yield Sample(
            id=options.id(task, index),
            task=task,
            context=fitted.build(make),
            question=asked.question,
            answers=asked.names,
            metric="string_match_all",
            max_new_tokens=30,
            answer_prefix=asked.answer_prefix,
        )
