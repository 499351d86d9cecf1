"""Cascading cache: recent keys densely, older ones ever more thinly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method, scaled_products


@dataclass(frozen=True)
class Cascade(Method):
    """Sub-caches of equal size; each takes half of the keys that leave the one before, preferring those with more
    attention so far (Willette et al. 2024, arXiv 2406.17808). Sub-cache i thus holds one of 2^i consecutive keys.

    The attention so far is that of the observation window's queries, the ones that a prefill keeps; the paper averages
    over all queries with exponential decay. What has been dropped stays dropped, whatever the question.
    """

    title: ClassVar[str] = "cascading cache"
    paper: ClassVar[str] = "Willette et al. 2024, arXiv 2406.17808"
    caches: int = 4

    def settings(self, budget: float) -> float:
        return budget

    def prepare_layer(self, layer: LayerContext, settings: float) -> Tensor:
        """[Hk, n] bool, what is still there."""
        query = layer.queries.view(layer.kv_heads, 1, -1, *layer.queries.shape[1:])
        weights = scaled_products(query, layer.inner_keys, layer.scale).softmax(-1).mean((1, 2, 3))
        return retained(weights, layer.affordable(settings, 0), self.caches)

    def choose(self, state: Any, asked: Asked) -> Choice:
        return Choice(state[:, None, None, None].expand(-1, len(asked.budgets), 1, asked.query.shape[3], -1))


def retained(scores: Tensor, tokens: int, caches: int) -> Tensor:
    """Which of the keys [H, n] (text order, scored) a cascade of `tokens` keys in all still holds, as bool."""
    heads, count = scores.shape
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if tokens >= count:
        return ~kept
    end = count
    for level, size in enumerate(cache_sizes(count, tokens, caches)):
        stride = 2**level
        blocks = min(size, end // stride)
        begin = end - blocks * stride
        best = scores[:, begin:end].view(heads, blocks, stride).argmax(-1)
        kept.scatter_(1, begin + torch.arange(blocks, device=scores.device) * stride + best, True)
        end = begin
    return kept


def cache_sizes(count: int, tokens: int, caches: int) -> list[int]:
    """Keys in each sub-cache: alike, or in a short text such that together they reach just back to its beginning."""
    used = next((c for c in range(2, caches + 1) if tokens * (2**c - 1) >= c * count), caches)
    last = 2 ** (used - 1)
    if tokens * (2 * last - 1) < used * count:
        return [tokens // caches] * caches
    # Sizes a, ..., a, b with their sum given, and the sum of size times stride the whole text.
    size = (tokens * last - count) // ((used - 1) * last - (last - 1))
    return [*[size] * (used - 1), tokens - size * (used - 1)]
