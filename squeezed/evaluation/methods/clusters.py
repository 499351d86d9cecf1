"""Clusters of keys for the peers that need some: spherical k-means of many heads at once, fast rather than best."""

from __future__ import annotations

import torch
from torch import Tensor

_SIMILARITIES = 2**26


def spherical_kmeans(keys: Tensor, clusters: int, iterations: int = 10) -> Tensor:
    """Labels [H, n] of keys [H, n, D]: Lloyd's algorithm by cosine, from evenly spaced keys."""
    _, n, dim = keys.shape
    rows = torch.nn.functional.normalize(keys.float(), dim=-1)
    centres = rows[:, torch.linspace(0, n - 1, clusters, device=keys.device).long()]
    labels = _nearest(rows, centres)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).scatter_add_(1, labels.unsqueeze(-1).expand(-1, -1, dim), rows)
        norms = sums.norm(dim=-1, keepdim=True)
        centres = torch.where(norms > 1e-12, sums / norms.clamp(min=1e-12), centres)
        labels = _nearest(rows, centres)
    return labels


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    step = max(1, _SIMILARITIES // (rows.shape[0] * centres.shape[1]))
    found = [torch.bmm(part, centres.transpose(1, 2)).argmax(-1) for part in rows.split(step, dim=1)]
    return torch.cat(found, dim=1)


def means(vectors: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean of each cluster's vectors [H, K, D] float32, and sizes [H, K] int64."""
    heads, _, dim = vectors.shape
    sizes = torch.zeros(heads, clusters, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    sums = torch.zeros(heads, clusters, dim, device=labels.device)
    sums.scatter_add_(1, labels.unsqueeze(-1).expand(-1, -1, dim), vectors.float())
    return sums / sizes.clamp(min=1).unsqueeze(-1), sizes


def segment_kmeans(keys: Tensor, keys_per_cluster: int, segment: int) -> tuple[Tensor, int]:
    """Cluster every `segment` keys by themselves: labels [H, n] and the number of clusters of each head."""
    heads, n, dim = keys.shape
    whole = n // segment
    labels, first = [], 0
    if whole:
        count = max(1, segment // keys_per_cluster)
        inside = keys[:, : whole * segment].reshape(heads * whole, segment, dim)
        found = spherical_kmeans(inside, count).view(heads, whole, segment)
        found = found + torch.arange(whole, device=keys.device).view(1, -1, 1) * count
        labels.append(found.view(heads, -1))
        first = whole * count
    if n > whole * segment:
        rest = keys[:, whole * segment :]
        count = max(1, rest.shape[1] // keys_per_cluster)
        labels.append(spherical_kmeans(rest, count) + first)
        first += count
    return torch.cat(labels, dim=1), first
