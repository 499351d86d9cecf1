"""Stand-ins of one query row whose values are int8: four channels to a word, without matrix units.

One row fills a sixteenth of a matrix instruction, and bringing bytes into its layout costs more than it saves.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.ops.triton.eight_bit import packed_query, unpack


@triton.jit
def start_beside_attention():
    """Without waiting for the launch before this one, see `squeezed.ops.triton.stand_in`.

    The fence makes what earlier launches wrote visible, which waiting would have done.
    """
    tl.extra.cuda.gdc_launch_dependents()
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, $1;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def end_after_attention(program):
    """The first program waits for the launch before this one, see `squeezed.ops.triton.stand_in`."""
    if program == 0:
        tl.extra.cuda.gdc_wait()


@triton.jit
def stand_in_row(
    query,
    logits,
    values,
    ids,
    id_counts,
    key_scale,
    key_centre,
    value_scale,
    value_centre,
    part_out,
    part_lse,
    scale,
    kv_heads,
    clusters,
    capacity,
    parts,
    first_part,
    HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece of a head's clusters, with the logits that the selection left: see `stand_in.LeftOut`."""
    if PDL:
        start_beside_attention()
    split = tl.program_id(0)
    problem = tl.program_id(1)
    head = problem % kv_heads
    log2e: tl.constexpr = 1.4426950408889634
    WORDS: tl.constexpr = HEAD_DIM // 4
    word = tl.arange(0, WORDS)
    row_query = query + problem.to(tl.int64) * HEAD_DIM
    _, _, _, _, mean, _ = packed_query(row_query, key_scale + head * HEAD_DIM, key_centre + head * HEAD_DIM, HEAD_DIM)
    count = clusters
    if HAS_IDS:
        count = tl.load(id_counts + problem)
    piece = tl.cdiv(tl.cdiv(count, BLOCK_C), tl.num_programs(0)) * BLOCK_C
    start = split * piece
    stop = tl.minimum(start + piece, count)
    base = values + head.to(tl.int64) * clusters * WORDS
    list_base = problem.to(tl.int64) * capacity
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    acc0 = tl.zeros([BLOCK_C, WORDS], tl.float32)
    acc1 = tl.zeros([BLOCK_C, WORDS], tl.float32)
    acc2 = tl.zeros([BLOCK_C, WORDS], tl.float32)
    acc3 = tl.zeros([BLOCK_C, WORDS], tl.float32)
    for begin in tl.range(start, stop, BLOCK_C, num_stages=STAGES):
        index = begin + tl.arange(0, BLOCK_C)
        inside = index < stop
        cluster = index
        if HAS_IDS:
            cluster = tl.load(ids + list_base + index, mask=inside, other=0)
        v = tl.load(base + cluster[:, None] * WORDS + word[None, :], mask=inside[:, None], other=0)
        x = tl.load(logits + list_base + index, mask=inside, other=float("-inf"))
        x = x * log2e
        new_top = tl.maximum(top, tl.max(x, axis=0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(x - safe_top)
        rescale = tl.exp2(top - safe_top)
        total = total * rescale + weight
        v0, v1, v2, v3 = unpack(v, FAST)
        acc0 = acc0 * rescale + weight[:, None] * v0
        acc1 = acc1 * rescale + weight[:, None] * v1
        acc2 = acc2 * rescale + weight[:, None] * v2
        acc3 = acc3 * rescale + weight[:, None] * v3
        top = new_top
    even = tl.interleave(tl.sum(acc0, axis=0), tl.sum(acc2, axis=0))
    odd = tl.interleave(tl.sum(acc1, axis=0), tl.sum(acc3, axis=0))
    weight_sum = tl.sum(total, axis=0)
    safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
    dim = tl.arange(0, HEAD_DIM)
    acc = tl.interleave(even, odd) / safe_sum * tl.load(value_scale + head * HEAD_DIM + dim)
    acc += tl.load(value_centre + head * HEAD_DIM + dim) * (weight_sum / safe_sum)
    place = (problem * parts + first_part + split).to(tl.int64)
    tl.store(part_out + place * HEAD_DIM + dim, acc)
    tl.store(part_lse + place, top + tl.log2(safe_sum) + mean * scale * log2e)
    if PDL:
        end_after_attention(split + problem)
