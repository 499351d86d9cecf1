"""Select clusters into a work list on the device: threshold, scan, expand, one launch.

A program takes one chunk of a head's clusters, publishes how many entries the chunk yields, waits for the chunks before
it to publish theirs (they started earlier, so this ends) and writes its entries behind theirs. The order is that of the
clusters whatever the timing: the list, and so the sums made from it, are the same in every run.

An entry is a short run of consecutive children: start * 16 + length with length up to `width`, or just the start when
the width is 1. Recalled keys whose clusters are not selected are entries too, each by the chunk in which its cluster is
or, if a coarser level has dropped that, would be.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import Recalled
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.ahead import ask_ahead, ask_rows, bytes_to_ask, shares_of
from squeezed.ops.triton.score import Scores

_SLOTS = 512  # entries that a program writes at a time; a small chunk's runs are fewer
_SLOTS_OF_FEW = 128


@dataclass(frozen=True)
class Replaced:
    """Clusters that values will stand in for where they are not selected.

    Attributes:
        sizes: [Hk, K] or [B, Hk, K] int32, keys of each cluster that may be stood in for.
        spread: [Hk, K] float32 or None, as the scores had it.
        query: [B, Hk, rows, D], as the scores had it; read with `spread` only.
        scale: softmax scale.
        values: [Hk, K, D] what stands in, for the L2 cache to be asked for some of it; None: it is not asked.
    """

    sizes: Tensor
    spread: Tensor | None
    query: Tensor
    scale: float
    values: Tensor | None = None


@dataclass(frozen=True)
class WorkList:
    """What is selected, per question and KV head.

    Attributes:
        entries: [B * Hk, capacity] int32, runs of children (module docstring); only the first `counts` are written.
        counts: [B * Hk] int32, entries of each.
        kept: [B * Hk] int32, children in selected clusters (the window not counted).
        width: children per entry at most.
        left_out: [B * Hk, capacity of the scores] float32, log2 of the size of clusters that are not selected, -inf for
            the others (in the scores' order); None unless asked for, and with few rows, whose logits tell it.
    """

    entries: Tensor
    counts: Tensor
    kept: Tensor
    width: int
    left_out: Tensor | None = None


def chunk_size(capacity: int, listed: bool, many: bool, marked: bool) -> int:
    """Clusters per program: enough programs to fill the machine, few enough that they need not wait for one another.

    Where a coarser level leaves a list of clusters (`listed`), each is one more read away: smaller pieces hide that.
    For `many` rows every key is an entry, and for stand-ins what is left out is `marked`: programs with much to write
    would keep the others waiting.
    """
    if capacity <= 16384:
        return 256
    return 512 if listed or many or marked else 1024


def chunks_of(capacity: int, listed: bool, many: bool, marked: bool) -> int:
    """Programs per head, each with a status word."""
    return triton.cdiv(capacity, chunk_size(capacity, listed, many, marked))


def list_capacity(children: int, clusters: int, window: int, width: int, recalled: int = 0) -> int:
    """Entries that a head can need at most: every cluster may end in one incomplete run, every recalled key be one."""
    return (children + (width - 1) * clusters) // width + triton.cdiv(window, width) + recalled


@triton.jit
def _entries(
    slot, first, size, begins, ends, WIDTH: tl.constexpr, CHUNK_SIZE: tl.constexpr, LOG_CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The entries [SLOTS] in places `slot` of a chunk's list: runs of clusters [CHUNK_SIZE] from `begins` to `ends`."""
    owner = tl.zeros([SLOTS], tl.int32)
    for bit in tl.static_range(LOG_CHUNK):
        passed = tl.gather(ends, owner + ((CHUNK_SIZE >> (bit + 1)) - 1), 0) <= slot
        owner += passed.to(tl.int32) * (CHUNK_SIZE >> (bit + 1))
    offset = (slot - tl.gather(begins, owner, 0)) * WIDTH
    entry = tl.gather(first, owner, 0) + offset
    if WIDTH > 1:
        entry = entry * 16 + tl.minimum(tl.gather(size, owner, 0) - offset, WIDTH)
    return entry


@triton.jit
def _place_of(holder, cluster, CHUNK_SIZE: tl.constexpr, LOG_CHUNK: tl.constexpr, RECALLED: tl.constexpr):
    """Place of each cluster `holder` [RECALLED] among the ascending `cluster` [CHUNK_SIZE]; any place if it isn't."""
    place = tl.zeros([RECALLED], tl.int32)
    for bit in tl.static_range(LOG_CHUNK):
        further = place + (CHUNK_SIZE >> (bit + 1))
        passed = tl.gather(cluster, further, 0) <= holder
        place = tl.where(passed, further, place)
    return place


@triton.jit
def _select(
    logits,
    part_max,
    part_sum,
    offsets,
    ids,
    id_counts,
    log_thresholds,
    entries,
    counts,
    kept,
    left_out,
    sizes,
    query,
    spread,
    values,
    slots,
    holders,
    status,
    ahead,
    shares,
    scale,
    problems,
    level,
    kv_heads,
    rows,
    clusters,
    capacity,
    splits,
    max_chunks,
    list_size,
    window_start,
    window_end,
    recalled,
    HEAD_DIM: tl.constexpr,
    HAS_IDS: tl.constexpr,
    NORMALISED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    LINES: tl.constexpr,
    RECALLED: tl.constexpr,
    OWN_SIZES: tl.constexpr,
    PDL: tl.constexpr,
):
    """OWN_SIZES: each question has sizes, slots and holders of its own; otherwise they are the KV head's."""
    chunk = tl.program_id(0)
    problem = tl.program_id(1)
    head = problem % kv_heads
    asker = problem if OWN_SIZES else head
    if ahead is not None:  # noqa: SIM102
        if problem >= problems:
            ask_ahead(ahead, (problem - problems) * tl.num_programs(0) + chunk, shares, True)
            return
    index = chunk * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    offset_base = offsets + head * (clusters + 1)
    if not HAS_IDS:
        # Nothing that the scoring writes: read while it still runs.
        first = tl.load(offset_base + index, mask=index < clusters, other=0)
        end = tl.load(offset_base + index + 1, mask=index < clusters, other=0)
        if sizes is not None:
            members = tl.load(sizes + asker * clusters + index, mask=index < clusters, other=0)
        if spread is not None:
            variance = tl.load(spread + head * clusters + index, mask=index < clusters, other=0.0)
    row = tl.arange(0, BLOCK_R)
    if spread is not None:
        # What second-order scores add to a logit is no part of attention. The query is older than the scoring.
        dim = tl.arange(0, HEAD_DIM)
        where_query = query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :]
        q = tl.load(where_query, mask=(row < rows)[:, None], other=0.0, cache_modifier=".cg").to(tl.float32)
        stretch = tl.sum(q * q, axis=1) * (0.5 * scale * scale)
    if RECALLED:
        single = tl.arange(0, RECALLED)
        slot_of = tl.load(slots + asker * recalled + single, mask=single < recalled, other=-1)
        holder = tl.load(holders + asker * recalled + single, mask=single < recalled, other=clusters)
    threshold = tl.load(log_thresholds + level)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    count = clusters
    if HAS_IDS:
        count = tl.load(id_counts + problem)
    last_chunk = tl.maximum(tl.cdiv(count, CHUNK_SIZE), 1) - 1
    if chunk <= last_chunk:
        inside = index < count
        if HAS_IDS:
            cluster = tl.load(ids + problem.to(tl.int64) * capacity + index, mask=inside, other=0)
            first = tl.load(offset_base + cluster, mask=inside, other=0)
            end = tl.load(offset_base + cluster + 1, mask=inside, other=0)
            if sizes is not None:
                members = tl.load(sizes + asker * clusters + cluster, mask=inside, other=0)
            if spread is not None:
                variance = tl.load(spread + head * clusters + cluster, mask=inside, other=0.0)
        where_logit = logits + (problem.to(tl.int64) * rows + row[:, None]) * capacity + index[None, :]
        logit_mask = (row < rows)[:, None] & inside[None, :]
        score = tl.load(where_logit, mask=logit_mask, other=float("-inf"))
        logit = score
        if not NORMALISED:
            piece = tl.arange(0, BLOCK_SPLITS)
            where_part = (problem * rows + row[:, None]) * splits + piece[None, :]
            part_mask = (row < rows)[:, None] & (piece < splits)[None, :]
            maxima = tl.load(part_max + where_part, mask=part_mask, other=float("-inf"))
            sums = tl.load(part_sum + where_part, mask=part_mask, other=0.0)
            top = tl.max(maxima, axis=1)
            top = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(sums * tl.exp(maxima - top[:, None]), axis=1)
            score -= (top + tl.log(tl.where(total > 0, total, 1.0)))[:, None]
        peak = tl.max(score, axis=0)
        safe_peak = tl.where(peak == float("-inf"), 0.0, peak)
        if BLOCK_R > 1:
            mean = tl.sum(tl.exp(score - safe_peak[None, :]), axis=0) / rows
            peak = safe_peak + tl.log(mean)

        size = tl.where(peak > threshold, end - first, 0)
        runs = (size + (WIDTH - 1)) // WIDTH
        ends = tl.cumsum(runs, axis=0)
        begins = ends - runs
        cluster_runs = tl.sum(runs, axis=0)
        chunk_runs = cluster_runs
        chunk_children = tl.sum(size, axis=0)
        if RECALLED:
            lowest = chunk * CHUNK_SIZE
            highest = tl.where(chunk == last_chunk, clusters, lowest + CHUNK_SIZE)
            if HAS_IDS:
                # From this chunk's first cluster to the next one's; the first and the last take what lies outside.
                id_base = ids + problem.to(tl.int64) * capacity
                lowest = tl.where(chunk == 0, 0, tl.load(id_base + lowest, mask=chunk > 0, other=0))
                following = (chunk + 1) * CHUNK_SIZE
                highest = tl.load(id_base + following, mask=chunk < last_chunk, other=clusters)
                listed = tl.where(inside, cluster, clusters)
                where_held = _place_of(holder, listed, CHUNK_SIZE, LOG_CHUNK, RECALLED)
                taken = (tl.gather(listed, where_held, 0) == holder) & (tl.gather(size, where_held, 0) > 0)
            else:
                where_held = tl.minimum(tl.maximum(holder - lowest, 0), CHUNK_SIZE - 1)
                taken = tl.gather(size, where_held, 0) > 0
            added = ((holder >= lowest) & (holder < highest) & ~taken).to(tl.int32)
            added_end = tl.cumsum(added, axis=0)
            chunk_runs += tl.sum(added, axis=0)
            chunk_children += tl.sum(added, axis=0)

        done = tl.full([], 1, tl.int64) << 62
        low = (tl.full([], 1, tl.int64) << 31) - 1
        words = status + problem * max_chunks
        tl.atomic_xchg(
            words + chunk, done | (chunk_runs.to(tl.int64) << 31) | chunk_children.to(tl.int64), sem="relaxed"
        )
        if values is not None:  # noqa: SIM102
            # Nearly all of them will stand in, and until attention starts memory has little else to do.
            if problem < kv_heads:
                ask_rows(values, head, chunk * CHUNK_SIZE, clusters, ROW_BYTES, LINES)
        # What this chunk lists is made out while the chunks before it publish their counts.
        slot = tl.arange(0, SLOTS)
        entry = _entries(slot, first, size, begins, ends, WIDTH, CHUNK_SIZE, LOG_CHUNK, SLOTS)
        if sizes is not None:
            passed_over = (peak <= threshold) & (members > 0)
            at_least_one = tl.maximum(members, 1).to(tl.float32)
            if NORMALISED:
                stands_in = tl.where(passed_over, tl.log2(at_least_one), float("-inf"))
                tl.store(left_out + problem.to(tl.int64) * capacity + index, stands_in, mask=inside)
            else:
                logit += tl.log(at_least_one)[None, :]
                if spread is not None:
                    logit -= stretch[:, None] * variance[None, :]
                logit = tl.where(passed_over[None, :], logit, float("-inf"))
                tl.store(where_logit, logit, mask=logit_mask, eviction_policy="evict_last")
        before = tl.arange(0, BLOCK_CHUNKS)
        word = tl.load(words + before, mask=before < chunk, other=done, volatile=True)
        while tl.min(word, axis=0) < done:
            word = tl.load(words + before, mask=before < chunk, other=done, volatile=True)
        place = tl.sum((word >> 31) & low, axis=0)
        list_base = entries + problem.to(tl.int64) * list_size + place

        tl.store(list_base + slot, entry, mask=slot < cluster_runs)
        for slot_start in range(SLOTS, cluster_runs, SLOTS):
            slot = slot_start + tl.arange(0, SLOTS)
            entry = _entries(slot, first, size, begins, ends, WIDTH, CHUNK_SIZE, LOG_CHUNK, SLOTS)
            tl.store(list_base + slot, entry, mask=slot < cluster_runs)
        if RECALLED:
            single_entry = slot_of * 16 + 1 if WIDTH > 1 else slot_of
            tl.store(list_base + cluster_runs + added_end - 1, single_entry, mask=added > 0)

        if chunk == last_chunk:
            window_runs = tl.cdiv(window_end - window_start, WIDTH)
            for slot_start in range(0, window_runs, SLOTS):
                slot = slot_start + tl.arange(0, SLOTS)
                entry = window_start + slot * WIDTH
                if WIDTH > 1:
                    entry = entry * 16 + tl.minimum(window_end - entry, WIDTH)
                tl.store(list_base + chunk_runs + slot, entry, mask=slot < window_runs)
            tl.store(counts + problem, (place + chunk_runs + window_runs).to(tl.int32))
            tl.store(kept + problem, (tl.sum(word & low, axis=0) + chunk_children).to(tl.int32))


def select_clusters(
    scores: Scores,
    status: Tensor,
    offsets: Tensor,
    children: int,
    log_thresholds: Tensor,
    level: int,
    window: tuple[int, int],
    width: int,
    ids: Tensor | None = None,
    id_counts: Tensor | None = None,
    kept: Tensor | None = None,
    replaced: Replaced | None = None,
    recalled: Recalled | None = None,
    ahead: Tensor | None = None,
    *,
    slots: int | None = None,
    warps: int | None = None,
) -> WorkList:
    """The children of every cluster whose score is above the level's threshold, then the window.

    Args:
        scores: of this level.
        status: [B * Hk * `chunks_of` these scores] int64, zero.
        offsets: [Hk, K + 1] int32 CSR.
        children: most children that the clusters of a head have together.
        log_thresholds: [levels] float32 on the device; `level` picks one.
        window: [start, end) of children appended to every list; empty on coarse levels.
        width: children per entry, at most 8.
        ids, id_counts: as given to the scoring of this level.
        kept: [B * Hk] int32 to write the number of selected children to; by default a new one.
        replaced: to also tell which clusters are left out. With few rows the logits do, which become those of what
            stands in for a cluster's keys: its log size is added, what a second-order score had added is taken away,
            and they are -inf for selected clusters. With many, `left_out` does.
        recalled: keys to list as well where their clusters are not selected; of one question for all, if sizes are.
        ahead: bytes that a later launch reads; the L2 cache is asked for them.
    """
    problems, rows, capacity = scores.logits.shape
    kv_heads, clusters = offsets.shape[0], offsets.shape[1] - 1
    normalised = scores.part_max is None
    splits = 1 if scores.part_max is None else scores.part_max.shape[2]
    pieces = (capacity, ids is not None, normalised, replaced is not None)
    chunks, chunk = chunks_of(*pieces), chunk_size(*pieces)
    single = 0 if recalled is None else recalled.slots.shape[2]
    list_size = list_capacity(children, clusters, window[1] - window[0], width, single)
    if warps is None:
        # Where each multiprocessor has several programs, those of fewer threads are done sooner (measured at 256).
        short = chunk == 256 and ids is None and not normalised
        several = problems * chunks > dev.multiprocessors(offsets.device)
        warps = 8 if rows > 4 else 2 if short and several else 4
    sizes = None if replaced is None else replaced.sizes
    query, spread, values, lines = None, None, None, 0
    if replaced is not None and not normalised:
        query, spread = replaced.query, replaced.spread
        values, lines = bytes_to_ask(replaced.values, kv_heads * chunks, chunk)
    by_question = recalled.slots if recalled else sizes
    own_sizes = by_question is not None and by_question.dim() == 3 and by_question.shape[0] > 1
    entries = torch.empty(problems, list_size, dtype=torch.int32, device=offsets.device)
    counts = torch.empty(problems, dtype=torch.int32, device=offsets.device)
    kept = torch.empty_like(counts) if kept is None else kept
    left_out = None
    if sizes is not None and normalised:
        left_out = torch.empty(problems, capacity, dtype=torch.float32, device=offsets.device)
    _select[(chunks, problems + triton.cdiv(shares_of(ahead), chunks))](
        scores.logits,
        scores.part_max,
        scores.part_sum,
        offsets,
        ids,
        id_counts,
        log_thresholds,
        entries,
        counts,
        kept,
        left_out,
        sizes,
        query,
        spread,
        values,
        recalled.slots if recalled else None,
        recalled.clusters if recalled else None,
        status,
        ahead,
        shares_of(ahead),
        0.0 if replaced is None else replaced.scale,
        problems,
        level,
        kv_heads,
        rows,
        clusters,
        capacity,
        splits,
        chunks,
        list_size,
        window[0],
        window[1],
        single,
        HEAD_DIM=0 if query is None else query.shape[-1],
        HAS_IDS=ids is not None,
        NORMALISED=normalised,
        WIDTH=width,
        BLOCK_R=triton.next_power_of_2(rows),
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        CHUNK_SIZE=chunk,
        LOG_CHUNK=chunk.bit_length() - 1,
        SLOTS=slots or (_SLOTS_OF_FEW if chunk == 256 and width > 1 else _SLOTS),
        ROW_BYTES=0 if values is None else values.shape[-1],
        LINES=lines,
        RECALLED=triton.next_power_of_2(single) if single else 0,
        OWN_SIZES=own_sizes,
        num_warps=warps,
        **dev.launch_options(offsets.device),
    )
    return WorkList(entries, counts, kept, width, left_out)
