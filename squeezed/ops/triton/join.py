"""Join the partial results that several groups of programs left for one head, always in the same order."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_result(output, lse_out, acc, lse, problem, row, rows, scale, mean, HEAD_DIM: tl.constexpr):
    """Write rows of a head: [R, HEAD_DIM] and [R]; undo the scaling of stored values where there is one."""
    dim = tl.arange(0, HEAD_DIM)
    if scale is not None:
        acc = acc * tl.load(scale + dim)[None, :] + tl.load(mean + dim)[None, :]
    place = problem.to(tl.int64) * rows + row
    mask = row < rows
    tl.store(output + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask[:, None])
    tl.store(lse_out + place, lse * LN2, mask=mask)


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
    part_out, part_lse, first, last, part_rows, row_start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rows [row_start, row_start + ROWS) of slots [first, last], PARTS at a time: ([ROWS, HEAD_DIM], [ROWS])."""
    dim = tl.arange(0, HEAD_DIM)
    row = row_start + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for start in range(first, last + 1, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = part <= last
        place = part.to(tl.int64)[:, None] * part_rows + row[None, :]
        lse = tl.load(part_lse + place, mask=mask[:, None], other=float("-inf"), cache_modifier=".cg")
        out = tl.load(
            part_out + place[:, :, None] * HEAD_DIM + dim[None, None, :], mask=mask[:, None, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        weight = tl.exp2(lse - new_top[None, :])
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * out, axis=0)
        total = total * rescale + tl.sum(weight, axis=0)
        top = new_top
    return acc / total[:, None], top + tl.log2(total)
