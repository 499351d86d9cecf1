"""Metrics: a prediction and its sample -> 0 to 1. Published figures are these times 100."""

from __future__ import annotations

import re
from collections.abc import Callable

from squeezed.evaluation.sample import Sample

Metric = Callable[[str, Sample], float]

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, sample: Sample) -> float:
    """Share of the answers that occur in the prediction, whatever the case (RULER, all but its QA)."""
    text = _plain(prediction)
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def string_match_part(prediction: str, sample: Sample) -> float:
    """1 if any of the answers occurs in the prediction, whatever the case (RULER's QA)."""
    text = _plain(prediction)
    return float(any(answer.lower() in text for answer in sample.answers))


def _plain(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}
