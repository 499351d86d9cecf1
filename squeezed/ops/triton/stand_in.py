"""Attention to what a work list does not name: clusters left out, as keys at their centroid, and sinks kept apart.

Each program takes a piece of a head's clusters, or the sinks, and leaves a partial result; the launch that joins the
list's partial results joins these as well.

All of it is launched after attention to the list but does not wait for it: with dependent launches its programs start
as soon as there is room beside that, since all they read was complete before attention started. Only the first program
waits, at its end, so that the launch ends no sooner than attention and whatever waits for it waits for both.
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
from squeezed.ops.triton.eight_bit import scaled_query, unpack_rows
from squeezed.ops.triton.join import Parts, part_rows
from squeezed.ops.triton.score import Scores
from squeezed.ops.triton.stand_in_row import end_after_attention, stand_in_row, start_beside_attention


@dataclass(frozen=True)
class LeftOut:
    """The clusters that one level leaves out.

    Attributes:
        log_sizes: [B * Hk, capacity] float32, of the level's clusters or of those in `ids`: log2 of their number of
            keys, -inf for those that are selected; None for few rows that all vote.
        scores: of this level, in the same order; for few rows that all vote, the logits as `select_clusters` left
            them: each with its cluster's log size and no second-order part, -inf for what is selected.
        centroids, values: [Hk, K, D].
        ids, id_counts: [B * Hk, capacity] and [B * Hk] int32, the clusters that a coarser level left; or None.
    """

    log_sizes: Tensor | None
    scores: Scores
    centroids: Tensor
    values: Tensor
    ids: Tensor | None
    id_counts: Tensor | None

    @property
    def capacity(self) -> int:
        return self.scores.logits.shape[2]


@dataclass(frozen=True)
class StandInConfig:
    """How a launch is cut up; tests and benchmarks may put another in the place of `stand_in_config`."""

    block: int
    stages: int
    programs_per_multiprocessor: int
    warps: int


def stand_in_config(head_dim: int, block_rows: int, query_bytes: int, packed: bool) -> StandInConfig:
    """The fastest of those measured for few rows in 8 bits (docs/results/kernel-notes.md); else what leaves room.

    `packed` clusters are int8; one row of such a query takes no block.
    """
    warps = 8 if block_rows > 32 else 4
    if dev.INTERPRETED:
        return StandInConfig(32, 1, 3, warps)
    if head_dim * query_bytes > 256:
        return StandInConfig(32, 3, 3, warps)
    return StandInConfig(128, 1, 1, warps) if packed and 1 < block_rows <= 32 else StandInConfig(64, 3, 3, warps)


@triton.jit
def _accumulate(top, total, acc, logits, v, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of an online softmax: logits [R, C] in base 2 (-inf: not attended), values [C, D]."""
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(logits - safe_top[:, None])
    rescale = tl.exp2(top - safe_top)
    total = total * rescale + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(DTYPE), v.to(DTYPE), acc * rescale[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _store_part(part_out, part_lse, place, top, total, acc, needed, HEAD_DIM: tl.constexpr):
    dim = tl.arange(0, HEAD_DIM)
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(part_out + place[:, None] * HEAD_DIM + dim[None, :], acc / safe_total[:, None], mask=needed[:, None])
    tl.store(part_lse + place, top + tl.log2(safe_total), mask=needed)


@triton.jit
def _stand_in(
    query,
    log_sizes,
    logits,
    centroids,
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
    rows,
    clusters,
    capacity,
    padded_rows,
    parts,
    first_part,
    HAS_IDS: tl.constexpr,
    STORED: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """STORED: the selection left the logits of what stands in; else they are computed again from the centroids.

    PACKED: centroids and values are int8, four to an int32.
    """
    if PDL:
        start_beside_attention()
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    problem = tl.program_id(2)
    head = problem % kv_heads
    log2e: tl.constexpr = 1.4426950408889634
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = row < rows
    dim = tl.arange(0, HEAD_DIM)
    q = tl.load(
        query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
        mask=row_mask[:, None],
        other=0.0,
    )
    # Numbers in 8 bits are exact in float16.
    dtype: tl.constexpr = tl.float16 if PACKED and query.dtype.element_ty == tl.bfloat16 else query.dtype.element_ty
    scaled, logit_scale, shift = scaled_query(q, key_scale, key_centre, head, scale * log2e, HEAD_DIM)
    count = clusters
    if HAS_IDS:
        count = tl.load(id_counts + problem)
    piece = tl.cdiv(tl.cdiv(count, BLOCK_C), tl.num_programs(1)) * BLOCK_C
    start = split * piece
    stop = tl.minimum(start + piece, count)
    WORDS: tl.constexpr = HEAD_DIM // 4 if PACKED else HEAD_DIM
    word = tl.arange(0, WORDS)
    base = head.to(tl.int64) * clusters * WORDS
    list_base = problem.to(tl.int64) * capacity
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for begin in tl.range(start, stop, BLOCK_C, num_stages=STAGES):
        index = begin + tl.arange(0, BLOCK_C)
        inside = index < stop
        cluster = index
        if HAS_IDS:
            cluster = tl.load(ids + list_base + index, mask=inside, other=0)
        address = base + cluster[:, None] * WORDS + word[None, :]
        if STORED:
            x = tl.load(
                logits + (problem.to(tl.int64) * rows + row[:, None]) * capacity + index[None, :],
                mask=row_mask[:, None] & inside[None, :],
                other=float("-inf"),
            )
            x = x * log2e
        else:
            log_size = tl.load(log_sizes + list_base + index, mask=inside, other=float("-inf"))
            c = tl.load(centroids + address, mask=inside[:, None], other=0)
            if PACKED:
                c = unpack_rows(c, FAST)
            x = tl.dot(scaled, tl.trans(c.to(scaled.dtype)), input_precision=PRECISION) * logit_scale
            x += log_size[None, :]
        v = tl.load(values + address, mask=inside[:, None], other=0)
        if PACKED:
            v = unpack_rows(v, FAST)
        top, total, acc = _accumulate(top, total, acc, x, v, dtype, PRECISION)
    if value_scale is not None:
        # Scaled while the weights still sum to `total`; a part that attends to nothing stays 0.
        acc = acc * tl.load(value_scale + head * HEAD_DIM + dim)[None, :]
        acc += total[:, None] * tl.load(value_centre + head * HEAD_DIM + dim)[None, :]
    place = (problem * parts + first_part + split).to(tl.int64) * padded_rows + row
    # What a row's logits all lack needs adding only here.
    _store_part(part_out, part_lse, place, top + shift, total, acc, row < padded_rows, HEAD_DIM)
    if PDL:
        end_after_attention(row_block + split + problem)


@triton.jit
def _attend_few(
    query,
    keys,
    values,
    part_out,
    part_lse,
    scale,
    kv_heads,
    rows,
    length,
    padded_rows,
    parts,
    part,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every one of a few keys, by one program per block of rows."""
    if PDL:
        start_beside_attention()
    problem = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, HEAD_DIM)
    q = tl.load(
        query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
        mask=(row < rows)[:, None],
        other=0.0,
    )
    base = (problem % kv_heads).to(tl.int64) * length * HEAD_DIM
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for begin in range(0, length, BLOCK_N):
        index = begin + tl.arange(0, BLOCK_N)
        inside = index < length
        address = base + index[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(keys + address, mask=inside[:, None], other=0.0)
        x = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * (scale * 1.4426950408889634)
        x = tl.where(inside[None, :], x, float("-inf"))
        v = tl.load(values + address, mask=inside[:, None], other=0.0)
        top, total, acc = _accumulate(top, total, acc, x, v, q.dtype, PRECISION)
    place = (problem * parts + part).to(tl.int64) * padded_rows + row
    _store_part(part_out, part_lse, place, top, total, acc, row < padded_rows, HEAD_DIM)
    if PDL:
        end_after_attention(tl.program_id(0) + problem)


def _even_splits(blocks: int, wanted: int) -> int:
    """As many splits as are busy when each takes a share of the blocks, rounded up, and `wanted` are there."""
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))


def attend_left_out(
    query: Tensor,
    levels: list[LeftOut],
    sinks: tuple[Tensor, Tensor] | None,
    scale: float,
    scales: ChannelScales | None,
) -> Parts | None:
    """Partial attention to stand-ins of every level's left-out clusters, and to sinks that are stored apart.

    Args:
        query: [B, Hk, rows, D] contiguous.
        levels: those that have centroid values.
        sinks: keys and values [Hk, n, D] of the query's dtype, or None if the work list names them.
        scale: softmax scale.
        scales: of centroids and values in 8 bits; None if they are not.

    Returns:
        what `join_list` joins; None if there is nothing.
    """
    batch, kv_heads, rows, head_dim = query.shape
    problems = batch * kv_heads
    stored = bool(levels) and levels[0].log_sizes is None
    packed = bool(levels) and levels[0].centroids.dtype == torch.int8
    block_rows = min(dev.padded_rows(rows), 64 if head_dim > 128 or query.element_size() > 2 else 128)
    block_rows = min(block_rows, 32) if dev.INTERPRETED else block_rows
    row_blocks = triton.cdiv(rows, block_rows)
    config = stand_in_config(head_dim, 1 if packed and rows == 1 else block_rows, query.element_size(), packed)
    programs = config.programs_per_multiprocessor * dev.multiprocessors(query.device)
    wanted = max(1, programs // (problems * row_blocks))
    splits = [_even_splits(triton.cdiv(level.capacity, config.block), wanted) for level in levels]
    parts = sum(splits) + (sinks is not None)
    if not parts:
        return None
    padded = part_rows(rows)
    result = Parts.empty(problems, parts, rows, head_dim, query.device)
    launch = {
        "HEAD_DIM": head_dim,
        "num_warps": config.warps,
        **dev.launch_options(query.device),
    }
    common = {"BLOCK_R": block_rows, "PRECISION": dev.dot_precision(query.dtype), **launch}
    first = 0
    for level, count in zip(levels, splits, strict=True):
        if packed and rows == 1:
            assert scales is not None
            stand_in_row[(count, problems)](
                query,
                level.scores.logits,
                level.values.view(torch.int32),
                level.ids,
                level.id_counts,
                *scales,
                result.out,
                result.lse,
                scale,
                kv_heads,
                level.centroids.shape[1],
                level.capacity,
                parts,
                first,
                HAS_IDS=level.ids is not None,
                BLOCK_C=config.block,
                STAGES=config.stages,
                FAST=not dev.INTERPRETED,
                **launch,
            )
            first += count
            continue
        _stand_in[(row_blocks, count, problems)](
            query,
            level.log_sizes,
            level.scores.logits,
            level.centroids.view(torch.int32) if packed else level.centroids,
            level.values.view(torch.int32) if packed else level.values,
            level.ids,
            level.id_counts,
            *(scales or (None,) * 4),
            result.out,
            result.lse,
            scale,
            kv_heads,
            rows,
            level.centroids.shape[1],
            level.capacity,
            padded,
            parts,
            first,
            HAS_IDS=level.ids is not None,
            STORED=stored,
            PACKED=packed,
            FAST=not dev.INTERPRETED,
            BLOCK_C=config.block,
            STAGES=config.stages,
            **common,
        )
        first += count
    if sinks is not None:
        _attend_few[(row_blocks, problems)](
            query,
            *sinks,
            result.out,
            result.lse,
            scale,
            kv_heads,
            rows,
            sinks[0].shape[1],
            padded,
            parts,
            first,
            BLOCK_N=config.block,
            **common,
        )
    return result
