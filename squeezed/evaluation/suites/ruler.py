"""RULER: 13 synthetic tasks of any length (Hsieh et al. 2024, arXiv 2404.06654).

Parameters and prompts are the published ones (github.com/NVIDIA/RULER, scripts/synthetic.yaml and
scripts/data/synthetic/constants.py). Everything up to the end of the haystack is the fixed context, the question is the
user input. What differs from the original scripts is listed in docs/evaluation-suites.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Suite, SuiteOptions
from squeezed.evaluation.suites.ruler_niah import Needle, needle_samples

NEEDS = "RULER's PaulGrahamEssays.json, squad.json and hotpotqa.json"

_TASKS: dict[str, Callable[[str, SuiteOptions], Iterator[Sample]]] = {
    name: partial(needle_samples, needle=needle)
    for name, needle in {
        "niah_single_1": Needle(haystack="noise"),
        "niah_single_2": Needle(haystack="essay"),
        "niah_single_3": Needle(haystack="essay", values="uuids"),
        "niah_multikey_1": Needle(haystack="essay", num_keys=4),
        "niah_multikey_2": Needle(haystack="needle"),
        "niah_multikey_3": Needle(haystack="needle", keys="uuids", values="uuids"),
        "niah_multivalue": Needle(haystack="essay", num_values=4),
        "niah_multiquery": Needle(haystack="essay", num_keys=4, num_queries=4),
    }.items()
}


def _samples(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    for task in tasks:
        yield from _TASKS[task](task, options)


RULER = Suite("ruler", tuple(_TASKS), NEEDS, _samples, "13 synthetic tasks of any length")
