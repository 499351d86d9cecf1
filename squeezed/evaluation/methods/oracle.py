"""What exact scores would choose: the bound on every method that only drops keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from squeezed.evaluation.methods.base import Asked, Choice, Method, keep_top


@dataclass(frozen=True)
class Oracle(Method):
    """Per KV head the keys of highest exact attention weight, averaged over the heads of the group. It has to read
    every key to choose; that is not counted, so it is a bound, not a method."""

    title: ClassVar[str] = "exact top-k (oracle)"
    paper: ClassVar[str] = "bound; no paper"
    bound: ClassVar[bool] = True

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        weights = asked.all_logits.softmax(-1)[..., layer.inner].mean(2, keepdim=True)
        return Choice(keep_top(weights, [layer.affordable(budget, 0) for budget in asked.budgets]))
