"""QUEST: pages of keys, chosen by a bound on their highest logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from squeezed.evaluation.methods.base import (
    Asked,
    Choice,
    LayerContext,
    Method,
    keep_groups,
    members,
    scaled_products,
    shared_scores,
)


class Pages(NamedTuple):
    """Element-wise bounds of each page's keys: low, high [Hk, P, D]; sizes [Hk, P]; labels [Hk, n]."""

    low: Tensor
    high: Tensor
    sizes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Quest(Method):
    """Per page of consecutive keys the element-wise minimum and maximum; a page's score is the highest logit that any
    key between them could have (Tang et al. 2024, arXiv 2406.10774). The highest pages are read whole.

    The paper's models have one KV head per query head. Here the heads of a group share their pages, by the mean of
    their softmaxes over pages, or `per_head` every query head takes its own and a KV head reads the union.

    Attributes:
        page: keys per page, 16 in the paper; 0 takes larger pages where the bounds alone would eat half of the budget.
    """

    title: ClassVar[str] = "QUEST"
    paper: ClassVar[str] = "Tang et al. 2024, arXiv 2406.10774"
    page: int = 0
    per_head: bool = False

    def settings(self, budget: float) -> int:
        if self.page:
            return self.page
        return next((page for page in (16, 32, 64) if 1 / page <= budget / 2), 64)

    def prepare_layer(self, layer: LayerContext, settings: int) -> Pages:
        keys, count = layer.inner_keys, layer.count
        pages = -(-count // settings)
        # The last page is filled up with its own last key, which changes no bound.
        filled = torch.cat([keys, keys[:, -1:].expand(-1, pages * settings - count, -1)], dim=1)
        paged = filled.view(layer.kv_heads, pages, settings, -1)
        labels = torch.arange(count, device=keys.device) // settings
        sizes = torch.bincount(labels, minlength=pages)
        heads = layer.kv_heads
        return Pages(paged.amin(2), paged.amax(2), sizes.expand(heads, -1), labels.expand(heads, -1))

    def bounds(self, state: Pages, query: Tensor, scale: float) -> Tensor:
        """Upper bound of the logits of each page's keys, [Hk, B, G, M, P] float32."""
        above = scaled_products(query.clamp(min=0), state.high, scale)
        return above.add_(scaled_products(query.clamp(max=0), state.low, scale))

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        metadata = 2.0 * state.low.shape[1] * layer.kv_heads * layer.row_bytes
        tokens = [layer.affordable(budget, metadata) for budget in asked.budgets]
        bounds = self.bounds(state, asked.query, layer.scale)
        if self.per_head:
            # A KV head reads what any of its query heads wants, so each may want a part only.
            tokens = [count // bounds.shape[2] if count < layer.count else count for count in tokens]
            pages = keep_groups(bounds.softmax(-1), state.sizes, tokens)
        else:
            pages = keep_groups(shared_scores(bounds), state.sizes, tokens)
        return Choice(members(pages, state.labels), metadata)
