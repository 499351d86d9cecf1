"""FLOPs and memory operations (bytes) of one forward pass of a decoder, operation by operation.

Conventions, the same as those of the roofline literature and of torch's FLOP counter:

- a multiply-add is two FLOPs; softmax, norms, activations, rotary embedding and bias additions are not counted;
- bytes are what each operation must move at least once: its weights, its inputs and its outputs, as if every operation
  were one fused kernel that keeps its intermediates on chip (attention as FlashAttention does: scores never stored);
- element-wise operations are taken as fused into their neighbours and move nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from squeezed.analysis.shape import Layer, Matrix, ModelShape

Kind = Literal["linear", "attention"]


@dataclass(frozen=True)
class Precision:
    """Bytes per element of weights, KV cache (centroids included) and activations."""

    weights: float = 2
    cache: float = 2
    activations: float = 2


@dataclass(frozen=True)
class Step:
    """One forward pass: each of `batch` sequences adds `tokens` to the `past` tokens already in its KV cache.

    `fixed` of the past tokens are the fixed context, the part that Squeezed Attention clusters (None: all of them).
    `logits` positions per sequence go through the LM head (generation needs the last one only).
    """

    batch: int
    tokens: int
    past: int = 0
    fixed: int | None = None
    logits: int = 1

    @property
    def fixed_context(self) -> int:
        return self.past if self.fixed is None else self.fixed


def prefill(batch: int, length: int) -> Step:
    """Prefill of `length` tokens from nothing."""
    return Step(batch, length)


def decode(batch: int, context: int) -> Step:
    """One generated token that attends to `context` cached tokens and to itself."""
    return Step(batch, 1, context)


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes read and bytes written."""

    flops: float = 0
    read: float = 0
    written: float = 0

    @property
    def bytes(self) -> float:
        """Memory operations, in bytes."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.read * times, self.written * times)


@dataclass(frozen=True)
class Operation:
    """`count` equal operations, one per layer of a kind; `cost` and `launches` (kernels) are those of one of them."""

    name: str
    kind: Kind
    count: int
    cost: Cost
    launches: int = 1


def expected_experts(experts: int, active: int, tokens: int) -> float:
    """Distinct experts that `tokens` touch in expectation, each choosing `active` of `experts` evenly on its own.

    An expert is missed by one token with probability 1 - active / experts. Real routers are uneven and touch fewer.
    """
    if experts == active:
        return experts
    return experts * (1 - (1 - active / experts) ** tokens)


def linear_cost(matrix: Matrix, rows: int, precision: Precision, touched: float | None = None) -> Cost:
    """A matrix applied to `rows` tokens; `touched` distinct experts are read (default: their expected number)."""
    products = rows * matrix.active
    copies = expected_experts(matrix.experts, matrix.active, rows) if touched is None else touched
    return Cost(
        flops=2 * products * matrix.inputs * matrix.outputs,
        read=copies * matrix.elements * precision.weights + products * matrix.inputs * precision.activations,
        written=products * matrix.outputs * precision.activations,
    )


def causal_pairs(layer: Layer, step: Step) -> int:
    """Query-key pairs of one sequence inside the causal (and window) mask: the work of a kernel that skips the rest."""
    window = layer.window
    if window is None or step.past + step.tokens <= window:
        return step.tokens * step.past + step.tokens * (step.tokens + 1) // 2
    growing = max(0, min(step.tokens, window - step.past))  # queries that do not fill the window yet
    return growing * step.past + growing * (growing + 1) // 2 + (step.tokens - growing) * window


def computed_pairs(layer: Layer, step: Step) -> int:
    """Query-key pairs of one sequence that a kernel computes if it masks the scores afterwards (torch's eager path)."""
    return step.tokens * visible_keys(layer, step)


def visible_keys(layer: Layer, step: Step) -> int:
    """Keys of one sequence that at least one of the queries sees; a window holds the query's own token too."""
    past = step.past if layer.window is None else min(step.past, layer.window - 1)
    return past + step.tokens


def attention_cost(
    layer: Layer, step: Step, precision: Precision, pairs: Callable[[Layer, Step], int] = causal_pairs
) -> Cost:
    """Dense attention of one layer: the two products q.k and p.v, queries, keys and values read, outputs written."""
    queries = step.batch * step.tokens * layer.q_heads * layer.head_dim
    return Cost(
        flops=4 * step.batch * layer.q_heads * layer.head_dim * pairs(layer, step),
        read=queries * precision.activations
        + step.batch * visible_keys(layer, step) * layer.kv_elements * precision.cache,
        written=queries * precision.activations,
    )


def linear_operations(model: ModelShape, step: Step, precision: Precision) -> list[Operation]:
    """Every matrix product of the pass but attention's own two."""
    rows = step.batch * step.tokens
    operations = [
        Operation(matrix.part, "linear", layer.count, linear_cost(matrix, rows, precision))
        for layer in model.layers
        for matrix in layer.matrices
    ]
    head = linear_cost(model.head, step.batch * step.logits, precision)
    return [*operations, Operation("LM head", "linear", 1, head)]


def dense_operations(
    model: ModelShape, step: Step, precision: Precision, pairs: Callable[[Layer, Step], int] = causal_pairs
) -> list[Operation]:
    """All operations of one forward pass with dense attention."""
    attention = [dense_attention(layer, step, precision, pairs) for layer in model.layers]
    return [*linear_operations(model, step, precision), *attention]


def dense_attention(
    layer: Layer, step: Step, precision: Precision, pairs: Callable[[Layer, Step], int] = causal_pairs
) -> Operation:
    """Dense attention of `layer` as an operation."""
    name = "attention" if layer.window is None else "window attention"
    return Operation(name, "attention", layer.count, attention_cost(layer, step, precision, pairs))


def total(operations: Iterable[Operation], kind: Kind | None = None) -> Cost:
    """Sum over operations, all of them or those of one kind."""
    return sum((op.cost * op.count for op in operations if kind in (None, op.kind)), Cost())


def generation(steps: Callable[[Step], list[Operation]], batch: int, length: int, tokens: int) -> list[Operation]:
    """All operations of generating `tokens` tokens after `length`, one decode step after the other."""
    return [op for i in range(tokens) for op in steps(decode(batch, length + i))]
