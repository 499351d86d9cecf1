"""One token through a model's linear maps on the GPU, at the speed at which their weights can be read.

Norms go into the product that follows, activation and residual sum into the one before: a decoder layer takes four
launches besides attention. The first weights are asked for before the launch waits for its input.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev

_ENOUGH_PROGRAMS = 1200


@dataclass(frozen=True)
class Tiling:
    """Rows of the weights a program takes, columns it reads at a time, and its warps."""

    rows: int = 4
    columns: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class Norm:
    """An RMS norm: its weights [columns] and its eps."""

    weight: Tensor
    eps: float


@triton.jit
def _project(
    x,
    weight_a,
    weight_b,
    weight_c,
    bias_a,
    bias_b,
    bias_c,
    gamma,
    residual,
    output,
    eps,
    columns,
    rows_a,
    rows_b,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight = weight_a
    begin = 0
    if weight_b is not None:
        if first >= rows_a + rows_b:
            weight = weight_c
            begin = rows_a + rows_b
        elif first >= rows_a:
            weight = weight_b
            begin = rows_a
    base = weight + tl.minimum(row - begin, rows - 1 - begin).to(tl.int64)[:, None] * columns + k[None, :]
    w = tl.load(base, mask=(k < columns)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = k < columns - start
        value = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if gamma is not None:
            square += value * value
            value *= tl.load(gamma + start + k, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(base + start + BLOCK_K, mask=(k < columns - start - BLOCK_K)[None, :], other=0.0)
        acc += w.to(tl.float32) * value[None, :]
        w = following
    y = tl.sum(acc, axis=1)
    if gamma is not None:
        y *= 1.0 / tl.sqrt(tl.sum(square, axis=0) / columns + eps)
    mask = row < rows
    if bias_a is not None:
        bias = bias_a
        if weight_b is not None:
            if first >= rows_a + rows_b:
                bias = bias_c
            elif first >= rows_a:
                bias = bias_b
        y += tl.load(bias + row - begin, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row, y.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _gated(
    x,
    gate,
    up,
    gamma,
    output,
    eps,
    columns,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    place = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * columns + k[None, :]
    w_gate = tl.load(gate + place, mask=(k < columns)[None, :], other=0.0)
    w_up = tl.load(up + place, mask=(k < columns)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc_gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = k < columns - start
        value = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        square += value * value
        value *= tl.load(gamma + start + k, mask=inside, other=0.0).to(tl.float32)
        more = (k < columns - start - BLOCK_K)[None, :]
        next_gate = tl.load(gate + place + start + BLOCK_K, mask=more, other=0.0)
        next_up = tl.load(up + place + start + BLOCK_K, mask=more, other=0.0)
        acc_gate += w_gate.to(tl.float32) * value[None, :]
        acc_up += w_up.to(tl.float32) * value[None, :]
        w_gate = next_gate
        w_up = next_up
    inverse = 1.0 / tl.sqrt(tl.sum(square, axis=0) / columns + eps)
    g = tl.sum(acc_gate, axis=1) * inverse
    u = tl.sum(acc_up, axis=1) * inverse
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(output + row, y.to(output.dtype.element_ty), mask=row < rows)


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Linear maps of one vector, one after another in the result: [sum of rows].

    Args:
        x: [columns].
        weights: one or three of [rows, columns], contiguous.
        biases: [rows] of each.
        norm: to be applied to x first.
        residual: [sum of rows], to be added.
    """
    sizes = [weight.shape[0] for weight in weights]
    tiling = tiling or _tiling(x, sum(sizes), 1)
    block = tiling.rows
    while any(size % block for size in sizes[:-1]):
        block //= 2
    output = x.new_empty(sum(sizes))
    three = len(weights) == 3
    _project[(triton.cdiv(sum(sizes), block),)](
        x,
        *(weights if three else (weights[0], None, None)),
        *((biases if three else (biases[0], None, None)) if biases else (None, None, None)),
        None if norm is None else norm.weight,
        residual,
        output,
        0.0 if norm is None else norm.eps,
        x.shape[0],
        sizes[0],
        sizes[1] if three else 0,
        sum(sizes),
        BLOCK_N=block,
        BLOCK_K=tiling.columns,
        num_warps=tiling.warps,
        **dev.launch_options(x.device),
    )
    return output


def gated(x: Tensor, gate: Tensor, up: Tensor, norm: Norm, tiling: Tiling | None = None) -> Tensor:
    """silu(gate y) * (up y) of the normalised y, [rows]; x [columns], gate and up [rows, columns] contiguous."""
    rows, columns = gate.shape
    tiling = tiling or _tiling(x, rows, 2)
    output = x.new_empty(rows)
    _gated[(triton.cdiv(rows, tiling.rows),)](
        x,
        gate,
        up,
        norm.weight,
        output,
        norm.eps,
        columns,
        rows,
        BLOCK_N=tiling.rows,
        BLOCK_K=tiling.columns,
        num_warps=tiling.warps,
        **dev.launch_options(x.device),
    )
    return output


def _tiling(x: Tensor, rows: int, matrices: int) -> Tiling:
    """Near the fastest measured for every shape (docs/results/kernel-notes.md), with few columns read in vain."""
    if dev.INTERPRETED:
        return Tiling(64, 512)
    count = x.shape[0]
    wide = matrices > 1 or rows >= 2**16
    fitting = [size for size in (2048, 1024, 512, 256, 128) if -(-count // size) * size <= 1.15 * count]
    columns = max((size for size in fitting if size <= (2048 if wide else 512)), default=128)
    # Four rows share what is read of x, if that leaves enough programs to fill the machine.
    each = 2 if wide or rows < 4 * _ENOUGH_PROGRAMS else 4
    return Tiling(max(1, each // (x.element_size() // 2)), columns)
