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
def join_few_rows(
    part_out, part_lse, first, last, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Parts [first, last], of which the first ROWS of BLOCK_R rows are written: ([ROWS, HEAD_DIM], [ROWS])."""
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for start in range(first, last + 1, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = part <= last
        place = part.to(tl.int64)[:, None] * BLOCK_R + row[None, :]
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


@triton.jit
def join_many_rows(
    part_out, part_lse, first, last, row_block, row_blocks, BLOCK_R: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Parts [first, last] of one block of rows: ([BLOCK_R, HEAD_DIM], [BLOCK_R])."""
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, BLOCK_R)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for part in range(first, last + 1):
        place = (part * row_blocks + row_block) * BLOCK_R + row.to(tl.int64)
        lse = tl.load(part_lse + place, cache_modifier=".cg")
        out = tl.load(part_out + place[:, None] * HEAD_DIM + dim[None, :], cache_modifier=".cg")
        new_top = tl.maximum(top, lse)
        weight = tl.exp2(lse - new_top)
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale[:, None] + weight[:, None] * out
        total = total * rescale + weight
        top = new_top
    return acc / total[:, None], top + tl.log2(total)
