"""The operations one after another: score and select level by level, coarsest first, then attend."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from squeezed.ops.layout import ClusteredKeys, Recalled
from squeezed.ops.voting import voting


def attend_fixed(
    ops: ModuleType,
    query: Tensor,
    index: ClusteredKeys,
    log_thresholds: tuple[float, ...] | None,
    window_end: int,
    scale: float,
    voters: int | None = None,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of M queries that share a selection to one layer's fixed context.

    Args:
        ops: the implementation of the operations.
        query: [B, Hq, M, D].
        log_thresholds: per level, finest first; None attends to every key without looking at centroids.
        window_end: keys [index.clustered, window_end) are always attended.
        voters: most of the M queries by which clusters are scored, see `squeezed.ops.voting`; None: all.
        recalled: single keys to attend to as well.

    Returns:
        output [B, Hq, M, D] float32, lse [B, Hq, M] float32, and kept [levels, B, Hk] int64, finest first: the
        clustered keys attended, and of each coarser level how many clusters of the next finer one it left to look at.
    """
    finest = index.levels[0]
    kept = torch.zeros(len(index.levels), query.shape[0], index.keys.shape[0], dtype=torch.int64, device=query.device)
    parts: list[tuple[Tensor, Tensor]] = []
    window = (index.window_start, window_end)
    if index.sinks is not None:
        apart = (0, index.sinks[0].shape[1])
        parts.append(ops.attend_selected(query, *index.sinks, finest.offsets, None, apart, scale))
    if log_thresholds is None:
        kept[0] = index.clustered
        # Between clusters and window lie rows of sinks that are kept apart, not to be read there.
        every = None if index.sinks is None else (finest.sizes > 0).expand(query.shape[0], -1, -1)
        attended = ops.attend_selected(
            query, index.keys, index.values, finest.offsets, every, window, scale, index.scales
        )
        return *_joined(ops, [attended, *parts]), kept
    asking = query[:, :, voting(query.shape[2], voters)]
    allowed: Tensor | None = None
    for depth in reversed(range(len(index.levels))):
        level = index.levels[depth]
        scores = ops.score_centroids(asking, level.centroids, level.sizes, scale, allowed, level.spread, index.scales)
        selected = ops.select_clusters(scores, log_thresholds[depth])
        if level.values is not None:
            left_out = (level.sizes > 0) & ~selected
            left_out = left_out if allowed is None else left_out & allowed
            parts.append(_stand_in(ops, query, index, depth, left_out, scale, recalled))
        if depth > 0:
            allowed = ops.expand_to_children(selected, level.offsets, index.levels[depth - 1].shape[1])
            kept[depth] = allowed.sum(-1)
    kept[0] = ops.kept_keys(selected, finest.sizes, recalled)
    attended = ops.attend_selected(
        query, index.keys, index.values, finest.offsets, selected, window, scale, index.scales, recalled=recalled
    )
    return *_joined(ops, [attended, *parts]), kept


def _stand_in(
    ops: ModuleType,
    query: Tensor,
    index: ClusteredKeys,
    depth: int,
    left_out: Tensor,
    scale: float,
    recalled: Recalled | None,
) -> tuple[Tensor, Tensor]:
    """Attention to the clusters [B, Hk, K] that a level leaves out, each as N_i keys that lie at its centroid.

    Keys that are attended all the same are not among the N_i.
    """
    level = index.levels[depth]
    kv_heads, clusters, _ = level.shape
    each = torch.arange(clusters + 1, dtype=torch.int32, device=query.device).expand(kv_heads, -1)
    sizes = level.sizes if recalled is None else recalled.sizes[depth]
    left_out = left_out & (sizes > 0)
    log_sizes = sizes.clamp(min=1).log()
    return ops.attend_selected(
        query, level.centroids, level.values, each, left_out, (0, 0), scale, index.scales, log_sizes
    )


def _joined(ops: ModuleType, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return parts[0] if len(parts) == 1 else ops.merge_attention(parts)
