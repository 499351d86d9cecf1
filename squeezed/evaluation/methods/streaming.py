"""Sinks and the most recent keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from squeezed.evaluation.methods.base import Asked, Choice, Method, per_row


@dataclass(frozen=True)
class Streaming(Method):
    """StreamingLLM: the first tokens and the last ones that the budget allows (Xiao et al. 2023, arXiv 2309.17453)."""

    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        first = [layer.count - layer.affordable(budget, 0) for budget in asked.budgets]
        begin = per_row(first, asked.query.device)
        kept = torch.arange(layer.count, device=asked.query.device) >= begin
        return Choice(kept.expand(layer.kv_heads, -1, 1, asked.query.shape[3], -1))
