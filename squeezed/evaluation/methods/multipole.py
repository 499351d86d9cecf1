"""Multipole Attention: clusters that are not read are stood in for by their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from squeezed.evaluation.methods.base import (
    Asked,
    Choice,
    LayerContext,
    Method,
    keep_groups,
    members,
    shared_scores,
)
from squeezed.evaluation.methods.clusters import means, spherical_kmeans


class Poles(NamedTuple):
    """Clusters: centroids [Hk, K, D] of keys and values in the keys' dtype, sizes [Hk, K], labels [Hk, n]."""

    keys: Tensor
    values: Tensor
    sizes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Multipole(Method):
    """k-means clusters of keys, scored by their centroid; the highest are attended exactly, every other one contributes
    N_i exp(s q.C_i) times its mean value (Hooper et al. 2025, arXiv 2506.13059).

    Attributes:
        keys_per_cluster: 0 chooses by the budget: centroids of keys and values take at most about a third of it.
    """

    title: ClassVar[str] = "Multipole"
    paper: ClassVar[str] = "Hooper et al. 2025, arXiv 2506.13059"
    keys_per_cluster: float = 0.0

    def settings(self, budget: float) -> float:
        return self.keys_per_cluster or next((size for size in (12.0, 16.0, 32.0) if 1 / size <= budget / 3), 64.0)

    def prepare_layer(self, layer: LayerContext, settings: float) -> Poles:
        count = max(1, min(layer.count, round(layer.count / settings)))
        labels = spherical_kmeans(layer.inner_keys, count)
        return build_poles(layer, labels, count)

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        used = state.sizes > 0
        centroids = int(used.shape[0] * used.shape[1])
        logits = asked.times(state.keys)
        log_sizes = state.sizes.float().log()
        # Every centroid of keys is read, and of values those of the clusters that are not.
        cost = 2.0 * centroids * layer.row_bytes
        tokens = [layer.affordable(budget, cost) for budget in asked.budgets]
        exact = keep_groups(shared_scores(logits, log_sizes), state.sizes, tokens)
        left = used[:, None, None, None] & ~exact
        estimates = (logits + log_sizes[:, None, None, None]).masked_fill_(~left, float("-inf"))
        read = centroids * layer.row_bytes + left.sum((0, 2, 4)) * float(layer.row_bytes)
        return Choice(members(exact, state.labels), read, estimates=estimates, stand_ins=state.values)


def build_poles(layer: LayerContext, labels: Tensor, count: int) -> Poles:
    """Centroids of keys and values of given clusters."""
    keys, sizes = means(layer.inner_keys, labels, count)
    values, _ = means(layer.inner_values, labels, count)
    return Poles(keys.to(layer.keys.dtype), values.to(layer.values.dtype), sizes, labels)
