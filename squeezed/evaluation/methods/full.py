"""Full attention: every key of the fixed context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from squeezed.evaluation.methods.base import Asked, Choice, Method


@dataclass(frozen=True)
class Full(Method):
    """Dense attention, budget 1."""

    title: ClassVar[str] = "full attention"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    def choose(self, state: Any, asked: Asked) -> Choice:
        return Choice(kept=None)
