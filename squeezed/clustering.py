"""Clustering the keys of all KV heads of a layer, and laying them out cluster by cluster (paper section 3.1, 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.config import BuildConfig
from squeezed.ops.layout import ClusteredKeys, ClusterLevel
from squeezed.storage import store

COARSENING = 5  # clusters of one level per cluster of the next coarser one (paper: 5% and 1% of the keys)
_SIMILARITIES = 2**24  # similarities held at once: 64 MB, whatever the context's length
_SEED_SAMPLES_PER_CLUSTER = 24  # k-means++ looks at no more keys than this; its cost is clusters times samples
_FLAT_CLUSTERS = 512  # more are found coarse to fine: a quarter of the time, 2% more inertia on real keys
_SETTLED = 1e-3  # stop when fewer than this share of keys changes cluster


def kmeans(vectors: Tensor, clusters: int, iterations: int = 20, weights: Tensor | None = None) -> Tensor:
    """Cosine k-means of all heads at once, deterministic.

    Lloyd's algorithm on normalised rows from k-means++ seeds; a cluster's direction is the weighted mean of its rows.
    Many clusters are found in two steps, see :func:`_coarse_to_fine`.

    Args:
        vectors: [heads, n, dim], any float dtype; computed in float32.
        clusters: number of clusters wanted, at most n.
        iterations: most Lloyd iterations.
        weights: [heads, n], how many keys each row stands for; 1 when None. Rows of weight 0 are padding.

    Returns:
        [heads, n] int64 labels below `clusters`. Some labels may be unused (duplicate rows); see `build_levels`.
    """
    rows = torch.nn.functional.normalize(vectors.float(), dim=-1)
    mass = torch.ones(rows.shape[:2], device=rows.device) if weights is None else weights.float()
    if clusters <= _FLAT_CLUSTERS:
        return _lloyd(rows, mass, clusters, iterations)
    return _coarse_to_fine(rows, mass, clusters, iterations)


def _lloyd(rows: Tensor, mass: Tensor, clusters: int, iterations: int) -> Tensor:
    heads, n, dim = rows.shape
    centres = _seed(rows, mass, clusters)
    labels = torch.zeros(heads, n, dtype=torch.int64, device=rows.device)
    for _ in range(iterations):
        previous = labels
        labels = _nearest(rows, centres)
        sums = torch.zeros_like(centres)
        sums.scatter_add_(1, labels.unsqueeze(-1).expand(-1, -1, dim), rows * mass.unsqueeze(-1))
        norms = sums.norm(dim=-1, keepdim=True)
        # An empty cluster keeps its centre: it may win keys again once its neighbours have moved.
        centres = torch.where(norms > 1e-12, sums / norms.clamp(min=1e-12), centres)
        if (labels != previous).float().mean() < _SETTLED:
            break
    return labels


def _coarse_to_fine(rows: Tensor, mass: Tensor, clusters: int, iterations: int) -> Tensor:
    """Cluster into about sqrt(clusters) groups, then each group by itself, into its share of the clusters.

    Flat k-means costs n * clusters per iteration, which grows with the square of the text; this costs
    n * 2 sqrt(clusters).
    """
    heads, n, _ = rows.shape
    groups = round(clusters**0.5)
    group_of = _lloyd(rows, mass, groups, iterations)
    labels = torch.empty_like(group_of)
    for head in range(heads):
        by_group = group_of[head].argsort(stable=True)
        counts = torch.bincount(group_of[head], minlength=groups).tolist()
        taken, first = 0, 0
        for count in counts:
            members = by_group[first : first + count]
            first += count
            if not count:
                continue
            # The running total is rounded, not each share, so that the shares add up to `clusters`.
            share = min(count, max(1, round(clusters * first / n) - taken))
            inner = _lloyd(rows[head, members][None], mass[head, members][None], share, iterations)
            labels[head, members] = inner[0] + taken
            taken += share
    # Small groups at the very end may have been given a cluster too many.
    return labels.clamp_(max=clusters - 1)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    heads, n, _ = rows.shape
    labels = torch.empty(heads, n, dtype=torch.int64, device=rows.device)
    step = max(1, _SIMILARITIES // (heads * centres.shape[1]))
    for first in range(0, n, step):
        block = slice(first, first + step)
        labels[:, block] = torch.bmm(rows[:, block], centres.transpose(1, 2)).argmax(-1)
    return labels


def _seed(rows: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) over evenly spaced rows, with a fixed random stream."""
    heads, n, dim = rows.shape
    samples = min(n, clusters * _SEED_SAMPLES_PER_CLUSTER)
    pick = torch.linspace(0, n - 1, samples, device=rows.device).long()
    candidates, weight = rows[:, pick], mass[:, pick].double()
    uniform = torch.rand(clusters, heads, 1, generator=torch.Generator().manual_seed(0)).double().to(rows.device)
    centres = rows.new_zeros(heads, clusters, dim)
    distance = torch.ones(heads, samples, dtype=torch.float64, device=rows.device)
    head = torch.arange(heads, device=rows.device)
    for cluster in range(clusters):
        cumulative = (distance * weight).cumsum(-1)
        # Once every candidate coincides with a centre all distances are 0 and the last candidate is taken again.
        chosen = torch.searchsorted(cumulative, uniform[cluster] * cumulative[:, -1:]).clamp(max=samples - 1)
        centre = candidates[head, chosen.squeeze(-1)]
        centres[:, cluster] = centre
        similarity = torch.bmm(candidates, centre.unsqueeze(-1)).squeeze(-1)
        distance = torch.minimum(distance, (1 - similarity.double()).clamp(min=0))
    return centres


def cluster_layer(keys: Tensor, values: Tensor, config: BuildConfig) -> ClusteredKeys:
    """Cluster one layer and lay its keys and values out cluster by cluster.

    Args:
        keys, values: [kv_heads, tokens, head_dim]; keys after RoPE, in text order.
        config: shares, levels, sinks, window.

    Returns:
        The layer's index; its tensors are new, so that the caller may free `keys` and `values`.
    """
    dim = keys.shape[-1]
    first, last = config.sinks, keys.shape[1] - config.window
    inner = keys[:, first:last]
    count = config.clusters_of(last - first)
    labels = [kmeans(inner, count, config.iterations)]
    for _ in range(1, config.levels):
        centroids, sizes = _means(inner, _compose(labels), count)
        count = max(1, round(count / COARSENING))
        labels.append(kmeans(centroids, count, config.iterations, weights=sizes))
    order = _nested_order(labels)

    def lay_out(rows: Tensor) -> Tensor:
        clustered = rows[:, first:last].gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
        return torch.cat([clustered, rows[:, :first], rows[:, last:]], dim=1)

    layer = ClusteredKeys(
        keys=lay_out(keys),
        values=lay_out(values),
        positions=(order + first).int(),
        levels=build_levels(inner, labels, order, config.second_order),
        clustered=last - first,
    )
    return store(layer, config)


def _compose(labels: list[Tensor]) -> Tensor:
    """Each key's cluster on the coarsest level so far."""
    members = labels[0]
    for coarser in labels[1:]:
        members = coarser.gather(1, members)
    return members


def _means(keys: Tensor, members: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean of each cluster's keys [heads, clusters, dim] float32 and their number [heads, clusters] int64."""
    heads, _, dim = keys.shape
    sizes = torch.zeros(heads, clusters, dtype=torch.int64, device=keys.device)
    sizes.scatter_add_(1, members, torch.ones_like(members))
    sums = torch.zeros(heads, clusters, dim, device=keys.device)
    sums.scatter_add_(1, members.unsqueeze(-1).expand(-1, -1, dim), keys.float())
    return sums / sizes.clamp(min=1).unsqueeze(-1), sizes


def _nested_order(labels: list[Tensor]) -> Tensor:
    """Text positions sorted by coarsest cluster, then the next finer, and so on; stable, [heads, n]."""
    order = torch.arange(labels[0].shape[1], device=labels[0].device).expand_as(labels[0])
    for depth in range(1, len(labels) + 1):
        members = _compose(labels[:depth])
        order = order.gather(1, members.gather(1, order).argsort(dim=1, stable=True))
    return order


def build_levels(
    keys: Tensor, labels: list[Tensor], order: Tensor, second_order: bool = False
) -> tuple[ClusterLevel, ...]:
    """Centroids (means of raw keys), sizes and CSR offsets of every level; empty clusters are dropped.

    Args:
        keys: [heads, n, dim] raw keys in text order.
        labels: finest first; labels[0] [heads, n] of keys, labels[l] of the clusters of level l - 1.
        order: [heads, n], the nested order of the layout.
        second_order: also keep each cluster's spread.
    """
    heads, n, dim = keys.shape
    ordered = keys.gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
    levels: list[ClusterLevel] = []
    finer: Tensor | None = None
    for depth in range(1, len(labels) + 1):
        members = _compose(labels[:depth]).gather(1, order)
        first_of_cluster = torch.ones_like(members, dtype=torch.bool)
        first_of_cluster[:, 1:] = members[:, 1:] != members[:, :-1]
        rank = first_of_cluster.long().cumsum(1) - 1  # 0, 1, 2, ... in layout order: unused labels vanish here
        centroids, sizes = _means(ordered, rank, int(rank[:, -1].max()) + 1)
        offsets = torch.zeros(heads, sizes.shape[1] + 1, dtype=torch.int64, device=keys.device)
        offsets[:, 1:] = sizes.cumsum(1)
        if finer is not None:
            # From offsets in keys to offsets in clusters of the finer level: that of the key where a cluster begins.
            past_the_end = finer[:, -1:] + 1
            offsets = torch.where(offsets < n, finer.gather(1, offsets.clamp(max=n - 1)), past_the_end)
        spread = _spread(ordered, rank, centroids, sizes) if second_order else None
        levels.append(ClusterLevel(centroids.to(keys.dtype), sizes.int(), offsets.int(), spread))
        finer = rank
    return tuple(levels)


def _spread(keys: Tensor, members: Tensor, centroids: Tensor, sizes: Tensor) -> Tensor:
    """Mean variance per dimension of each cluster's keys, [heads, clusters] float32."""
    residual = keys.float() - centroids.gather(1, members.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
    sums = torch.zeros(sizes.shape, device=keys.device)
    return sums.scatter_add_(1, members, residual.square().mean(-1)) / sizes.clamp(min=1)
