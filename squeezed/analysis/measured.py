"""Lay the times of `squeeze bench --json` over the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from squeezed.analysis.cost import Operation, Precision, Step, decode, dense_attention, dense_operations
from squeezed.analysis.devices import Device
from squeezed.analysis.roofline import Launch, floor_seconds, total_seconds
from squeezed.analysis.shape import Layer, ModelShape
from squeezed.analysis.sparse import squeezed_attention, squeezed_operations, with_budget
from squeezed.analysis.study import tokens_text
from squeezed.errors import InputError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=2)]


class Milliseconds(BaseModel):
    """One timed implementation."""

    ms: Annotated[float, Field(gt=0)]
    name: str = ""


class Rate(BaseModel):
    """One timed generation."""

    tokens_per_second: Annotated[float, Field(gt=0)]


class AttentionRow(BaseModel):
    """A row of `squeeze bench attention --json`."""

    context: Positive
    q_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    queries: Positive
    sparsity: Share
    levels: Positive
    dtype: Literal["float32", "float16", "bfloat16"]
    dense: Milliseconds
    squeezed: Milliseconds
    kv_budget: Share


class GenerateRow(BaseModel):
    """A row of `squeeze bench generate --json`."""

    context: Positive
    dense: Rate
    squeezed: Rate
    kv_budget: Share
    levels: Positive = 1


class AttentionRun(BaseModel):
    """A file written by `squeeze bench attention --json`."""

    device: str
    rows: Annotated[list[AttentionRow], Field(min_length=1)]


class GenerateRun(BaseModel):
    """A file written by `squeeze bench generate --json`."""

    device: str = "an unnamed device"
    rows: Annotated[list[GenerateRow], Field(min_length=1)]


Run = AttentionRun | GenerateRun


@dataclass(frozen=True)
class Timing:
    """Seconds measured, predicted, and the hardware floor (datasheet peaks, the KV budget actually read)."""

    measured: float
    predicted: float
    floor: float

    @property
    def share(self) -> float:
        """Share of the floor reached: 1 is as fast as the hardware allows."""
        return self.floor / self.measured


@dataclass(frozen=True)
class Comparison:
    """One row of a run beside its prediction."""

    label: str
    dense: Timing
    squeezed: Timing


def read_run(path: Path) -> Run:
    """Read and check a file of `squeeze bench --json`; what is missing or wrong is named, all of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file written by squeeze bench --json") from error
    kind: type[AttentionRun] | type[GenerateRun] = GenerateRun if '"tokens_per_second"' in text else AttentionRun
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{_where(fault['loc'])}: {fault['msg'].lower()}" for fault in error.errors()[:12])
        raise InputError(f"{path}: not a run of squeeze bench --json: {faults}") from error


def compare(run: Run, model: ModelShape, device: Device, precision: Precision, launch: Launch) -> list[Comparison]:
    """Every row of a run beside what the model predicts for it."""
    if isinstance(run, GenerateRun):
        return [_generation(row, model, device, precision, launch) for row in run.rows]
    return [_attention(row, device, launch) for row in run.rows]


def _attention(row: AttentionRow, device: Device, launch: Launch) -> Comparison:
    layer = Layer(1, row.q_heads, row.kv_heads, row.head_dim, None, ())
    step = Step(1, row.queries, row.context)
    width = _BYTES[row.dtype]
    precision = Precision(width, width, width)
    squeezed = squeezed_attention(layer, step, precision, with_budget(row.kv_budget, row.levels))
    label = f"{tokens_text(row.context)}\n{row.q_heads}/{row.kv_heads} heads\n{row.queries} quer" + (
        "y" if row.queries == 1 else "ies"
    )
    return Comparison(
        label,
        _timing(row.dense.ms / 1e3, [dense_attention(layer, step, precision)], device, launch),
        _timing(row.squeezed.ms / 1e3, squeezed, device, launch),
    )


def _generation(
    row: GenerateRow, model: ModelShape, device: Device, precision: Precision, launch: Launch
) -> Comparison:
    step = decode(1, row.context)
    squeezed = squeezed_operations(model, step, precision, with_budget(row.kv_budget, row.levels))
    return Comparison(
        f"{tokens_text(row.context)}\n1 token",
        _timing(1 / row.dense.tokens_per_second, dense_operations(model, step, precision), device, launch),
        _timing(1 / row.squeezed.tokens_per_second, squeezed, device, launch),
    )


def _timing(measured: float, operations: Sequence[Operation], device: Device, launch: Launch) -> Timing:
    floor = sum(floor_seconds(operation, device) for operation in operations)
    return Timing(measured, total_seconds(operations, device, launch), floor)


def _where(location: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "the file"
