"""Compiled loops for scoring centroids with few queries: one read of the centroids, no passes in between."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from squeezed.ops.cpu.intrinsics import ORDER_FREE, exp_in_place, widen

_CHUNK = 512  # clusters per work item: small enough to balance a few heads over the cores


def _score_rows(query, centroids, sizes, allowed, spread, stretch, scale, log_scores):  # type: ignore[no-untyped-def]
    """Log scores of a few query rows, see `reference.score_centroids`.

    query [B * Hk, G, D] float32; centroids [Hk, K, D] float32, int8 or raw bfloat16; sizes [Hk, K]; allowed [B * Hk, K]
    bool or [0, 0] for all; spread [Hk, K] float32 or [0, 0] for none; stretch [B * Hk, G] float32, what multiplies the
    spread: s^2 |q|^2 / 2; log_scores [B * Hk, K] float32 is written.
    """
    rows, group, dim = query.shape
    heads, clusters = sizes.shape
    chunks = (clusters + _CHUNK - 1) // _CHUNK
    restricted, second_order = allowed.shape[0] > 0, spread.shape[0] > 0
    logits = np.empty((rows, group, clusters), np.float32)
    chunk_max = np.empty((rows, chunks, group), np.float32)
    chunk_sum = np.empty((rows, chunks, group), np.float32)
    for item in prange(rows * chunks):
        row, chunk = item // chunks, item % chunks
        head = row % heads
        first, last = chunk * _CHUNK, min((chunk + 1) * _CHUNK, clusters)
        for cluster in range(first, last):
            if sizes[head, cluster] == 0 or (restricted and not allowed[row, cluster]):
                for g in range(group):
                    logits[row, g, cluster] = -np.inf
                continue
            for g in range(group):
                dot = np.float32(0.0)
                for d in range(dim):
                    dot += query[row, g, d] * widen(centroids[head, cluster, d])
                logits[row, g, cluster] = dot * scale
                if second_order:
                    logits[row, g, cluster] += stretch[row, g] * spread[head, cluster]
        weights = np.empty(_CHUNK, np.float32)
        for g in range(group):
            top = np.float32(-np.inf)
            for cluster in range(first, last):
                top = max(top, logits[row, g, cluster])
            base = top if top > -np.inf else np.float32(0.0)
            for cluster in range(first, last):
                weights[cluster - first] = logits[row, g, cluster] - base
            exp_in_place(weights, last - first)
            total = np.float32(0.0)
            for cluster in range(first, last):
                total += weights[cluster - first] * sizes[head, cluster]
            chunk_max[row, chunk, g] = top
            chunk_sum[row, chunk, g] = total
    denominators = np.zeros((rows, group), np.float32)
    for row in range(rows):
        for g in range(group):
            top = np.float32(-np.inf)
            for chunk in range(chunks):
                top = max(top, chunk_max[row, chunk, g])
            if top == -np.inf:
                continue
            denominator = 0.0
            for chunk in range(chunks):
                denominator += chunk_sum[row, chunk, g] * math.exp(chunk_max[row, chunk, g] - top)
            denominators[row, g] = top + np.float32(math.log(denominator))
    log_group = np.float32(math.log(group))
    for item in prange(rows * chunks):
        row, chunk = item // chunks, item % chunks
        first, last = chunk * _CHUNK, min((chunk + 1) * _CHUNK, clusters)
        for cluster in range(first, last):
            top = np.float32(-np.inf)
            for g in range(group):
                top = max(top, logits[row, g, cluster] - denominators[row, g])
            log_scores[row, cluster] = top
        if group == 1:
            continue
        sums = np.zeros(_CHUNK, np.float32)
        terms = np.empty(_CHUNK, np.float32)
        for g in range(group):
            for cluster in range(first, last):
                top = log_scores[row, cluster]
                terms[cluster - first] = (
                    logits[row, g, cluster] - denominators[row, g] - top if top > -np.inf else np.float32(0.0)
                )
            exp_in_place(terms, last - first)
            for i in range(last - first):
                sums[i] += terms[i]
        for cluster in range(first, last):
            log_scores[row, cluster] += np.float32(math.log(sums[cluster - first])) - log_group


_OPTIONS = {"cache": True, "nogil": True, "fastmath": ORDER_FREE, "error_model": "numpy"}
score_rows = njit(parallel=True, **_OPTIONS)(_score_rows)
# Waking the other cores takes longer than scoring a short context does.
score_rows_on_one_core = njit(**_OPTIONS)(_score_rows)
