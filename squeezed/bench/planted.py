"""A synthetic fixed context whose attention is as uneven as a real model's, made and clustered on the device.

Keys scatter around centres of very unequal popularity; every KV head looks at them with its own sharpness, so that one
threshold for all heads keeps a few percent of the keys in some and almost half in others, as calibrated models do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.clustering import COARSENING, cluster_layer
from squeezed.config import BuildConfig
from squeezed.errors import InputError
from squeezed.ops.layout import ClusteredKeys


@dataclass(frozen=True)
class Planted:
    """Shape of a planted context.

    Attributes:
        cluster_share: clusters as a share of the keys.
        coarse_share: the same of a second level, a fifth of the first one's; None is one level.
        sharpness: range over heads of the standard deviation of the logits.
        iterations: passes of k-means.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    window: int = 100
    cluster_share: float = 0.05
    coarse_share: float | None = None
    sharpness: tuple[float, float] = (1.0, 6.0)
    iterations: int = 8
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.tokens < 1000:
            raise InputError(f"context is {self.tokens} tokens: expected at least 1000 for a meaningful time")
        for name in ("q_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}: expected at least 1")
        if self.q_heads % self.kv_heads:
            raise InputError(
                f"q-heads is {self.q_heads} and kv-heads {self.kv_heads}: expected equal groups per KV head"
            )
        expected = self.cluster_share / COARSENING
        if self.coarse_share is not None and abs(self.coarse_share - expected) > 1e-9:
            raise InputError(f"coarse share is {self.coarse_share}: expected a fifth of the finer one, {expected:g}")


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
    """Keys and values of one layer, clustered as the paper does: [kv_heads, tokens, head_dim]."""
    config = BuildConfig(
        clusters=shape.cluster_share,
        levels=2 if shape.coarse_share else 1,
        window=shape.window,
        sinks=0,
        second_order=False,
        compensate=False,
        centroid_bits=16,
        iterations=shape.iterations,
    )
    return cluster_layer(*planted_keys(shape, device, seed), config)


def copies(layer: ClusteredKeys, count: int) -> list[ClusteredKeys]:
    """The layer and count - 1 copies of it in other memory, so that no cache serves one from another's reads."""
    return [layer, *(_copy(layer) for _ in range(count - 1))]


def with_clusters_copied(layers: list[ClusteredKeys], count: int) -> list[ClusteredKeys]:
    """At least `count` layers: further ones share keys and values with these, but have clusters of their own.

    A cache may keep some of a layer's clusters until they are read again, if few layers are read in turn: in a model
    as many others come between as it has layers. Keys are too many to be kept.
    """
    shared = (layers[number % len(layers)] for number in range(len(layers), count))
    return [*layers, *(_with_clusters_copied(layer) for layer in shared)]


def _with_clusters_copied(layer: ClusteredKeys) -> ClusteredKeys:
    def copied(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    levels = tuple(
        replace(
            level,
            centroids=level.centroids.clone(),
            sizes=level.sizes.clone(),
            offsets=level.offsets.clone(),
            spread=copied(level.spread),
            values=copied(level.values),
        )
        for level in layer.levels
    )
    return replace(layer, levels=levels)


def _copy(layer: ClusteredKeys) -> ClusteredKeys:
    return replace(_with_clusters_copied(layer), keys=layer.keys.clone(), values=layer.values.clone())


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
