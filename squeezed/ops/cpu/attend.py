"""Compiled loops for attending to selected runs with few queries per KV head."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from squeezed.ops.cpu.intrinsics import ORDER_FREE, exp_in_place, prefetch, widen

_TILE = 32  # keys whose logits are held at once, and how far ahead memory is asked for


@njit(cache=True, nogil=True)
def merge_runs(selected, offsets, window_start, window_end, slots, holders):  # type: ignore[no-untyped-def]
    """Selected clusters, the window and recalled keys as runs of keys, those of neighbouring clusters as one.

    selected [B * Hk, K] bool; offsets [Hk, K + 1]; slots, holders [B * Hk, R] or [Hk, R], recalled keys and their
    clusters, see `Recalled`. Returns starts, ends [B * Hk, K + 1 + R] and counts [B * Hk].
    """
    rows, clusters = selected.shape
    recalled = slots.shape[1]
    starts = np.empty((rows, clusters + 1 + recalled), np.int32)
    ends = np.empty((rows, clusters + 1 + recalled), np.int32)
    counts = np.zeros(rows, np.int64)
    for row in range(rows):
        head = row % offsets.shape[0]
        count = 0
        for cluster in range(clusters + 1):
            if cluster == clusters:
                start, end = window_start, window_end
            elif selected[row, cluster]:
                start, end = offsets[head, cluster], offsets[head, cluster + 1]
            else:
                continue
            if start >= end:
                continue
            if count > 0 and ends[row, count - 1] == start:
                ends[row, count - 1] = end
            else:
                starts[row, count], ends[row, count] = start, end
                count += 1
        for i in range(recalled):
            slot, holder = slots[row % slots.shape[0], i], holders[row % slots.shape[0], i]
            if slot < 0 or selected[row, holder]:
                continue
            if count > 0 and ends[row, count - 1] == slot:
                ends[row, count - 1] = slot + 1
            else:
                starts[row, count], ends[row, count] = slot, slot + 1
                count += 1
        counts[row] = count
    return starts, ends, counts


@njit(cache=True, nogil=True)
def run_positions(starts, ends, count):  # type: ignore[no-untyped-def]
    """The keys of one row's runs, one by one: [kept] int64."""
    total = 0
    for run in range(count):
        total += ends[run] - starts[run]
    index = np.empty(total, np.int64)
    at = 0
    for run in range(count):
        for position in range(starts[run], ends[run]):
            index[at] = position
            at += 1
    return index


@njit(cache=True, nogil=True)
def plan_items(starts, ends, counts, wanted):  # type: ignore[no-untyped-def]
    """Cut each row's kept keys into items of nearly equal size: [items, 4] = row, first run, offset in it, keys."""
    rows = counts.shape[0]
    totals = np.zeros(rows, np.int64)
    for row in range(rows):
        for run in range(counts[row]):
            totals[row] += ends[row, run] - starts[row, run]
    share = max(256, -(-totals.sum() // wanted))
    count = 0
    for row in range(rows):
        count += -(-totals[row] // share)
    items = np.empty((count, 4), np.int64)
    at = 0
    for row in range(rows):
        left, run, offset = totals[row], 0, 0
        pieces = -(-left // share)
        for piece in range(pieces):
            take = -(-left // (pieces - piece))
            items[at, 0], items[at, 1], items[at, 2], items[at, 3] = row, run, offset, take
            at += 1
            left -= take
            while take > 0:
                step = min(take, ends[row, run] - starts[row, run] - offset)
                take -= step
                offset += step
                if starts[row, run] + offset == ends[row, run]:
                    run += 1
                    offset = 0
    return items


@njit(cache=True, nogil=True, parallel=True, fastmath=ORDER_FREE, error_model="numpy")
def stream_items(query, keys, values, starts, ends, items, bias, scale, partial, partial_max, partial_sum):  # type: ignore[no-untyped-def]
    """Online-softmax attention of each work item, unnormalised.

    query [B * Hk, G, D] float32; keys, values [Hk, N, D] float32, int8 or raw bfloat16; bias [Hk, N] or [B * Hk, N]
    float32 of the logits, or [0, 0] for none. Writes partial [items, G, D], partial_max and partial_sum [items, G],
    float32. Each kept key is read once for all G queries.
    """
    biased = bias.shape[0] > 0
    group, dim = query.shape[1], query.shape[2]
    heads = keys.shape[0]
    line = 64 // keys.itemsize
    for item in prange(items.shape[0]):
        row, run, offset, count = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        head = row % heads
        where = np.empty(count, np.int64)
        at = 0
        while at < count:
            position = starts[row, run] + offset
            step = min(count - at, ends[row, run] - position)
            for i in range(step):
                where[at + i] = position + i
            at += step
            run += 1
            offset = 0
        logits = np.empty((group, _TILE), np.float32)
        out = np.zeros((group, dim), np.float32)
        top = np.full(group, -np.inf, np.float32)
        total = np.zeros(group, np.float32)
        for begin in range(0, count, _TILE):
            tile = min(_TILE, count - begin)
            for i in range(tile):
                position = where[begin + i]
                for d in range(0, dim, line):
                    prefetch(values, head, position, d)
                for g in range(group):
                    dot = np.float32(0.0)
                    for d in range(dim):
                        dot += query[row, g, d] * widen(keys[head, position, d])
                    logits[g, i] = dot * scale
                    if biased:
                        logits[g, i] += bias[row % bias.shape[0], position]
            for g in range(group):
                highest = top[g]
                for i in range(tile):
                    highest = max(highest, logits[g, i])
                shrink = np.float32(math.exp(top[g] - highest))
                top[g] = highest
                for i in range(tile):
                    logits[g, i] -= highest
                exp_in_place(logits[g], tile)
                added = np.float32(0.0)
                for i in range(tile):
                    added += logits[g, i]
                total[g] = total[g] * shrink + added
                for d in range(dim):
                    out[g, d] *= shrink
            for i in range(tile):
                position = where[begin + i]
                if begin + _TILE + i < count:
                    ahead = where[begin + _TILE + i]
                    for d in range(0, dim, line):
                        prefetch(keys, head, ahead, d)
                for g in range(group):
                    weight = logits[g, i]
                    for d in range(dim):
                        out[g, d] += weight * widen(values[head, position, d])
        partial_max[item] = top
        partial_sum[item] = total
        partial[item] = out


@njit(cache=True, nogil=True)
def merge_items(items, partial, partial_max, partial_sum, output, lse):  # type: ignore[no-untyped-def]
    """Join the work items of each row: output [B * Hk, G, D], lse [B * Hk, G], float32, are written."""
    rows, group, dim = output.shape
    first = 0
    for row in range(rows):
        last = first
        while last < items.shape[0] and items[last, 0] == row:
            last += 1
        for g in range(group):
            top = np.float32(-np.inf)
            for item in range(first, last):
                top = max(top, partial_max[item, g])
            total = np.float32(0.0)
            output[row, g] = 0.0
            for item in range(first, last):
                weight = np.float32(math.exp(partial_max[item, g] - top))
                total += weight * partial_sum[item, g]
                for d in range(dim):
                    output[row, g, d] += weight * partial[item, g, d]
            lse[row, g] = -np.inf
            if total > 0:
                lse[row, g] = top + math.log(total)
                for d in range(dim):
                    output[row, g, d] /= total
        first = last
