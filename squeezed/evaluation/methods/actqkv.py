"""ActQKV: pages looked up with a probe query that the unusual recent tokens dominate."""

from __future__ import annotations

from collections.abc import Sequence
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


class ProbedPages(NamedTuple):
    """Mean keys [Hk, P, D], sizes [Hk, P], labels [Hk, n], and this layer's part of the budget (1 on average)."""

    means: Tensor
    sizes: Tensor
    labels: Tensor
    part: float


@dataclass(frozen=True)
class ActQKV(Method):
    """Pages of keys are looked up not with the token's own query but with a probe query: the recent queries, weighted
    by their activation bias, how far each lies from their mean; so anchor tokens count most. Layers whose attention is
    spread over more pages get more of the budget (Xiao et al. 2025, arXiv 2502.13542).

    Made from the paper's description: bias is the squared distance to the mean in units of the variance, weights are
    its softmax; density is the effective number of pages (exponential of the entropy) over the observation window.

    Attributes:
        page: keys per page.
        recent: own tokens that the probe is made of, the token itself included.
    """

    title: ClassVar[str] = "ActQKV"
    paper: ClassVar[str] = "Xiao et al. 2025, arXiv 2502.13542"
    page: int = 16
    recent: int = 16

    def prepare(self, layers: Sequence[LayerContext], settings: None) -> list[ProbedPages]:
        built, spread = [], []
        for layer in layers:
            count = layer.count
            pages = -(-count // self.page)
            labels = torch.arange(count, device=layer.keys.device) // self.page
            sizes = torch.bincount(labels, minlength=pages)
            sums = torch.zeros(layer.kv_heads, pages, layer.keys.shape[-1], device=layer.keys.device)
            sums.index_add_(1, labels, layer.inner_keys.float())
            means = (sums / sizes.unsqueeze(-1)).to(layer.keys.dtype)
            query = layer.queries.view(layer.kv_heads, 1, -1, *layer.queries.shape[1:])
            weights = shared_scores(scaled_products(query, means, layer.scale))
            spread.append((-(weights * weights.clamp(min=1e-12).log()).sum(-1)).exp().mean())
            built.append((means, sizes.expand(layer.kv_heads, -1), labels.expand(layer.kv_heads, -1)))
        density = torch.stack(spread)
        parts = (density / density.mean()).tolist()
        return [ProbedPages(*pages, part) for pages, part in zip(built, parts, strict=True)]

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        metadata = float(layer.kv_heads * state.means.shape[1] * layer.row_bytes)
        tokens = []
        for budget in asked.budgets:
            count = layer.affordable(budget, metadata)
            tokens.append(count if budget >= 1 else min(layer.count, int(count * state.part)))
        probe = probe_query(asked.history, asked.places, self.recent)
        scores = shared_scores(scaled_products(probe.to(state.means.dtype), state.means, layer.scale))
        return Choice(members(keep_groups(scores, state.sizes, tokens), state.labels), metadata)


def probe_query(history: Tensor, places: Tensor, recent: int) -> Tensor:
    """Each token's probe query [Hk, B, G, M, D] float32.

    Args:
        history: [Hk, B, G, P, D], own queries.
        places: [B, M], each token's place in them.
        recent: tokens that the probe is made of, fewer at the beginning.
    """
    at = places.unsqueeze(-1) - torch.arange(recent, device=places.device)  # [B, M, recent]
    there = (at >= 0)[None, :, None, :, :, None]
    flat = at.clamp(min=0).flatten(1)[None, :, None, :, None].expand(*history.shape[:3], -1, history.shape[-1])
    window = history.gather(3, flat).float().view(*history.shape[:3], *at.shape[1:], history.shape[-1])
    count = there.sum(4, keepdim=True)
    mean = (window * there).sum(4, keepdim=True) / count
    distance = ((window - mean).square() * there).sum(-1, keepdim=True)
    bias = distance / (distance.sum(4, keepdim=True) / count).clamp(min=1e-12)
    weights = bias.masked_fill(~there, float("-inf")).softmax(4)
    return (window * weights).sum(4)
