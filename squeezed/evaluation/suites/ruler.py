"""RULER: 13 synthetic tasks of any length (Hsieh et al. 2024, arXiv 2404.06654).

Parameters and prompts are the published ones (github.com/NVIDIA/RULER, scripts/synthetic.yaml and
scripts/data/synthetic/constants.py). Everything up to the end of the haystack is the fixed context, the question is the
user input. What differs from the original scripts is listed in docs/evaluation-suites.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Suite, SuiteOptions, in_turn
from squeezed.evaluation.suites.ruler_niah import Needle, needle_samples
from squeezed.evaluation.suites.ruler_qa import qa_samples
from squeezed.evaluation.suites.ruler_tracking import tracking_samples
from squeezed.evaluation.suites.ruler_words import common_word_samples, frequent_word_samples

NEEDS = "RULER's PaulGrahamEssays.json, squad.json and hotpotqa.json"

_Task = Callable[[str, SuiteOptions], Iterator[Sample]]
_NEEDLES: dict[str, _Task] = {
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
_TASKS: dict[str, _Task] = {
    **_NEEDLES,
    "vt": tracking_samples,
    "cwe": common_word_samples,
    "fwe": frequent_word_samples,
    "qa_1": partial(qa_samples, file="squad.json"),
    "qa_2": partial(qa_samples, file="hotpotqa.json"),
}


def _samples(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    return in_turn([_TASKS[task](task, options) for task in tasks])


RULER = Suite("ruler", tuple(_TASKS), NEEDS, _samples, "13 synthetic tasks of any length")
