"""Exact attention over a work list: stream-K over the tiles of all heads, then a launch that joins the parts.

The tiles of all heads and questions form one row, the questions of a head side by side, since they keep much the same
keys; each group of programs takes an equal, contiguous share of it, so the machine stays full however unequally heads
keep keys. A group has one program per block of query rows; these read the same keys at the same time, so that the L2
cache serves all but the first. Every group leaves a partial result for each head it meets, and these are joined in a
fixed order: no atomics, the same sums in every run.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import ChannelScales
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.ahead import ask_ahead, shares_of
from squeezed.ops.triton.eight_bit import scaled_query
from squeezed.ops.triton.join import (
    Parts,
    group_of,
    join_block,
    join_rows,
    merge_rows,
    part_rows,
    store_result,
    tiles_of,
)
from squeezed.ops.triton.own import Tally
from squeezed.ops.triton.select import WorkList
from squeezed.ops.triton.stream import stream, stream_packed_row

LOG2E = 1.4426950408889634
_HELD = 64  # numbers of the joined parts that a thread holds
_JOINED_DIMS = 32  # of a row that a program joins, where rows are few


@dataclass(frozen=True)
class AttendConfig:
    """How a launch is cut up. Chosen by `attend_config` from measurements; tests and benchmarks may pass others."""

    block_rows: int
    block_keys: int
    warps: int
    stages: int
    programs_per_multiprocessor: int
    width: int
    registers: int | None = None


def attend_config(head_dim: int, rows: int, dtype: torch.dtype, keys: int, beside: bool = False) -> AttendConfig:
    """The fastest measured configuration (docs/results/kernel-notes.md).

    Args:
        rows: query rows of a KV head, heads of the group x queries.
        dtype: of the stored keys.
        keys: fixed keys of all questions and KV heads together.
        beside: stand-ins run at the same time and need room.
    """
    block_rows = 1 if dtype.itemsize == 1 and rows == 1 else dev.padded_rows(rows)
    if dev.INTERPRETED:
        return AttendConfig(min(block_rows, 32), 32, 4, 1, 1, 8 if rows <= dev.FEW_ROWS else 1)
    wide = head_dim * dtype.itemsize // 128
    if rows > dev.FEW_ROWS:
        # Two blocks of rows at most: with grouped heads, whose many blocks share what they read, 5% slower.
        if wide == 2 and head_dim == 128 and rows in (256, 512):
            return AttendConfig(256, 64, 16, 5, 1, 1, registers=128)
        if wide <= 2 and head_dim <= 128:
            return AttendConfig(block_rows, 64, 8, 3, 2, 1, registers=128)
        return AttendConfig(min(block_rows, 64), 32, 8, 3, 1, 1)
    if wide > 2 or block_rows > 16:
        return AttendConfig(block_rows, 32, 4, 3 if wide > 4 else 5, 2, 8)
    if dtype.itemsize == 1 and block_rows > 1 and head_dim <= 128 and keys > 2**19:
        return AttendConfig(block_rows, 128, 4, 3, 2, 8)
    if beside and rows > 1 and keys > 2**19:
        return AttendConfig(block_rows, 64, 4, 4, 2, 8, registers=168)
    # Three programs a multiprocessor keep more reads in flight; with few tiles each, two end sooner.
    if keys > 2**19:
        return AttendConfig(block_rows, 64, 4, 3 if keys > 2**21 else 4, 3, 8, registers=168)
    return AttendConfig(block_rows, 64, 4, 5, 2, 8)


@triton.jit
def _attend(
    query,
    keys,
    values,
    key_scale,
    key_centre,
    entries,
    counts,
    part_out,
    part_lse,
    scale_log2,
    problems,
    kv_heads,
    rows,
    row_blocks,
    part_rows,
    tokens,
    list_size,
    groups,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PROBLEMS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """ENTRIES of a tile; PACKED: numbers in a word of keys and values, 4 if they are int8."""
    group = tl.program_id(0) // row_blocks
    row_block = tl.program_id(0) % row_blocks
    problem_index = tl.arange(0, BLOCK_PROBLEMS)
    # The row's order is head by head; everything in memory is question by question.
    batch = problems // kv_heads
    problem_place = (problem_index % batch) * kv_heads + problem_index // batch
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    count = tl.load(counts + problem_place, mask=problem_index < problems, other=0)
    tiles = (count + (ENTRIES - 1)) // ENTRIES
    ends = tl.cumsum(tiles, axis=0)
    total = tl.sum(tiles, axis=0)
    tile = tiles_of(group, groups, total)
    stop = tiles_of(group + 1, groups, total)

    dim = tl.arange(0, HEAD_DIM)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    while tile < stop:
        order = tl.sum((ends <= tile).to(tl.int32), axis=0)
        is_problem = problem_index == order
        problem = (order % batch) * kv_heads + order // batch
        head_stop = tl.sum(tl.where(is_problem, ends, 0), axis=0)
        head_start = head_stop - tl.sum(tl.where(is_problem, tiles, 0), axis=0)
        head_count = tl.sum(tl.where(is_problem, count, 0), axis=0)
        part_stop = tl.minimum(stop, head_stop)
        first = (tile - head_start) * ENTRIES
        end = tl.minimum((part_stop - head_start) * ENTRIES, head_count)
        head = (order // batch).to(tl.int64)
        key_base = keys + head * tokens * (HEAD_DIM // PACKED)
        value_base = values + head * tokens * (HEAD_DIM // PACKED)
        list_base = entries + problem.to(tl.int64) * list_size
        if BLOCK_R == 1:
            acc, top, weight, shift = stream_packed_row(
                query + problem.to(tl.int64) * HEAD_DIM, key_scale + head * HEAD_DIM, key_centre + head * HEAD_DIM,
                key_base, value_base, list_base, first, end, scale_log2,
                WIDTH, HEAD_DIM, BLOCK_N, STAGES, FAST,
            )  # fmt: skip
        else:
            q = tl.load(
                query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
                mask=(row < rows)[:, None],
                other=0.0,
            )
            q, logit_scale, shift = scaled_query(q, key_scale, key_centre, head, scale_log2, HEAD_DIM)
            acc, top, weight = stream(
                q, key_base, value_base, list_base, first, end, logit_scale,
                WIDTH, HEAD_DIM, BLOCK_R, BLOCK_N, STAGES, PRECISION, PACKED, FAST,
            )  # fmt: skip
        acc = acc / weight[:, None]
        # Along the row of tiles group and order only grow, and one of them grows from part to part: the sum is a slot
        # of its own for every part.
        place = (group + order).to(tl.int64) * part_rows + row
        needed = row < part_rows
        tl.store(part_out + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=needed[:, None])
        tl.store(part_lse + place, top + tl.log2(weight) + shift, mask=needed)
        tile = part_stop


@triton.jit
def _join_parts(
    value_scale,
    value_centre,
    counts,
    output,
    lse_out,
    part_out,
    part_lse,
    other_out,
    other_lse,
    others,
    more_out,
    more_lse,
    more,
    kept,
    tally,
    running,
    ahead,
    shares,
    problems,
    kv_heads,
    rows,
    part_rows,
    groups,
    ENTRIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_PROBLEMS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    MORE_PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of a head, DIMS of their dimensions: join what each group left, and the parts that others made of it.

    Output 0 and log-sum-exp -inf where nothing is attended. What was kept on LEVELS levels is added to `tally`.
    Programs after those of the heads ask for the next launch's weights: there is room as soon as one that attends ends.
    """
    problem = tl.program_id(1)
    if ahead is not None:  # noqa: SIM102
        if problem >= problems:
            ask_ahead(ahead, (problem - problems) * tl.num_programs(0) + tl.program_id(0), shares, False)
            return
    row_start = tl.program_id(0) // (HEAD_DIM // DIMS) * ROWS
    dim_start = tl.program_id(0) % (HEAD_DIM // DIMS) * DIMS
    row = row_start + tl.arange(0, ROWS)
    problem_index = tl.arange(0, BLOCK_PROBLEMS)
    batch = problems // kv_heads
    order = (problem % kv_heads) * batch + problem // kv_heads
    problem_place = (problem_index % batch) * kv_heads + problem_index // batch
    # Counts and what was kept are complete before attention to the list started, the tally and whether it is running
    # since the step before: read behind the L1 cache, as nothing was waited for yet.
    count = tl.load(counts + problem_place, mask=problem_index < problems, other=0, cache_modifier=".cg")
    tiles = (count + (ENTRIES - 1)) // ENTRIES
    total = tl.sum(tiles, axis=0)
    head_start = tl.sum(tl.where(problem_index < order, tiles, 0), axis=0)
    head_tiles = tl.sum(tl.where(problem_index == order, tiles, 0), axis=0)
    if LEVELS > 0:  # noqa: SIM102
        if (tl.program_id(0) == 0) & (problem % kv_heads == 0):
            counts_now = tl.load(running, cache_modifier=".cg")
            own = (problem_index >= problem) & (problem_index < problem + kv_heads)
            for level in tl.static_range(LEVELS):
                where_kept = kept + level * problems + problem_index
                found = tl.load(where_kept, mask=own, other=0, cache_modifier=".cg").to(tl.int64)
                where_tally = tally + level * (problems // kv_heads) + problem // kv_heads
                so_far = tl.load(where_tally, cache_modifier=".cg")
                tl.store(where_tally, so_far + tl.sum(found, axis=0) * counts_now)
    if more_out is not None:
        more_joined, more_part = join_rows(
            more_out, more_lse, problem * more, problem * more + more - 1, None, None, 0, 0, None, None, part_rows,
            row_start, dim_start, ROWS, DIMS, HEAD_DIM, MORE_PARTS,
        )  # fmt: skip
    channel_scale = None
    channel_centre = None
    if value_scale is not None:
        channel = (problem % kv_heads) * HEAD_DIM + dim_start + tl.arange(0, DIMS)
        channel_scale = tl.load(value_scale + channel)
        channel_centre = tl.load(value_centre + channel)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = group_of(head_start, groups, total) + order
    last = tl.where(head_tiles > 0, group_of(head_start + head_tiles - 1, groups, total) + order, first - 1)
    joined, joined_lse = join_rows(
        part_out, part_lse, first, last, other_out, other_lse, problem * others, others, channel_scale, channel_centre,
        part_rows, row_start, dim_start, ROWS, DIMS, HEAD_DIM, PARTS,
    )  # fmt: skip
    if more_out is not None:
        joined, joined_lse = merge_rows(joined, joined_lse, more_joined, more_part)
    store_result(output, lse_out, joined, joined_lse, problem, row, rows, dim_start, DIMS, HEAD_DIM)


@dataclass(frozen=True)
class ListParts:
    """Attention over a work list, in parts: what each group of programs left of each head it met."""

    out: Tensor
    lse: Tensor
    groups: int
    work: WorkList
    config: AttendConfig


def attend_list(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: WorkList,
    scale: float,
    config: AttendConfig,
    scales: ChannelScales | None = None,
) -> ListParts:
    """Exact softmax attention over the keys that the work list names, for `join_list` to put together.

    Args:
        query: [B, Hk, rows, D] contiguous.
        keys, values: [Hk, N, D] contiguous, shared by all B questions.
        work: from `select_clusters`, made with `config.width`.
        scale: softmax scale.
        scales: of keys and values stored in 8 bits.
    """
    batch, kv_heads, rows, head_dim = query.shape
    problems = batch * kv_heads
    row_blocks = triton.cdiv(rows, config.block_rows)
    # Words of four spill registers where there are many rows.
    packed = keys.dtype == torch.int8 and rows <= dev.FEW_ROWS
    groups = max(1, dev.multiprocessors(query.device) * config.programs_per_multiprocessor // row_blocks)
    padded = part_rows(rows)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    parts = ListParts(
        empty(groups + problems, padded, head_dim), empty(groups + problems, padded), groups, work, config
    )
    _attend[(groups * row_blocks,)](
        query,
        keys.view(torch.int32) if packed else keys,
        values.view(torch.int32) if packed else values,
        *(scales[:2] if scales else (None, None)),
        work.entries,
        work.counts,
        parts.out,
        parts.lse,
        scale * LOG2E,
        problems,
        kv_heads,
        rows,
        row_blocks,
        padded,
        keys.shape[1],
        work.entries.shape[1],
        groups,
        WIDTH=work.width,
        BLOCK_R=config.block_rows,
        BLOCK_N=config.block_keys,
        STAGES=config.stages,
        PRECISION=dev.dot_precision(query.dtype),
        PACKED=4 if packed else 1,
        FAST=not dev.INTERPRETED,
        num_warps=config.warps,
        **_sharing(parts, problems),
        **dev.launch_options(query.device),
        **({"maxnreg": config.registers} if config.registers else {}),
    )
    return parts


def join_list(
    query: Tensor,
    parts: ListParts,
    scales: ChannelScales | None = None,
    others: Parts | None = None,
    more: Parts | None = None,
    dtype: torch.dtype = torch.float32,
    kept: Tensor | None = None,
    tally: Tally | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The parts that `attend_list` left, joined with one another and with attention over other keys.

    Args:
        query, scales: as given to `attend_list`.
        others, more: attention of the same rows over other keys.
        dtype: of the output.
        kept, tally: what `select_keys` kept, [levels, B * Hk], and where to add it up.
        ahead: bytes that the next launch reads; the L2 cache is asked for them.

    Returns:
        output [B, Hk, rows, D] and log-sum-exp [B, Hk, rows] float32; 0 and -inf where nothing is attended.
    """
    batch, kv_heads, rows, head_dim = query.shape
    problems, joined_rows = batch * kv_heads, join_block(rows)
    output = torch.empty(batch, kv_heads, rows, head_dim, dtype=dtype, device=query.device)
    lse = torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=query.device)
    # Few rows: what a program waits for is its threads' exchange, so more programs of fewer threads each.
    dims, warps = (min(head_dim, _JOINED_DIMS), 2) if rows <= dev.FEW_ROWS else (head_dim, 4)
    each = triton.cdiv(rows, joined_rows) * (head_dim // dims)
    _join_parts[(each, problems + triton.cdiv(shares_of(ahead), each))](
        *(scales[2:] if scales else (None, None)),
        parts.work.counts,
        output,
        lse,
        parts.out,
        parts.lse,
        others.out if others else None,
        others.lse if others else None,
        others.lse.shape[1] if others else 0,
        more.out if more else None,
        more.lse if more else None,
        more.lse.shape[1] if more else 0,
        kept if tally else None,
        tally.total if tally else None,
        tally.running if tally else None,
        ahead,
        shares_of(ahead),
        problems,
        kv_heads,
        rows,
        part_rows(rows),
        parts.groups,
        ROWS=joined_rows,
        DIMS=dims,
        PARTS=max(1, _HELD * 32 * warps // (dims * joined_rows)),
        MORE_PARTS=triton.next_power_of_2(more.lse.shape[1]) if more else 1,
        LEVELS=tally.total.shape[0] if tally else 0,
        num_warps=warps,
        **_sharing(parts, problems),
        **dev.launch_options(query.device),
    )
    return output, lse


def _sharing(parts: ListParts, problems: int) -> dict[str, int]:
    return {
        "ENTRIES": parts.config.block_keys // parts.work.width,
        "HEAD_DIM": parts.out.shape[2],
        "BLOCK_PROBLEMS": triton.next_power_of_2(problems),
    }
