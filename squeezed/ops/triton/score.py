"""Score centroids for few query rows (decoding): one read of the centroids, logits kept, log-sum-exp in parts.

The normaliser of a row needs every centroid, so each program leaves the maximum and sum of its own piece, and the
selection that follows joins them: no second pass over the centroids, no launch of its own.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import ChannelScales
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.eight_bit import packed_logits, packed_query, scaled_query, unpack_rows
from squeezed.ops.triton.join import Parts
from squeezed.ops.triton.own import OwnKeys, attend_own_part


@dataclass(frozen=True)
class Scores:
    """Scores of one level, before the threshold.

    Attributes:
        logits: [B * Hk, rows, capacity] float32, s q.C of each row; or log scores with rows = 1 if `part_max` is None.
        part_max, part_sum: [B * Hk, rows, splits] float32, log-sum-exp of each piece as maximum and scaled sum.
        sync: int64 words for the selection that follows, already zero.
    """

    logits: Tensor
    part_max: Tensor | None
    part_sum: Tensor | None
    sync: Tensor


@triton.jit
def clear_words(words, count, program, programs, BLOCK: tl.constexpr):
    """Zero this program's share of the words on which later kernels synchronise."""
    for start in range(program * BLOCK, count, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(words + index, tl.zeros([BLOCK], tl.int64), mask=index < count)


@triton.jit
def _score_few_rows(
    query,
    centroids,
    key_scale,
    key_centre,
    sizes,
    spread,
    ids,
    id_counts,
    logits,
    part_max,
    part_sum,
    sync,
    own_keys,
    own_values,
    own_lengths,
    own_out,
    own_lse,
    sync_words,
    scale,
    kv_heads,
    rows,
    clusters,
    capacity,
    splits,
    own_parts,
    own_rows,
    own_capacity,
    HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """PACKED: centroids are int8, four to an int32. Programs after the `splits` that score attend to own tokens."""
    split = tl.program_id(0)
    problem = tl.program_id(1)
    head = problem % kv_heads
    WORDS: tl.constexpr = HEAD_DIM // 4 if PACKED else HEAD_DIM
    word = tl.arange(0, WORDS)
    begin = split * (BLOCK_C * TILES)
    base = centroids + head.to(tl.int64) * clusters * WORDS
    # Centroids are no earlier kernel's result: the only tile of a program is asked for before it waits for its query.
    EARLY: tl.constexpr = TILES == 1 and not HAS_IDS
    if EARLY:
        only = begin + tl.arange(0, BLOCK_C)
        only_c = tl.load(base + only[:, None] * WORDS + word[None, :], mask=(only < clusters)[:, None], other=0)
        only_size = tl.load(sizes + head * clusters + only, mask=only < clusters, other=0)
    if own_keys is not None:
        # Last step's doing, many launches ago.
        own_length = tl.load(own_lengths + problem // kv_heads) + 1
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if split == 0:
        clear_words(sync, sync_words, problem, tl.num_programs(1), 256)
    count = clusters
    if HAS_IDS:
        count = tl.load(id_counts + problem)
    row = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, HEAD_DIM)
    row_mask = row < rows
    running_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_R], tl.float32)
    if begin < count:
        if BLOCK_R == 1:
            row_scale = key_scale + head * HEAD_DIM
            row_mean = key_centre + head * HEAD_DIM
            row_query = query + problem.to(tl.int64) * HEAD_DIM
            q0, q1, q2, q3, _, norm = packed_query(row_query, row_scale, row_mean, HEAD_DIM)
            norm = tl.zeros([1], tl.float32) + norm
        else:
            q = tl.load(
                query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
                mask=row_mask[:, None],
                other=0.0,
            )
            norm = tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
            q, logit_scale, _ = scaled_query(q, key_scale, key_centre, head, scale, HEAD_DIM)
        steps = tl.minimum(TILES, tl.cdiv(count - begin, BLOCK_C))
        for tile in tl.range(0, steps, num_stages=STAGES):
            index = begin + tile * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = index < count
            cluster = index
            if HAS_IDS:
                cluster = tl.load(ids + problem.to(tl.int64) * capacity + index, mask=inside, other=0)
            if EARLY:
                c = only_c
                size = only_size
            else:
                c = tl.load(base + cluster[:, None] * WORDS + word[None, :], mask=inside[:, None], other=0)
                size = tl.load(sizes + head * clusters + cluster, mask=inside, other=0)
            if BLOCK_R == 1:
                scores = packed_logits(c, q0, q1, q2, q3, FAST)[None, :] * scale
            else:
                if PACKED:
                    c = unpack_rows(c, FAST)
                scores = tl.dot(q, tl.trans(c.to(q.dtype)), input_precision=PRECISION) * logit_scale
            if spread is not None:
                variance = tl.load(spread + head * clusters + cluster, mask=inside, other=0.0)
                scores += (norm * (0.5 * scale * scale))[:, None] * variance[None, :]
            scores = tl.where((size > 0)[None, :], scores, float("-inf"))
            tl.store(
                logits + (problem.to(tl.int64) * rows + row[:, None]) * capacity + index[None, :],
                scores,
                mask=row_mask[:, None] & inside[None, :],
                # Selection and stand-ins read them while centroids and keys pass through the cache.
                eviction_policy="evict_last",
            )
            weighted = scores + tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
            new_max = tl.maximum(running_max, tl.max(weighted, axis=1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            running_sum = running_sum * tl.exp(running_max - safe_max)
            running_sum += tl.sum(tl.exp(weighted - safe_max[:, None]), axis=1)
            running_max = new_max
    scores_here = row_mask & (split + row * 0 < splits)
    part = (problem * rows + row) * splits + split
    tl.store(part_max + part, running_max, mask=scores_here)
    tl.store(part_sum + part, running_sum, mask=scores_here)
    if own_keys is not None:  # noqa: SIM102
        if split >= splits:
            attend_own_part(
                query,
                own_keys,
                own_values,
                own_length,
                own_out,
                own_lse,
                split - splits,
                own_parts,
                problem,
                kv_heads,
                rows,
                own_rows,
                own_capacity,
                scale * 1.4426950408889634,
                HEAD_DIM,
                16 if BLOCK_R == 1 else BLOCK_R,
                PRECISION,
            )


def score_few_rows(
    query: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    scale: float,
    sync_words: int,
    ids: Tensor | None = None,
    id_counts: Tensor | None = None,
    scales: ChannelScales | None = None,
    spread: Tensor | None = None,
    own: OwnKeys | None = None,
    own_parts: Parts | None = None,
    *,
    block: int | None = None,
    tiles: int | None = None,
    stages: int | None = None,
    warps: int = 4,
) -> Scores:
    """Logits of every centroid (or of those in `ids`) for up to `FEW_ROWS` query rows.

    Args:
        query: [B, Hk, rows, D] contiguous; rows = heads of the group x queries.
        centroids: [Hk, K, D] contiguous.
        sizes: [Hk, K] int32, 0 marks padding.
        scale: softmax scale s.
        sync_words: int64 words to hand on, zeroed, to the kernels that follow.
        ids, id_counts: [B * Hk, capacity] and [B * Hk] int32, the clusters a coarser level left.
        scales: of centroids stored in 8 bits.
        spread: [Hk, K] float32, mean variance of each cluster's keys, for second-order scores.
        own, own_parts: own tokens to attend to beside, and where to.
    """
    batch, kv_heads, rows, head_dim = query.shape
    clusters = centroids.shape[1]
    capacity = clusters if ids is None else ids.shape[1]
    block = block or max(16, min(128, 16384 // head_dim // (2 if centroids.dtype == torch.float32 else 1)))
    problems = batch * kv_heads
    # Where the machine is hardly filled, a program with one tile and nothing to pipeline ends sooner.
    few_tiles = problems * triton.cdiv(capacity, block) < 4 * dev.multiprocessors(query.device)
    tiles = tiles or (1 if few_tiles else 2)
    stages = stages or (1 if few_tiles else 2)
    packed = scales is not None
    block_rows = 1 if rows == 1 and packed else dev.padded_rows(rows)
    splits = triton.cdiv(capacity, block * tiles)
    logits = torch.empty(problems, rows, capacity, dtype=torch.float32, device=query.device)
    part_max, part_sum = torch.empty(2, problems, rows, splits, dtype=torch.float32, device=query.device)
    sync = torch.empty(sync_words, dtype=torch.int64, device=query.device)
    _score_few_rows[(splits + (own.parts if own else 0), problems)](
        query,
        centroids.view(torch.int32) if packed else centroids,
        scales.key_scale if scales else None,
        scales.key_centre if scales else None,
        sizes,
        spread,
        ids,
        id_counts,
        logits,
        part_max,
        part_sum,
        sync,
        own.keys if own else None,
        own.values if own else None,
        own.lengths if own else None,
        own_parts.out if own_parts else None,
        own_parts.lse if own_parts else None,
        sync_words,
        scale,
        kv_heads,
        rows,
        clusters,
        capacity,
        splits,
        own.parts if own else 0,
        own_parts.lse.shape[2] if own_parts else 0,
        own.keys.shape[2] if own else 0,
        HAS_IDS=ids is not None,
        HEAD_DIM=head_dim,
        BLOCK_R=block_rows,
        BLOCK_C=block,
        TILES=tiles,
        STAGES=stages,
        PRECISION=dev.dot_precision(query.dtype),
        PACKED=packed,
        FAST=not dev.INTERPRETED,
        num_warps=warps,
        **dev.launch_options(query.device),
    )
    return Scores(logits, part_max, part_sum, sync)
