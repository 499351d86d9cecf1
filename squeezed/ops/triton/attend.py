"""Exact attention over a work list, in one launch: stream-K over the tiles of all heads, the last part to end merges.

The tiles of all questions and heads form one row; each group of programs takes an equal, contiguous share of it, so
the machine stays full however unequally heads keep keys. A group has one program per block of query rows; these read
the same keys at the same time, so that the L2 cache serves all but the first. Where a head is shared by several groups
each leaves a partial result, and the last to arrive joins them in a fixed order: no float atomics, the same sums in
every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev
from squeezed.ops.triton.select import WorkList

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class AttendConfig:
    """How a launch is cut up. Chosen by `attend_config` from measurements; tests and benchmarks may pass others."""

    block_keys: int
    warps: int
    stages: int
    programs_per_multiprocessor: int
    width: int


def attend_config(head_dim: int, rows: int, dtype: torch.dtype) -> AttendConfig:
    """The fastest measured configuration (docs/results/kernel-notes.md)."""
    if dev.INTERPRETED:
        return AttendConfig(32, 4, 1, 2, 8 if rows <= dev.FEW_ROWS else 1)
    wide = head_dim * dtype.itemsize // 128
    if rows <= dev.FEW_ROWS:
        return AttendConfig({1: 128, 2: 64}.get(wide, 32), 4, 3, 2, 8)
    return AttendConfig(64 if wide <= 2 else 32, 8, 2, 1, 1)


@triton.jit
def _merge_few_rows(
    part_out, part_lse, output, lse_out, first, last, problem, rows, head_dim_scale,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, HEAD_DIM)
    part = tl.arange(0, PARTS)
    value_scale = tl.load(head_dim_scale + dim) if head_dim_scale is not None else 1.0
    for row in range(rows):
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([HEAD_DIM], tl.float32)
        for start in range(first, last + 1, PARTS):
            slot = start + part
            mask = slot <= last
            where_row = ((slot + problem).to(tl.int64) * BLOCK_R) + row
            lse = tl.load(part_lse + where_row, mask=mask, other=float("-inf"), cache_modifier=".cg")
            out = tl.load(
                part_out + where_row[:, None] * HEAD_DIM + dim[None, :], mask=mask[:, None], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(lse, axis=0))
            weight = tl.exp2(lse - new_top)
            rescale = tl.exp2(top - new_top)
            acc = acc * rescale + tl.sum(weight[:, None] * out, axis=0)
            total = total * rescale + tl.sum(weight, axis=0)
            top = new_top
        place = problem.to(tl.int64) * rows + row
        tl.store(output + place * HEAD_DIM + dim, acc / total * value_scale)
        tl.store(lse_out + place, (top + tl.log2(total)) * 0.6931471805599453)


@triton.jit
def _merge_many_rows(
    part_out, part_lse, output, lse_out, first, last, problem, row_block, row_blocks, rows, head_dim_scale,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, BLOCK_R)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for slot in range(first, last + 1):
        where_row = ((slot + problem).to(tl.int64) * row_blocks + row_block) * BLOCK_R + row
        lse = tl.load(part_lse + where_row, cache_modifier=".cg")
        out = tl.load(part_out + where_row[:, None] * HEAD_DIM + dim[None, :], cache_modifier=".cg")
        new_top = tl.maximum(top, lse)
        weight = tl.exp2(lse - new_top)
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale[:, None] + weight[:, None] * out
        total = total * rescale + weight
        top = new_top
    value_scale = tl.load(head_dim_scale + dim) if head_dim_scale is not None else tl.full([HEAD_DIM], 1.0, tl.float32)
    place = row_block * BLOCK_R + row
    mask = place < rows
    where_out = problem.to(tl.int64) * rows + place
    tl.store(
        output + where_out[:, None] * HEAD_DIM + dim[None, :], acc / total[:, None] * value_scale[None, :],
        mask=mask[:, None],
    )  # fmt: skip
    tl.store(lse_out + where_out, (top + tl.log2(total)) * 0.6931471805599453, mask=mask)


@triton.jit
def _clear_empty(output, lse_out, counts, problems, programs, rows, HEAD_DIM: tl.constexpr):
    """Where a head has nothing to attend no program visits it: output 0, log-sum-exp -inf."""
    dim = tl.arange(0, HEAD_DIM)
    for problem in range(tl.program_id(0), problems, programs):
        if tl.load(counts + problem) == 0:
            for row in range(rows):
                place = problem.to(tl.int64) * rows + row
                tl.store(output + place * HEAD_DIM + dim, tl.zeros([HEAD_DIM], tl.float32))
                tl.store(lse_out + place, float("-inf"))


@triton.jit
def _attend(
    query,
    keys,
    values,
    value_scale,
    entries,
    counts,
    output,
    lse_out,
    part_out,
    part_lse,
    arrivals,
    scale_log2,
    problems,
    kv_heads,
    rows,
    row_blocks,
    tokens,
    list_size,
    groups,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PROBLEMS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0) // row_blocks
    row_block = tl.program_id(0) % row_blocks
    _clear_empty(output, lse_out, counts, problems, tl.num_programs(0), rows, HEAD_DIM)

    problem_index = tl.arange(0, BLOCK_PROBLEMS)
    count = tl.load(counts + problem_index, mask=problem_index < problems, other=0)
    tiles = (count * WIDTH + (BLOCK_N - 1)) // BLOCK_N
    total = tl.sum(tiles, axis=0)
    used = tl.minimum(groups, total)
    tile = 0
    stop = 0
    if group < used:
        tile = (group.to(tl.int64) * total // used).to(tl.int32)
        stop = ((group + 1).to(tl.int64) * total // used).to(tl.int32)

    dim = tl.arange(0, HEAD_DIM)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_N)
    while tile < stop:
        ends = tl.cumsum(tiles, axis=0)
        problem = tl.sum((ends <= tile).to(tl.int32), axis=0)
        is_problem = problem_index == problem
        head_stop = tl.sum(tl.where(is_problem, ends, 0), axis=0)
        head_start = head_stop - tl.sum(tl.where(is_problem, tiles, 0), axis=0)
        head_entries = tl.sum(tl.where(is_problem, count, 0), axis=0)
        head = (problem % kv_heads).to(tl.int64)
        key_base = keys + head * tokens * HEAD_DIM
        value_base = values + head * tokens * HEAD_DIM
        list_base = entries + problem.to(tl.int64) * list_size
        q = tl.load(
            query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
            mask=(row < rows)[:, None],
            other=0.0,
        )
        top = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total_weight = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
        part_stop = tl.minimum(stop, head_stop)
        for step in tl.range(tile - head_start, part_stop - head_start, num_stages=STAGES):
            slot = step * BLOCK_N + lane
            if WIDTH == 1:
                inside = slot < head_entries
                position = tl.load(list_base + slot, mask=inside, other=0)
            else:
                entry = tl.load(list_base + slot // WIDTH, mask=slot // WIDTH < head_entries, other=0)
                position = (entry >> 4) + slot % WIDTH
                inside = slot % WIDTH < (entry & 15)
            address = position[:, None] * HEAD_DIM + dim[None, :]
            k = tl.load(key_base + address, mask=inside[:, None], other=0.0)
            logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
            logits = tl.where(inside[None, :], logits * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            weight = tl.exp2(logits - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            total_weight = total_weight * rescale + tl.sum(weight, axis=1)
            v = tl.load(value_base + address, mask=inside[:, None], other=0.0)
            acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * rescale[:, None], input_precision=PRECISION)
            top = new_top

        acc = acc / total_weight[:, None]
        lse = top + tl.log2(total_weight)
        first = ((head_start + 1).to(tl.int64) * used - 1) // total
        last = (head_stop.to(tl.int64) * used - 1) // total
        mask = row < rows
        if first == last:
            if value_scale is not None:
                acc *= tl.load(value_scale + head * HEAD_DIM + dim)[None, :]
            place = problem.to(tl.int64) * rows + row
            tl.store(output + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask[:, None])
            tl.store(lse_out + place, lse * 0.6931471805599453, mask=mask)
        else:
            # Along the row of tiles group and problem only grow, and one of them grows from part to part: the sum is
            # a slot of its own for every part.
            place = (group + problem).to(tl.int64) * row_blocks * BLOCK_R + row
            tl.store(part_out + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask[:, None])
            tl.store(part_lse + place, lse, mask=mask)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + problem * row_blocks + row_block, 1, sem="acq_rel")
            if arrived == last - first:
                head_scale = value_scale + head * HEAD_DIM if value_scale is not None else None
                if FEW:
                    _merge_few_rows(
                        part_out, part_lse, output, lse_out, first.to(tl.int32), last.to(tl.int32), problem, rows,
                        head_scale, HEAD_DIM, BLOCK_R, 4096 // HEAD_DIM,
                    )  # fmt: skip
                else:
                    _merge_many_rows(
                        part_out, part_lse, output, lse_out, first.to(tl.int32), last.to(tl.int32), problem, row_block,
                        row_blocks, rows, head_scale, HEAD_DIM, BLOCK_R,
                    )  # fmt: skip
        tile = part_stop


def attend_list(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: WorkList,
    arrivals: Tensor,
    scale: float,
    config: AttendConfig,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that the work list names.

    Args:
        query: [B, Hk, rows, D] contiguous.
        keys, values: [Hk, N, D] contiguous, shared by all B questions.
        work: from `select_clusters`, made with `config.width`.
        arrivals: [B * Hk * ceil(rows / padded_rows(rows))] int64, zero.
        scale: softmax scale.
        value_scale: [Hk, D] float32, factor of each channel of the stored values (8-bit storage).

    Returns:
        output [B, Hk, rows, D] float32 and log-sum-exp [B, Hk, rows] float32; 0 and -inf where the list is empty.
    """
    batch, kv_heads, rows, head_dim = query.shape
    problems = batch * kv_heads
    block_rows = dev.padded_rows(rows)
    row_blocks = triton.cdiv(rows, block_rows)
    groups = max(1, dev.multiprocessors(query.device) * config.programs_per_multiprocessor // row_blocks)
    output = torch.empty(batch, kv_heads, rows, head_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=query.device)
    part_rows = (groups + problems) * row_blocks * block_rows
    part_out = torch.empty(part_rows, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(part_rows, dtype=torch.float32, device=query.device)
    _attend[(groups * row_blocks,)](
        query,
        keys,
        values,
        value_scale,
        work.entries,
        work.counts,
        output,
        lse,
        part_out,
        part_lse,
        arrivals,
        scale * LOG2E,
        problems,
        kv_heads,
        rows,
        row_blocks,
        keys.shape[1],
        work.entries.shape[1],
        groups,
        WIDTH=work.width,
        HEAD_DIM=head_dim,
        BLOCK_R=block_rows,
        BLOCK_N=config.block_keys,
        BLOCK_PROBLEMS=triton.next_power_of_2(problems),
        STAGES=config.stages,
        PRECISION=dev.dot_precision(query.dtype),
        FEW=rows <= dev.FEW_ROWS,
        PDL=dev.has_dependent_launch(query.device),
        num_warps=config.warps,
        **dev.launch_options(query.device),
    )
    return output, lse
