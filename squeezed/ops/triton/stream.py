"""Inner loops of attention: stream the tiles of a work list through an online softmax."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(list_base, step, count, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of the keys of one tile, and which of its lanes hold a key."""
    slot = step * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDTH == 1:
        inside = slot < count
        position = tl.load(list_base + slot, mask=inside, other=0)
    else:
        entry = tl.load(list_base + slot // WIDTH, mask=slot // WIDTH < count, other=0)
        position = (entry >> 4) + slot % WIDTH
        inside = slot % WIDTH < (entry & 15)
    return position, inside


@triton.jit
def stream(
    q,
    key_base,
    value_base,
    list_base,
    start,
    stop,
    count,
    scale_log2,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles [start, stop): unnormalised sum of values [BLOCK_R, HEAD_DIM], maximum and weight sum [BLOCK_R], base 2."""
    dim = tl.arange(0, HEAD_DIM)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for step in tl.range(start, stop, num_stages=STAGES):
        position, inside = locate(list_base, step, count, WIDTH, BLOCK_N)
        address = position[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(key_base + address, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        logits = tl.where(inside[None, :], logits * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weight, axis=1)
        v = tl.load(value_base + address, mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def stream_ahead(
    q,
    key_base,
    value_base,
    list_base,
    start,
    stop,
    count,
    scale_log2,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `stream`, with the product of the next tile issued before the softmax of this one, so that they overlap."""
    dim = tl.arange(0, HEAD_DIM)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    position, inside = locate(list_base, start, count, WIDTH, BLOCK_N)
    k = tl.load(key_base + position[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0)
    logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    for step in tl.range(start, stop, num_stages=STAGES):
        next_position, next_inside = locate(list_base, step + 1, count, WIDTH, BLOCK_N)
        k = tl.load(key_base + next_position[:, None] * HEAD_DIM + dim[None, :], mask=next_inside[:, None], other=0.0)
        next_logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        position, inside = locate(list_base, step, count, WIDTH, BLOCK_N)
        logits = tl.where(inside[None, :], logits * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weight, axis=1)
        v = tl.load(value_base + position[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
        logits = next_logits
    return acc, top, total
