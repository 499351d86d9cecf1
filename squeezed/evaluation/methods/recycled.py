"""Recycled Attention: full attention now and then, its highest keys in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from squeezed.evaluation.methods.base import Asked, Choice, Method, keep_top, scaled_products, shared_scores


@dataclass(frozen=True)
class Recycled(Method):
    """Every S-th token attends to everything; the others only to the keys that the last such token weighed most
    (Xu et al. 2024, arXiv 2411.05787). The first own token is such a token.

    Attributes:
        stride: S; 0 spends half of the budget on the full steps.
    """

    title: ClassVar[str] = "Recycled"
    paper: ClassVar[str] = "Xu et al. 2024, arXiv 2411.05787"
    stride: int = 0

    def settings(self, budget: float) -> int:
        return self.stride or max(1, math.ceil(2 / budget))

    def prepare_layer(self, layer: Any, settings: int) -> int:
        return settings

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer, stride, queries = asked.layer, state, asked.query.shape[3]
        places = asked.places
        # The full steps that these tokens go back to: at most one before the first of them, and those among them.
        steps = queries // stride + 2
        first = places[:, :1] // stride
        at = ((first + torch.arange(steps, device=places.device)) * stride).clamp(max=asked.history.shape[3] - 1)
        index = at[None, :, None, :, None].expand(*asked.history.shape[:3], -1, asked.history.shape[-1])
        logits = scaled_products(asked.history.gather(3, index), layer.inner_keys, layer.scale)
        own = 1 / stride
        tokens = [
            layer.affordable((budget - own) / (1 - own) if budget < 1 and stride > 1 else 1, 0)
            for budget in asked.budgets
        ]
        top = keep_top(shared_scores(logits), tokens)  # [Hk, B, 1, steps, n]
        step = (places // stride - first)[None, :, None, :, None].expand(*top.shape[:3], -1, top.shape[-1])
        full = (places % stride == 0)[None, :, None, :, None]
        return Choice(top.gather(3, step) | full)
