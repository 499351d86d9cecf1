"""Squeezed Attention, by the product itself: a FixedContext is built and asked, nothing is computed here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from squeezed.cache import FixedLayer, Read
from squeezed.calibration import coarse_sparsity
from squeezed.config import PRESETS, BuildConfig
from squeezed.context import FixedContext
from squeezed.evaluation.methods.base import Method

# Clusters as a share of the keys, by budget: what erred least on SmolLM2 at 3.9K tokens of essays, within the budget.
_CLUSTERS = ((0.08, 0.025), (0.15, 0.05), (math.inf, 0.1))
_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)


@dataclass(frozen=True)
class Squeezed(Method):
    """Hooper et al. 2024 (arXiv 2411.09688), and what this package adds to it: the preset and its options say which.

    A budget becomes a sparsity: what is left after window and centroids, as the cache itself counts them, is kept.
    Where the configuration leaves the number of clusters open, it follows the budget too: centroids are part of it.

    Attributes:
        config: how contexts are built.
        name: for titles.
    """

    title: ClassVar[str] = "Squeezed"
    paper: ClassVar[str] = "Hooper et al. 2024, arXiv 2411.09688"
    config: BuildConfig = field(default_factory=BuildConfig)
    name: str = "Squeezed (ours)"

    def settings(self, budget: float) -> BuildConfig:
        if self.config.clusters is not None:
            return self.config
        share = next(share for below, share in _CLUSTERS if budget < below)
        return replace(self.config, clusters=share)

    def choose(self, state: Any, asked: Any) -> Any:
        raise TypeError("the product chooses for itself; see squeezed.evaluation.rows")


def sparsity_for(context: FixedContext, budget: float, recalls: bool) -> float:
    """The sparsity at which a query token is expected to read that share of the full KV; 1 if there is none."""
    costs = [expected_budget(context, sparsity, recalls) for sparsity in _GRID]
    if budget >= costs[0] or budget >= 1:
        return 0.0
    for i in range(1, len(_GRID)):
        if costs[i] <= budget:
            part = (costs[i - 1] - budget) / max(costs[i - 1] - costs[i], 1e-12)
            return _GRID[i - 1] + part * (_GRID[i] - _GRID[i - 1])
    return 1.0


def expected_budget(context: FixedContext, sparsity: float, recalls: bool) -> float:
    """Share of the full KV read if exactly that share of the keys is left out, as a cache's own accounting has it.

    `recalls`: the token is an answer's, and recalled keys are read although they are left out.
    """
    index = context.squeezed_layers[len(context.squeezed_layers) // 2]
    levels = len(index.levels)
    kept = torch.zeros(levels, 1, index.keys.shape[0])
    kept[0] = (1 - sparsity) * index.clustered
    recall = context.cache(sparsity).fixed_layers[0].recall
    if recalls and recall is not None:
        kept[0] += sparsity * recall.most
    for level in range(1, levels):
        survivors = 1 - coarse_sparsity(sparsity, level, levels)
        kept[level] = survivors * (index.levels[level - 1].sizes > 0).sum(1)
    layer = FixedLayer(index, context.cache(0.0).fixed_layers[0].selection, context.tokens)
    layer.reads.append(Read(slice(None), False, kept, 1))
    return layer.usage().kv_budget


def presets() -> dict[str, Squeezed]:
    """Our methods by name: both presets, with one and two levels."""
    best, paper = PRESETS["best"], PRESETS["paper"]
    return {
        "squeezed": Squeezed(best, "Squeezed (ours)"),
        "squeezed-2": Squeezed(replace(best, levels=2), "Squeezed, hierarchical (ours)"),
        "squeezed-compact": Squeezed(PRESETS["compact"], "Squeezed, 8-bit keys (ours)"),
        "squeezed-paper": Squeezed(paper, "Squeezed (paper)"),
        "squeezed-paper-2": Squeezed(replace(paper, levels=2), "Squeezed, hierarchical (paper)"),
    }
