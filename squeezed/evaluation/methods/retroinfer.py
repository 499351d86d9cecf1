"""RetroInfer: near clusters exact, the next ones estimated, the rest dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from squeezed.evaluation.methods.base import (
    Asked,
    Choice,
    LayerContext,
    Method,
    keep_groups,
    keep_top,
    members,
    shared_scores,
)
from squeezed.evaluation.methods.clusters import segment_kmeans
from squeezed.evaluation.methods.multipole import Poles, build_poles


@dataclass(frozen=True)
class RetroInfer(Method):
    """Segments of the text are clustered by themselves, 16 keys a cluster on average. The highest clusters are the
    retrieval zone (exact), the next are the estimation zone (sum of values, weighted by the centroid's logit), the
    rest is dropped; sinks and window are its steady zone (Chen et al. 2025, arXiv 2505.02922).

    Attributes:
        segment: keys that are clustered together, 8,192 in the paper.
        keys_per_cluster: 16 in the paper; 0 takes 32 where the budget is below 0.1.
        estimated: share of the clusters that are estimated, 23.2% in the paper.
    """

    title: ClassVar[str] = "RetroInfer"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2505.02922"
    segment: int = 8192
    keys_per_cluster: int = 0
    estimated: float = 0.232

    def settings(self, budget: float) -> int:
        return self.keys_per_cluster or (16 if budget >= 0.1 else 32)

    def prepare_layer(self, layer: LayerContext, settings: int) -> Poles:
        labels, count = segment_kmeans(layer.inner_keys, settings, self.segment)
        return build_poles(layer, labels, count)

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        clusters = state.sizes.shape[1]
        estimated = round(self.estimated * clusters)
        logits = asked.times(state.keys)
        scores = shared_scores(logits, state.sizes.float().log())
        scores.masked_fill_((state.sizes == 0)[:, None, None, None], -1.0)
        centroids = layer.kv_heads * clusters * layer.row_bytes
        cost = centroids + layer.kv_heads * estimated * layer.row_bytes
        tokens = [layer.affordable(budget, cost) for budget in asked.budgets]
        exact = keep_groups(scores, state.sizes, tokens)
        rest = scores.masked_fill(exact, -1.0)
        zone = keep_top(rest, [estimated] * len(tokens)) & (rest >= 0)
        log_sizes = state.sizes.float().log()[:, None, None, None]
        estimates = (logits + log_sizes).masked_fill_(~zone, float("-inf"))
        read = centroids + zone.sum((0, 2, 4)) * float(layer.row_bytes)
        return Choice(members(exact, state.labels), read, estimates=estimates, stand_ins=state.values)
