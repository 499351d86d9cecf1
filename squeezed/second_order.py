"""How much a cluster's spread says about its keys' weight, head by head.

For keys that scatter evenly, log E[exp(s q.k)] exceeds s q.C by s^2 |q|^2 v / 2 with v the mean variance per dimension.
Real keys scatter least where queries are long: on Qwen2.5-Coder-0.5B the plain term doubles the error of the attention
output, on SmolLM2 it takes 15% off. So each head's spread is multiplied by what fits its own queries best.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeezed.clustering.steps import run_means
from squeezed.ops.layout import ClusteredKeys, from_eight_bits

_QUERIES = 8  # of each query head; the coefficient is one number per KV head
_LARGEST = 1.5


def fit_spread(layer: ClusteredKeys, queries: Tensor, scale: float) -> ClusteredKeys:
    """The layer with each head's spread multiplied by its least-squares coefficient, 0 to 1.5.

    Args:
        layer: with a spread on every level; otherwise it is returned as it is.
        queries: [q_heads, m, head_dim] after RoPE, of the kind that will be asked; 8 evenly spaced ones are used.
        scale: the attention module's scaling.
    """
    if any(level.spread is None for level in layer.levels):
        return layer
    pick = torch.linspace(0, queries.shape[1] - 1, min(_QUERIES, queries.shape[1])).long().to(queries.device)
    kv_heads, _, dim = layer.keys.shape
    grouped = queries[:, pick].reshape(kv_heads, -1, dim).float()
    coefficients = torch.stack([_coefficients(layer, head, grouped[head], scale) for head in range(kv_heads)], 1)
    levels = tuple(
        replace(level, spread=None if level.spread is None else level.spread * coefficient.unsqueeze(-1))
        for level, coefficient in zip(layer.levels, coefficients.unbind(0), strict=True)
    )
    return replace(layer, levels=levels)


def _coefficients(layer: ClusteredKeys, head: int, query: Tensor, scale: float) -> Tensor:
    """[levels] of one head, from its queries [m, head_dim].

    Clusters count by the square root of their attention: the many that no query looks at would drown the few that
    matter, and those alone are too few.
    """
    logits = scale * (query @ _rows(layer, layer.keys[:, : layer.clustered], head).T)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    stretch = 0.5 * scale**2 * query.square().sum(-1, keepdim=True)
    weights = weights.T.contiguous().unsqueeze(0)
    found = []
    for level in layer.levels:
        sizes = level.sizes[head]
        runs = torch.nn.functional.pad(sizes.long().cumsum(0), (1, 0))
        mean = run_means(weights, None, runs.unsqueeze(0))[0].T  # 0 for padding, which then counts for nothing
        mass = mean * sizes
        excess = mean.clamp(min=1e-37).log() + top - scale * (query @ _rows(layer, level.centroids, head).T)
        assert level.spread is not None
        term = stretch * level.spread[head]
        importance = (mass / mass.sum(-1, keepdim=True)).sqrt() * (sizes > 1)
        found.append((importance * term * excess).sum() / (importance * term.square()).sum().clamp(min=1e-12))
    return torch.stack(found).clamp(0.0, _LARGEST)


def _rows(layer: ClusteredKeys, rows: Tensor, head: int) -> Tensor:
    """Keys or centroids of one head, [n, head_dim] float32."""
    if layer.scales is None:
        return rows[head].float()
    return from_eight_bits(rows[head : head + 1], *(scale[head : head + 1] for scale in layer.scales[:2]))[0]
