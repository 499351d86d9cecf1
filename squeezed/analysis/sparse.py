"""Cost of Squeezed Attention (arXiv 2411.09688), one-level and hierarchical, in place of dense attention.

Scores and work lists are not counted as memory operations: at 512K tokens, 32 KV heads and 5% centroids the scores are
3.4 MB of float32, which stays in the L2 cache between the kernel that writes and the kernel that reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from squeezed.analysis.cost import Cost, Operation, Precision, Step, attention_cost, dense_attention, linear_operations
from squeezed.analysis.shape import Layer, ModelShape


@dataclass(frozen=True)
class Squeeze:
    """How attention to the fixed context is squeezed; fractions are of the clustered keys. Defaults are the paper's."""

    sparsity: float = 0.9  # share of the clustered keys not attended
    centroids: float = 0.05
    coarse: float | None = None  # level-1 centroids; None for one level
    coarse_kept: float = 0.5  # share of the fine centroids evaluated after level 1
    window: int = 100  # observation window: last tokens of the fixed context, never clustered, always attended
    block: int = 512  # user-input queries that share one selection

    @property
    def name(self) -> str:
        return "squeezed" if self.coarse is None else "hierarchical"

    @property
    def evaluated(self) -> float:
        """Centroids compared with a query, as a fraction of the clustered keys."""
        return self.centroids if self.coarse is None else self.coarse + self.coarse_kept * self.centroids

    @property
    def stored(self) -> float:
        """Centroids kept in memory, as a fraction of the clustered keys."""
        return self.centroids + (self.coarse or 0)


def one_level(sparsity: float = 0.9) -> Squeeze:
    """The paper's one-level lookup: centroids are 5% of the keys, keys only."""
    return Squeeze(sparsity)


def hierarchical(sparsity: float = 0.9) -> Squeeze:
    """The paper's two-level lookup: level-1 centroids are 1% of the keys and leave half the fine ones to evaluate."""
    return Squeeze(sparsity, coarse=0.01)


def with_budget(budget: float, levels: int) -> Squeeze:
    """The setting whose centroids and kept keys read `budget` of a long context's KV cache."""
    setting = one_level() if levels <= 1 else hierarchical()
    sparsity = min(1.0, max(0.0, 1 - (budget - setting.evaluated / 2)))
    return Squeeze(sparsity, coarse=setting.coarse)


def kv_budget(squeeze: Squeeze, context: int | None = None) -> float:
    """Bytes read / bytes of the full KV cache of a fixed context; without `context`, its limit for long ones.

    Centroids are keys only, so they count half. The paper's settings give 0.125 for one level at sparsity 0.9. For two
    levels the exact count is 0.1175; the paper's 0.112 is what remains when level-1 centroids are left out (0.1125).
    """
    limit = 1 - squeeze.sparsity + squeeze.evaluated / 2
    if context is None:
        return limit
    window = min(squeeze.window, context)
    return (limit * (context - window) + window) / context


def squeezed_attention(layer: Layer, step: Step, precision: Precision, squeeze: Squeeze) -> list[Operation]:
    """The centroid lookup and the sparse attention of one full-attention layer; sliding windows stay dense.

    A block of user-input queries shares one selection, so centroids and important keys are read once per block.
    """
    clustered = step.fixed_context - squeeze.window
    if layer.window is not None or clustered <= 0:
        return [dense_attention(layer, step, precision)]
    blocks = math.ceil(step.tokens / squeeze.block)
    queries = step.batch * step.tokens * layer.q_heads * layer.head_dim
    looked_up = squeeze.evaluated * clustered
    lookup = Cost(
        flops=2 * queries * looked_up,
        read=queries * precision.activations
        + step.batch * blocks * looked_up * layer.kv_elements / 2 * precision.cache,
    )
    important = (1 - squeeze.sparsity) * clustered + squeeze.window
    own = Step(step.batch, step.tokens, step.past - step.fixed_context)
    fixed = Cost(
        flops=4 * queries * important,
        read=step.batch * blocks * important * layer.kv_elements * precision.cache,
    )
    sparse = fixed + attention_cost(layer, own, precision)
    levels = 1 if squeeze.coarse is None else 2
    # Kernels: score and select per level, then attend and merge.
    return [
        Operation("centroid lookup", "attention", layer.count, lookup, launches=2 * levels),
        Operation("sparse attention", "attention", layer.count, sparse, launches=2),
    ]


def squeezed_operations(model: ModelShape, step: Step, precision: Precision, squeeze: Squeeze) -> list[Operation]:
    """All operations of one forward pass with the full-attention layers squeezed."""
    attention = [op for layer in model.layers for op in squeezed_attention(layer, step, precision, squeeze)]
    return [*linear_operations(model, step, precision), *attention]
