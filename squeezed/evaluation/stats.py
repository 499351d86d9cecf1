"""Confidence intervals by bootstrap over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval that holds 95% of the means of resampled data."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self, scale: float = 1.0, digits: int = 3) -> dict[str, float]:
        return {
            "mean": round(self.mean * scale, digits),
            "low": round(self.low * scale, digits),
            "high": round(self.high * scale, digits),
            "n": self.n,
        }


def bootstrap(strata: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Mean of the strata's means (tasks count alike however many samples they have), resampled within each stratum."""
    arrays = [np.asarray(values, dtype=np.float64) for values in strata if len(values)]
    if not arrays:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    generator = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for values in arrays:
        means += values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    means /= len(arrays)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean([values.mean() for values in arrays]))
    return Estimate(mean, float(low), float(high), sum(map(len, arrays)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = highest
    return corrected.tolist()
