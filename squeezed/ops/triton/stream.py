"""Inner loops of attention: stream a stretch of a work list through an online softmax, tile by tile."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.ops.triton.eight_bit import packed_logits, packed_query, unpack, unpack_rows


@triton.jit
def locate(list_base, start, stop, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of the keys of the tile of entries from `start` on, and which of its lanes hold a key before `stop`."""
    lane = tl.arange(0, BLOCK_N)
    slot = start + lane // WIDTH
    entry = tl.load(list_base + slot, mask=slot < stop, other=0)
    if WIDTH == 1:
        position = entry
        inside = slot < stop
    else:
        position = (entry >> 4) + lane % WIDTH
        inside = lane % WIDTH < (entry & 15)
    return position, inside


@triton.jit
def stream(
    q,
    key_base,
    value_base,
    list_base,
    start,
    stop,
    scale_log2,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Entries [start, stop): unnormalised sum of values [BLOCK_R, HEAD_DIM], maximum and weight sum [BLOCK_R], base 2.

    PACKED: numbers in a word of keys and values, 4 if they are int8.
    """
    WORDS: tl.constexpr = HEAD_DIM // PACKED
    word = tl.arange(0, WORDS)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    full = start
    if WIDTH == 1:
        # All tiles but the last are full; without masks nothing spills in the many-row loop.
        full = stop - (stop - start) % BLOCK_N
        for tile in tl.range(start, full, BLOCK_N, num_stages=STAGES):
            position = tl.load(list_base + tile + tl.arange(0, BLOCK_N))
            address = position[:, None] * WORDS + word[None, :]
            k = tl.load(key_base + address)
            if PACKED == 4:
                k = unpack_rows(k, FAST)
            logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            weight = tl.exp2(logits * scale_log2 - (new_top * scale_log2)[:, None])
            rescale = tl.exp2((top - new_top) * scale_log2)
            total = total * rescale + tl.sum(weight, axis=1)
            v = tl.load(value_base + address)
            if PACKED == 4:
                v = unpack_rows(v, FAST)
            acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
            top = new_top
    for tile in tl.range(full, stop, BLOCK_N // WIDTH, num_stages=STAGES):
        position, inside = locate(list_base, tile, stop, WIDTH, BLOCK_N)
        address = position[:, None] * WORDS + word[None, :]
        k = tl.load(key_base + address, mask=inside[:, None], other=0)
        if PACKED == 4:
            k = unpack_rows(k, FAST)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        # Scaled inside the exponent, where it costs nothing: multiply and subtract are one instruction.
        weight = tl.exp2(logits * scale_log2 - (new_top * scale_log2)[:, None])
        rescale = tl.exp2((top - new_top) * scale_log2)
        total = total * rescale + tl.sum(weight, axis=1)
        v = tl.load(value_base + address, mask=inside[:, None], other=0)
        if PACKED == 4:
            v = unpack_rows(v, FAST)
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top * scale_log2, total


@triton.jit
def stream_packed_row(
    query,
    key_scale,
    key_centre,
    key_base,
    value_base,
    list_base,
    start,
    stop,
    scale_log2,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """As `stream` for one query row and 8-bit keys and values, four to an int32; also the shift of the log-sum-exp.

    Without matrix units: these want the bytes of a value tile in an order that costs a load for each.
    """
    WORDS: tl.constexpr = HEAD_DIM // 4
    word = tl.arange(0, WORDS)
    q0, q1, q2, q3, mean, _ = packed_query(query, key_scale, key_centre, HEAD_DIM)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc0 = tl.zeros([BLOCK_N, WORDS], tl.float32)
    acc1 = tl.zeros([BLOCK_N, WORDS], tl.float32)
    acc2 = tl.zeros([BLOCK_N, WORDS], tl.float32)
    acc3 = tl.zeros([BLOCK_N, WORDS], tl.float32)
    for tile in tl.range(start, stop, BLOCK_N // WIDTH, num_stages=STAGES):
        position, inside = locate(list_base, tile, stop, WIDTH, BLOCK_N)
        address = position[:, None] * WORDS + word[None, :]
        k = tl.load(key_base + address, mask=inside[:, None], other=0)
        v = tl.load(value_base + address, mask=inside[:, None], other=0)
        logits = tl.where(inside, packed_logits(k, q0, q1, q2, q3, FAST), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=0))
        weight = tl.exp2((logits - new_top) * scale_log2)
        rescale = tl.exp2((top - new_top) * scale_log2)
        total = total * rescale + weight
        v0, v1, v2, v3 = unpack(v, FAST)
        acc0 = acc0 * rescale + weight[:, None] * v0
        acc1 = acc1 * rescale + weight[:, None] * v1
        acc2 = acc2 * rescale + weight[:, None] * v2
        acc3 = acc3 * rescale + weight[:, None] * v3
        top = new_top
    even = tl.interleave(tl.sum(acc0, axis=0), tl.sum(acc2, axis=0))
    odd = tl.interleave(tl.sum(acc1, axis=0), tl.sum(acc3, axis=0))
    one = tl.zeros([1], tl.float32)
    acc = tl.interleave(even, odd)[None, :]
    return acc, one + top * scale_log2, one + tl.sum(total, axis=0), one + mean * scale_log2
