"""The operations one after another: score and select level by level, coarsest first, then attend."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from squeezed.ops.layout import ClusteredKeys


def attend_fixed(
    ops: ModuleType,
    query: Tensor,
    index: ClusteredKeys,
    log_thresholds: tuple[float, ...] | None,
    window_end: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of M queries that share a selection to one layer's fixed context.

    Args:
        ops: the implementation of the operations.
        query: [B, Hq, M, D].
        log_thresholds: per level, finest first; None attends to every key without looking at centroids.
        window_end: keys [index.clustered, window_end) are always attended.

    Returns:
        output [B, Hq, M, D] float32, lse [B, Hq, M] float32, and kept [levels, B, Hk] int64, finest first: the
        clustered keys attended, and of each coarser level how many clusters of the next finer one it left to look at.
    """
    window, finest = (index.clustered, window_end), index.levels[0]
    kept = torch.zeros(len(index.levels), query.shape[0], index.keys.shape[0], dtype=torch.int64, device=query.device)
    if log_thresholds is None:
        kept[0] = index.clustered
        output, lse = ops.attend_selected(query, index.keys, index.values, finest.offsets, None, window, scale)
        return output, lse, kept
    allowed: Tensor | None = None
    for level in reversed(range(len(index.levels))):
        found = index.levels[level]
        scores = ops.score_centroids(query, found.centroids, found.sizes, scale, allowed, found.spread)
        selected = ops.select_clusters(scores, log_thresholds[level])
        if level > 0:
            allowed = ops.expand_to_children(selected, found.offsets, index.levels[level - 1].shape[1])
            kept[level] = allowed.sum(-1)
    kept[0] = ops.kept_keys(selected, finest.sizes)
    output, lse = ops.attend_selected(query, index.keys, index.values, finest.offsets, selected, window, scale)
    return output, lse, kept
