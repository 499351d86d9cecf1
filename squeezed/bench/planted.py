"""A synthetic fixed context whose attention is as uneven as a real model's, made and clustered on the device.

Keys scatter around centres of very unequal popularity; every KV head looks at them with its own sharpness, so that one
threshold for all heads keeps a few percent of the keys in some and almost half in others, as calibrated models do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.ops.layout import ClusteredKeys, ClusterLevel


@dataclass(frozen=True)
class Planted:
    """Shape of a planted context; `sharpness` is the range over heads of the standard deviation of the logits."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    window: int = 100
    cluster_share: float = 0.05
    coarse_share: float | None = None
    sharpness: tuple[float, float] = (1.0, 6.0)
    iterations: int = 3
    dtype: torch.dtype = torch.bfloat16


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Index of the most similar centre (cosine) of each row."""
    unit = torch.nn.functional.normalize(centres, dim=1).T.contiguous()
    return torch.cat([(piece @ unit).argmax(1) for piece in rows.split(max(1, 2**28 // len(centres)))])


def _lloyd(rows: Tensor, clusters: int, iterations: int) -> Tensor:
    """Labels 0..k-1 without gaps after a few iterations from evenly spread rows."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    centres = rows[torch.linspace(0, len(rows) - 1, clusters, device=rows.device).long()]
    label = _nearest(rows, centres)
    for _ in range(iterations - 1):
        sums = torch.zeros(clusters, rows.shape[1], device=rows.device).index_add(0, label, rows.float())
        centres = torch.where(sums.any(1, keepdim=True), sums, centres.float()).to(rows.dtype)
        label = _nearest(rows, centres)
    return torch.unique(label, return_inverse=True)[1]


def _pad(parts: list[Tensor], repeat_last: bool = False) -> Tensor:
    longest = max(len(part) for part in parts)
    out = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:])
    for head, part in enumerate(parts):
        out[head, : len(part)] = part
        if repeat_last:
            out[head, len(part) :] = part[-1]
    return out


def _level(keys: Tensor, labels: list[Tensor], runs: list[Tensor]) -> ClusterLevel:
    """Means and sizes over keys, offsets over children. labels: per head, cluster of each (permuted) key."""
    centroids, sizes, offsets = [], [], []
    for head, (label, run) in enumerate(zip(labels, runs, strict=True)):
        size = torch.bincount(label, minlength=len(run))
        sums = torch.zeros(len(run), keys.shape[2], device=keys.device)
        sums.index_add_(0, label, keys[head, : len(label)].float())
        centroids.append((sums / size[:, None]).to(keys.dtype))
        sizes.append(size.int())
        offsets.append(torch.nn.functional.pad(run.cumsum(0), (1, 0)).int())
    return ClusterLevel(_pad(centroids), _pad(sizes), _pad(offsets, repeat_last=True))


def planted_keys(shape: Planted, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer in no order, [kv_heads, tokens, head_dim] each."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.kv_heads, shape.tokens, shape.head_dim)
    keys = torch.empty(size, dtype=shape.dtype, device=device)
    values = torch.empty(size, dtype=shape.dtype, device=device)
    for head in range(shape.kv_heads):
        # A real head's values have a common part: where attention is flat, its output is that, not nothing.
        values[head].normal_(generator=generator)
        values[head] += torch.randn(shape.head_dim, generator=generator, device=device).to(shape.dtype)
        keys[head] = _draw(shape, generator, device)
    return keys, values


def _draw(shape: Planted, generator: torch.Generator, device: str) -> Tensor:
    """One head's keys: centres of very unequal popularity, and keys around them."""
    centres = torch.randn(
        int(shape.tokens * shape.cluster_share) // 2, shape.head_dim, generator=generator, device=device
    )
    popularity = torch.randn(len(centres), generator=generator, device=device).exp()
    chosen = torch.multinomial(popularity, shape.tokens, replacement=True, generator=generator)
    drawn = torch.randn(shape.tokens, shape.head_dim, generator=generator, device=device).mul_(0.6)
    return drawn.add_(centres[chosen]).to(shape.dtype)


def planted_context(shape: Planted, device: str, seed: int = 0) -> ClusteredKeys:
    """Keys and values of one layer, clustered: [kv_heads, tokens, head_dim]."""
    clustered = shape.tokens - shape.window
    fine_count = int(clustered * shape.cluster_share)
    keys, values = planted_keys(shape, device, seed)
    fine_labels, fine_runs, coarse_labels, coarse_runs = [], [], [], []
    for head in range(shape.kv_heads):
        drawn = keys[head].clone()
        label = _lloyd(drawn[:clustered], fine_count, shape.iterations)
        fine = int(label.max()) + 1
        parent = torch.zeros(fine, dtype=torch.long, device=device)
        if shape.coarse_share:
            sums = torch.zeros(fine, shape.head_dim, device=device).index_add_(0, label, drawn[:clustered].float())
            parent = _lloyd(sums.to(shape.dtype), int(clustered * shape.coarse_share), shape.iterations)
        by_parent = parent.argsort(stable=True)
        rank = torch.empty_like(by_parent)
        rank[by_parent] = torch.arange(fine, device=device)
        label = rank[label]
        order = label.argsort(stable=True)
        keys[head, :clustered] = drawn[order]
        keys[head, clustered:] = drawn[clustered:]
        fine_labels.append(label[order])
        fine_runs.append(torch.bincount(label, minlength=fine))
        coarse_runs.append(torch.bincount(parent))
        coarse_labels.append(parent[by_parent][fine_labels[-1]])
    levels = [_level(keys, fine_labels, fine_runs)]
    if shape.coarse_share:
        levels.append(_level(keys, coarse_labels, coarse_runs))
    positions = torch.arange(clustered, dtype=torch.int32, device=device).expand(shape.kv_heads, -1)
    return ClusteredKeys(keys, values, positions, tuple(levels), clustered)


def copies(layer: ClusteredKeys, count: int) -> list[ClusteredKeys]:
    """The layer and count - 1 copies of it in other memory, so that no cache serves one from another's reads."""
    return [layer, *(_copy(layer) for _ in range(count - 1))]


def _copy(layer: ClusteredKeys) -> ClusteredKeys:
    levels = tuple(
        replace(level, centroids=level.centroids.clone(), sizes=level.sizes.clone(), offsets=level.offsets.clone())
        for level in layer.levels
    )
    return replace(layer, keys=layer.keys.clone(), values=layer.values.clone(), levels=levels)


def sharpness_of_heads(shape: Planted, device: torch.device) -> Tensor:
    """[kv_heads] standard deviation of the logits: the whole range of `shape.sharpness`, in no order."""
    low, high = shape.sharpness
    spread = low * (high / low) ** (torch.arange(shape.kv_heads, device=device) / max(1, shape.kv_heads - 1))
    return spread[torch.randperm(shape.kv_heads, generator=torch.Generator().manual_seed(7)).to(device)]


def planted_queries(shape: Planted, layer: ClusteredKeys, batch: int, queries: int, seed: int) -> Tensor:
    """[B, Hq, M, D]: each head with its own sharpness; its M queries look in related directions."""
    device = layer.keys.device
    generator = torch.Generator(device).manual_seed(seed)
    spread = sharpness_of_heads(shape, device).repeat_interleave(shape.q_heads // shape.kv_heads)
    size = (batch, shape.q_heads, queries, shape.head_dim)
    common = torch.randn(batch, shape.q_heads, 1, shape.head_dim, generator=generator, device=device)
    own = torch.randn(size, generator=generator, device=device)
    direction = own if queries == 1 else common + 0.7 * own
    sample = layer.keys[:, : layer.clustered : max(1, layer.clustered // 4096)].float()
    sample = sample.repeat_interleave(shape.q_heads // shape.kv_heads, 0)
    deviation = (direction @ sample.transpose(-1, -2)).std(-1, keepdim=True) * shape.head_dim**-0.5
    return (direction / deviation * spread[:, None, None]).to(shape.dtype)
