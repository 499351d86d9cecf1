"""Which differences between two runs, or between methods of one run, are larger than chance.

Answers to the same sample are compared with one another, so that hard samples don't blur the difference. The p value is
that of a sign-flip permutation test of the mean difference; the interval is a paired bootstrap; p values are corrected
for the number of comparisons by Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squeezed.errors import InputError
from squeezed.evaluation.settings import Record, RunFolder
from squeezed.evaluation.stats import RESAMPLES, holm

_PERMUTATIONS = 20_000
_LEVEL = 0.05
# What is compared in runs without answers; lower is better.
_TEXT_VALUES = {"fidelity": "kl", "perplexity": "nll", "longppl": "key_nll"}


@dataclass(frozen=True)
class Difference:
    """Second minus first, over the samples that both have.

    Attributes:
        group: length, and the task or `all tasks`.
        first, second: what is compared, and its mean (times 100 for scores).
        low, high: 95% interval of the difference.
        samples: pairs.
        differing: pairs with different values.
        p, p_holm: of the difference being 0; after correction.
        verdict: `better`, `worse` (the second, of scores; for divergences lower is better) or `within chance`.
        value: which value of the records is compared: `score`, or one of a run without answers.
    """

    group: str
    first: str
    second: str
    first_mean: float
    second_mean: float
    difference: float
    low: float
    high: float
    samples: int
    differing: int
    p: float
    p_holm: float
    verdict: str
    value: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Values = dict[tuple[str, str], dict[str, float]]  # (group, row) -> sample id -> value


def compare_runs(first: Path, second: Path, against: str | None = None, by_task: bool = False) -> list[Difference]:
    """Compare every method and budget of one run with the same of the other, or all with one row.

    Args:
        against: a row such as `full` or `quest@0.2`: every row of `second` is held against this one of `first`.
        by_task: each task by itself as well.

    Raises:
        InputError: a folder without a run, runs of different suites or samples, nothing in common.
    """
    left, right = RunFolder(first), RunFolder(second)
    configs = left.config(), right.config()
    suites = configs[0].suite, configs[1].suite
    if suites[0] != suites[1]:
        raise InputError(f"the runs are of different suites, {suites[0]} and {suites[1]}; give two of the same")
    if configs[0].seed != configs[1].seed:
        raise InputError(
            f"the runs' samples were drawn with seeds {configs[0].seed} and {configs[1].seed}; give two of the same"
        )
    records = [list(run.records()) for run in (left, right)]
    _check_samples(*records)
    values = [_values(found, suites[0], by_task) for found in records]
    if first.resolve() == second.resolve() and against is None:
        against = "full"
    for run, own in zip((left, right), values, strict=True):
        if not own:
            raise InputError(f"the run in {run.path} has no answers yet; go on with squeeze eval first")
    pairs = _pairs(values[0], values[1], against)
    if not pairs:
        rows = sorted({row for _, row in values[0]})
        shared = {row for _, row in values[1]}.intersection(rows)
        raise InputError(
            f"the runs have no answers to compare: no {'sample' if shared else 'row of the same method and budget'} "
            "is in both"
            if against is None
            else f"the first run has no row {against!r}; it has {', '.join(rows)}"
            if against not in rows
            else f"the second run has no other row with the samples of {against!r}; run squeeze eval with more methods"
        )
    value = _TEXT_VALUES.get(suites[0], "score")
    found = [_differ(group, names, a, b, value) for group, names, a, b in pairs]
    corrected = holm([difference.p for difference in found])
    return [_judge(one, p) for one, p in zip(found, corrected, strict=True)]


def _check_samples(left: list[Record], right: list[Record]) -> None:
    """Refuse runs in which a name means different samples: of other data, or for another tokenizer."""
    texts = {record["id"]: (record.get("context_tokens"), record.get("depth")) for record in left}
    for record in right:
        found = texts.get(record["id"])
        if found is not None and found != (record.get("context_tokens"), record.get("depth")):
            raise InputError(
                f"the runs' samples differ: {record['id']} has a context of {found[0]} tokens in one and of "
                f"{record.get('context_tokens')} in the other, or looks elsewhere in it; give two of the same data "
                "and tokenizer"
            )


def _values(records: list[Record], suite: str, by_task: bool) -> Values:
    values: Values = {}
    name = _TEXT_VALUES.get(suite, "score")
    for record in records:
        value = record[name]
        groups = [f"{record['length']}, all tasks"]
        if by_task and suite not in _TEXT_VALUES:
            groups.append(f"{record['length']}, {record['task']}")
        for group in groups:
            values.setdefault((group, record["row"]), {})[record["id"]] = value
    return values


def _pairs(
    left: Values, right: Values, against: str | None
) -> list[tuple[str, tuple[str, str], list[float], list[float]]]:
    pairs = []
    for (group, row), values in right.items():
        other = row if against is None else against
        if (group, other) not in left or (against is not None and row == against):
            continue
        before = left[group, other]
        common = [identity for identity in values if identity in before]
        if common:
            names = (other, row)
            pairs.append((group, names, [before[i] for i in common], [values[i] for i in common]))
    return pairs


def _differ(
    group: str, names: tuple[str, str], first: Sequence[float], second: Sequence[float], value: str
) -> Difference:
    from scipy.stats import permutation_test

    scale = 100.0 if value == "score" else 1.0
    a, b = np.asarray(first) * scale, np.asarray(second) * scale
    delta = b - a
    differing = int((delta != 0).sum())
    p = 1.0
    if differing > 1:  # a single pair differs one way or the other, whatever the methods
        # Pairs that agree add nothing whatever their sign; leaving them out makes the test exact where it can be.
        kept = delta[delta != 0]
        p = float(
            permutation_test(
                (kept,),
                lambda sample, axis: np.sum(sample, axis=axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=_PERMUTATIONS,
                rng=np.random.default_rng(0),
            ).pvalue
        )
    picks = np.random.default_rng(0).integers(0, len(delta), (RESAMPLES, len(delta)))
    low, high = np.percentile(delta[picks].mean(1), [2.5, 97.5])
    return Difference(
        group,
        *names,
        float(a.mean()),
        float(b.mean()),
        float(delta.mean()),
        float(low),
        float(high),
        len(delta),
        differing,
        p,
        p,
        "",
        value,
    )


def _judge(difference: Difference, p: float) -> Difference:
    verdict, lower_is_better = "within chance", difference.value != "score"
    if p < _LEVEL:
        verdict = "better" if (difference.difference > 0) != lower_is_better else "worse"
    return Difference(**{**asdict(difference), "p_holm": p, "verdict": verdict})
