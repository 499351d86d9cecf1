"""One model on one device under given settings: the numbers that the pictures, the page and the JSON file share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from squeezed.analysis.asymptotics import table
from squeezed.analysis.cost import Operation, Precision, Step, decode, dense_operations, prefill, total
from squeezed.analysis.devices import Device
from squeezed.analysis.roofline import (
    Launch,
    crossover,
    floor_seconds,
    from_ridge,
    largest_context,
    regime,
    token_seconds,
    total_seconds,
)
from squeezed.analysis.shape import ModelShape
from squeezed.analysis.sparse import Squeeze, hierarchical, kv_budget, one_level, squeezed_operations

METHODS = ("dense", "squeezed", "hierarchical")


@dataclass(frozen=True)
class Study:
    """What is analysed: `batch` sequences, each a fixed context of `length` tokens and `queries` of user input."""

    model: ModelShape
    device: Device
    precision: Precision
    batch: int = 1
    length: int = 131072
    queries: int = 1024
    tokens: int = 128  # generated
    sparsity: float = 0.9
    launch: Launch = "graph"

    @property
    def settings(self) -> dict[str, Squeeze | None]:
        """How each method squeezes, None for dense."""
        return {"dense": None, "squeezed": one_level(self.sparsity), "hierarchical": hierarchical(self.sparsity)}

    @property
    def phases(self) -> dict[str, Step]:
        """The three passes: the fixed context once, the user input after it, and one generated token."""
        return {
            "prefill": prefill(self.batch, self.length),
            "user input": Step(self.batch, self.queries, self.length),
            "generation": decode(self.batch, self.length),
        }

    def operations(self, step: Step, method: str) -> list[Operation]:
        """Operations of one pass under a method."""
        squeeze = self.settings[method]
        if squeeze is None:
            return dense_operations(self.model, step, self.precision)
        return squeezed_operations(self.model, step, self.precision, squeeze)

    def token_seconds(self, context: int, method: str, batch: int | None = None) -> float:
        """Predicted seconds of one generated token."""
        return token_seconds(
            *(self.model, self.device, self.precision, batch or self.batch, context),
            self.settings[method],
            self.launch,
        )

    def crossover(self, method: str, batch: int | None = None, speedup: float = 1.0) -> int | None:
        """Context at which a method makes a generated token `speedup` times as fast as dense."""
        squeeze = self.settings[method]
        assert squeeze is not None
        return crossover(
            *(self.model, self.device, self.precision, batch or self.batch, squeeze, self.launch), speedup=speedup
        )

    def largest_context(self, method: str, batch: int | None = None) -> int | None:
        """Longest context that fits in memory, centroids included; None if memory sets no limit."""
        return largest_context(self.model, self.device, self.precision, batch or self.batch, self.settings[method])


def attention_seconds(study: Study, step: Step, method: str) -> float:
    """Predicted seconds of attention alone in one pass."""
    operations = [op for op in study.operations(step, method) if op.kind == "attention"]
    return total_seconds(operations, study.device, study.launch)


def by_name(operations: Iterable[Operation]) -> dict[str, list[Operation]]:
    """Operations grouped by name, in order of first appearance."""
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(operation.name, []).append(operation)
    return groups


def summary(study: Study) -> dict[str, Any]:
    """All results as plain data. Times in seconds, sizes in bytes and tokens, intensities in FLOP per byte."""
    device, model = study.device, study.model
    peaks = [{**asdict(peak), "ridge": peak.ridge} for peak in device.peaks]
    return {
        "model": {**asdict(model), "depth": model.depth},
        "device": {**asdict(device), "ridge": device.ridge, "peaks": peaks},
        "settings": {
            "batch": study.batch,
            "length": study.length,
            "queries": study.queries,
            "tokens": study.tokens,
            "sparsity": study.sparsity,
            "launch": study.launch,
            "precision": asdict(study.precision),
            "kv_budget": {name: kv_budget(squeeze) for name, squeeze in study.settings.items() if squeeze},
        },
        "asymptotics": [asdict(row) for row in table(model)],
        "operations": [row for phase, step in study.phases.items() for row in _operation_rows(study, phase, step)],
        "generation": _generation(study),
        "limits": {
            "largest_context": {method: study.largest_context(method) for method in METHODS},
            "squeezing_pays_from": {method: study.crossover(method) for method in METHODS[1:]},
        },
    }


def _operation_rows(study: Study, phase: str, step: Step) -> list[dict[str, Any]]:
    rows = []
    # Prefill of the fixed context is dense by definition: the clusters are made from it.
    for method in METHODS[:1] if phase == "prefill" else METHODS:
        operations = study.operations(step, method)
        groups = (
            by_name(operations) if method == "dense" else by_name(op for op in operations if op.kind == "attention")
        )
        linear = [op for op in operations if op.kind == "linear"]
        attention = [op for op in operations if op.kind == "attention"]
        sums = {"all linear layers": linear, "all attention": attention, "whole": operations}
        if method != "dense":
            sums.pop("all linear layers")
        for name, group in [*groups.items(), *sums.items()]:
            cost = total(group)
            rows.append(
                {
                    "phase": phase,
                    "method": method,
                    "operation": name,
                    "flops": cost.flops,
                    "bytes": cost.bytes,
                    "intensity": cost.intensity,
                    "regime": regime(cost, study.device),
                    "times_ridge": from_ridge(cost, study.device),
                    "seconds": total_seconds(group, study.device, study.launch),
                    "floor_seconds": sum(floor_seconds(op, study.device) for op in group),
                }
            )
    return rows


def _generation(study: Study) -> list[dict[str, Any]]:
    """The k generated tokens one by one: the own part of the cache grows, the fixed context stays squeezed."""
    rows = []
    for method in METHODS:
        seconds = flops = moved = 0.0
        for own in range(study.tokens):
            step = Step(study.batch, 1, study.length + study.queries + own, fixed=study.length)
            operations = study.operations(step, method)
            cost = total(operations)
            flops, moved = flops + cost.flops, moved + cost.bytes
            seconds += total_seconds(operations, study.device, study.launch)
        rows.append({"method": method, "tokens": study.tokens, "seconds": seconds, "flops": flops, "bytes": moved})
    return rows


def human(number: float, unit: str = "", digits: int = 3) -> str:
    """A number with a decimal prefix: human(3.02e12, 'B/s') is '3.02 TB/s'."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g} {unit}".strip()
    number = float(f"{number:.{digits}g}")  # round first, so that 999.7 becomes 1 k and not 1e+03
    power = min(5, max(-3, math.floor(math.log10(abs(number)) / 3 + 1e-12)))
    prefix = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}[power]
    return f"{number / 1000**power:.{digits}g} {prefix}{unit}".strip()


def tokens_text(count: int | None, absent: str = "never") -> str:
    """Token counts in binary thousands, as context lengths are quoted: 131072 is '128K'."""
    if count is None:
        return absent
    if count < 1024:
        return str(count)
    kilo = count / 1024
    return f"{kilo:.3g}K" if kilo < 1000 else f"{kilo / 1024:.3g}M"
