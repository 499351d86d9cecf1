"""Laying a layer's keys and values out cluster by cluster (paper section 3.1, 3.3).

Nested clusters are described by the sizes of their runs of keys: the finest clusters lie one after another, and each
coarser cluster is a run of finer ones. Centroids and offsets follow from that, so that clusters found at different
times can be put behind one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from squeezed.clustering.batched_kmeans import kmeans
from squeezed.clustering.steps import run_means, run_spread
from squeezed.config import BuildConfig
from squeezed.ops.layout import ClusteredKeys, ClusterLevel
from squeezed.storage import store

COARSENING = 5  # clusters of one level per cluster of the next coarser one (paper: 5% and 1% of the keys)

OnStage = Callable[[str], None]


def cluster_layer(
    keys: Tensor,
    values: Tensor,
    config: BuildConfig,
    on_stage: OnStage = lambda stage: None,
    space: Tensor | None = None,
) -> ClusteredKeys:
    """Cluster one layer and lay its keys and values out cluster by cluster.

    Args:
        keys, values: [kv_heads, tokens, head_dim]; keys after RoPE, in text order, all finite.
        config: shares, levels, sinks, window.
        on_stage: called with a stage's name as it ends: k-means, layout, levels, storage.
        space: [kv_heads, head_dim, head_dim] float32; keys are clustered in keys @ space by Euclidean distance, see
            `query_metric`. By cosine similarity if None.

    Returns:
        The layer's index; its tensors are new, so that the caller may free `keys` and `values`.
    """
    first, last = config.sinks, keys.shape[1] - config.window
    order, runs = find_clusters(keys[:, first:last], config, config.clusters_of(last - first), space)
    on_stage("k-means")
    keys, values = (lay_out(rows, order, first) for rows in (keys, values))
    positions = (order + first).int()
    del order
    on_stage("layout")
    layer = assemble(keys, values, positions, runs, config.second_order)
    on_stage("levels")
    layer = store(layer, config)
    on_stage("storage")
    return layer


def find_clusters(
    keys: Tensor, config: BuildConfig, clusters: int, space: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Nested clusters of keys [heads, n, dim] on all levels.

    Returns:
        order [heads, n] int64, the keys cluster by cluster, and of each level, finest first, the sizes of its runs
        [heads, K] int64 in keys, padded with 0 where a head has fewer.
    """
    metric = "cosine" if space is None else "euclidean"
    labels = [kmeans(keys, clusters, config.iterations, metric=metric, space=space)]
    order = labels[0].argsort(dim=1, stable=True)
    for _ in range(1, config.levels):
        offsets = _bounds(labels[-1].gather(1, order), clusters)
        centroids = run_means(keys, order, offsets)
        clusters = max(1, round(clusters / COARSENING))
        coarse = kmeans(centroids, clusters, config.iterations, offsets.diff(dim=1), metric, space)
        labels.append(coarse.gather(1, labels[-1]))
        order = labels[-1].argsort(dim=1, stable=True)
    # Sorted by the finest, then stably by the next coarser, and so on: every cluster is one run.
    order = labels[0].argsort(dim=1, stable=True)
    for members in labels[1:]:
        order = order.gather(1, members.gather(1, order).argsort(dim=1, stable=True))
    return order, [_run_sizes(members.gather(1, order)) for members in labels]


def _bounds(sorted_labels: Tensor, clusters: int) -> Tensor:
    numbers = torch.arange(clusters + 1, device=sorted_labels.device).expand(sorted_labels.shape[0], -1)
    return torch.searchsorted(sorted_labels.contiguous(), numbers.contiguous())


def _run_sizes(members: Tensor) -> Tensor:
    """Lengths of the runs of equal labels in [heads, n], padded with 0."""
    begins = torch.ones_like(members, dtype=torch.bool)
    begins[:, 1:] = members[:, 1:] != members[:, :-1]
    rank = begins.long().cumsum(1) - 1
    sizes = torch.zeros(len(members), int(rank[:, -1].max()) + 1, dtype=torch.int64, device=members.device)
    return sizes.scatter_add_(1, rank, torch.ones_like(rank))


def join_runs(earlier: Tensor, later: Tensor) -> Tensor:
    """The runs [heads, K] of each head one behind the other, padding last."""
    both = torch.cat([earlier, later], dim=1)
    both = both.gather(1, (both == 0).int().argsort(dim=1, stable=True))
    return both[:, : int((both > 0).sum(1).max())]


def lay_out(rows: Tensor, order: Tensor, first: int) -> Tensor:
    """Rows in text order to the clustered ones in `order` (places less `first`), then the first ones, then the last."""
    heads, n = order.shape
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for head in range(heads):  # each straight to its place: no copy of the layer in between
        torch.index_select(rows[head], 0, order[head] + first, out=out[head, :n])
    out[:, n : n + first] = rows[:, :first]
    out[:, n + first :] = rows[:, first + n :]
    return out


def assemble(
    keys: Tensor, values: Tensor, positions: Tensor, runs: Sequence[Tensor], second_order: bool
) -> ClusteredKeys:
    """The layer whose clusters are `runs` (see `find_clusters`) of keys that lie in that order already."""
    n = positions.shape[1]
    levels: list[ClusterLevel] = []
    finer: Tensor | None = None
    for sizes in runs:
        offsets = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
        centroids = run_means(keys[:, :n], None, offsets)
        spread = run_spread(keys[:, :n], offsets, centroids) if second_order else None
        # A coarse cluster's children begin with the finer cluster that begins where it does.
        children = offsets if finer is None else torch.searchsorted(finer, offsets)
        levels.append(ClusterLevel(centroids.to(keys.dtype), sizes.int(), children.int(), spread))
        finer = offsets
    return ClusteredKeys(keys, values, positions, tuple(levels), n)
