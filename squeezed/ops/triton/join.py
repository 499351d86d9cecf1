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
def large_share(total, groups, small_groups):
    """How many of `total` tiles the first `groups` take; the rest goes to smaller groups, which start when those end.

    Multiprocessors differ in how fast they read by 10%: the small shares even that out. Few tiles are not worth it.
    """
    return tl.where((small_groups == 0) | (total < 16 * small_groups), total, total - total // 8)


@triton.jit
def tiles_of(group, total, large, groups, small_groups):
    """First tile of a group. Shares are contiguous; those of one kind differ by one at most and may be empty."""
    small = group - groups
    first_small = large + small * ((total - large) // tl.maximum(small_groups, 1))
    first_small += tl.minimum(small, (total - large) % tl.maximum(small_groups, 1))
    first_large = group * (large // groups) + tl.minimum(group, large % groups)
    return tl.where(group < groups, first_large, tl.minimum(first_small, total))


@triton.jit
def _share_of(tile, total, groups):
    share = total // groups
    longer = total % groups
    in_longer = tile // (share + 1)
    return tl.where(in_longer < longer, in_longer, longer + (tile - longer * (share + 1)) // tl.maximum(share, 1))


@triton.jit
def group_of(tile, total, large, groups, small_groups):
    """The group that `tiles_of` gives a tile to."""
    in_small = groups + _share_of(tile - large, total - large, tl.maximum(small_groups, 1))
    return tl.where(tile < large, _share_of(tile, large, groups), in_small)


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
