"""Join the partial results that several groups of programs left for one head, always in the same order."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev

LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Parts:
    """Attention over some keys of every row, to be joined with that over others.

    Attributes:
        out: [B * Hk, parts, part_rows, D] float32.
        lse: [B * Hk, parts, part_rows] float32, base 2, -inf where a part is empty.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, problems: int, count: int, rows: int, head_dim: int, device: torch.device) -> Parts:
        """Room for `count` parts of each question and KV head, for `rows` query rows."""
        padded = part_rows(rows)
        return cls(
            torch.empty(problems, count, padded, head_dim, dtype=torch.float32, device=device),
            torch.empty(problems, count, padded, dtype=torch.float32, device=device),
        )


def part_rows(rows: int) -> int:
    """Rows of a part: those of the queries, padded to whole blocks of the joining."""
    block = join_block(rows)
    return triton.cdiv(rows, block) * block


def join_block(rows: int) -> int:
    """Rows that a program joins."""
    return 1 if rows <= dev.FEW_ROWS else 16


@triton.jit
def store_result(output, lse_out, acc, lse, problem, row, rows, dim_start, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write rows of a head, dimensions from `dim_start` on: [R, DIMS] and [R], log-sum-exp in base 2."""
    dim = dim_start + tl.arange(0, DIMS)
    place = problem.to(tl.int64) * rows + row
    mask = row < rows
    tl.store(output + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask[:, None])
    tl.store(lse_out + place, lse * LN2, mask=mask & (dim_start + row * 0 == 0))


@triton.jit
def tiles_of(group, groups, total):
    """First tile of a group: contiguous shares that differ by one at most; some are empty where tiles are few."""
    return group * (total // groups) + tl.minimum(group, total % groups)


@triton.jit
def group_of(tile, groups, total):
    """The group that `tiles_of` gives a tile to."""
    share = total // groups
    longer = total % groups
    in_longer = tile // (share + 1)
    return tl.where(in_longer < longer, in_longer, longer + (tile - longer * (share + 1)) // tl.maximum(share, 1))


@triton.jit
def join_rows(
    part_out, part_lse, first, last, other_out, other_lse, first_other, others, channel_scale, channel_centre,
    part_rows, row_start, dim_start, ROWS: tl.constexpr, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rows and dimensions from `row_start` and `dim_start` on of slots [first, last]: ([ROWS, DIMS], [ROWS]).

    With them, unless `other_out` is None, `others` slots of a second buffer, from `first_other` on: in one go, since
    waiting for one buffer's parts before asking for the other's takes as long again. PARTS slots at a time.
    `channel_scale` and `channel_centre` [DIMS], or None: of the 8-bit values whose means slots [first, last] hold.
    """
    dim = dim_start + tl.arange(0, DIMS)
    row = row_start + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    listed = last + 1 - first
    count = listed
    if other_out is not None:
        count += others
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = part < count
        place = (first + part).to(tl.int64)[:, None] * part_rows + row[None, :]
        where_lse = part_lse + place
        where_out = part_out + place * HEAD_DIM
        if other_out is not None:
            place = (first_other + part - listed).to(tl.int64)[:, None] * part_rows + row[None, :]
            where_lse = tl.where((part < listed)[:, None], where_lse, other_lse + place)
            where_out = tl.where((part < listed)[:, None], where_out, other_out + place * HEAD_DIM)
        where_out = where_out[:, :, None] + dim[None, None, :]
        if other_out is not None:
            # The compiler can't tell that either buffer's rows are whole words in a row.
            where_out = tl.max_contiguous(tl.multiple_of(where_out, [1, 1, 16]), [1, 1, DIMS])
        lse = tl.load(where_lse, mask=mask[:, None], other=float("-inf"), cache_modifier=".cg")
        out = tl.load(where_out, mask=mask[:, None, None], other=0.0, cache_modifier=".cg")
        if channel_scale is not None:
            scaled = out * channel_scale[None, None, :] + channel_centre[None, None, :]
            out = tl.where((part < listed)[:, None, None], scaled, out)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # so far every part may be empty
        weight = tl.exp2(lse - safe_top[None, :])
        rescale = tl.exp2(top - safe_top)
        acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * out, axis=0)
        total = total * rescale + tl.sum(weight, axis=0)
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    return acc / total[:, None], top + tl.log2(total)


@triton.jit
def merge_rows(acc_a, lse_a, acc_b, lse_b):
    """Two disjoint parts of the same rows, [R, DIMS] and base-2 log-sum-exp [R] each; either may be empty."""
    top = tl.maximum(lse_a, lse_b)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp2(lse_a - safe_top)
    weight_b = tl.exp2(lse_b - safe_top)
    total = weight_a + weight_b
    total = tl.where(total > 0, total, 1.0)
    acc = acc_a * (weight_a / total)[:, None] + acc_b * (weight_b / total)[:, None]
    return acc, top + tl.log2(total)
