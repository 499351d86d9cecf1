"""What a method is: it chooses, for every query token by itself, which fixed keys to read, and says what that costs.

Shapes: Hk KV heads, G query heads per KV head, B rows (the same question under several budgets), M query tokens, D head
dimension, N fixed tokens, n of them to choose among. The sinks (first tokens) and the observation window (last tokens)
are attended by every method and counted for every method.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerContext:
    """One layer's fixed context, in text order.

    Attributes:
        keys, values: [Hk, N, D]; keys after RoPE.
        queries: [Hq, window, D], the window's own queries, for methods that calibrate.
        scale: the attention module's scaling.
        layer: its number among the layers with full attention.
        sinks, window: first and last tokens that are always attended.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    layer: int
    sinks: int
    window: int

    @property
    def inner(self) -> slice:
        """The keys to choose among."""
        return slice(self.sinks, self.keys.shape[1] - self.window)

    @property
    def count(self) -> int:
        """n, the number of keys to choose among."""
        return self.keys.shape[1] - self.window - self.sinks

    @property
    def inner_keys(self) -> Tensor:
        return self.keys[:, self.inner]

    @property
    def inner_values(self) -> Tensor:
        return self.values[:, self.inner]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one key, or one value, of one KV head; counted in 16 bits whatever the model runs in."""
        return 2 * self.keys.shape[-1]

    @property
    def full_bytes(self) -> int:
        """Bytes of all keys and values."""
        return 2 * self.kv_heads * self.keys.shape[1] * self.row_bytes

    def affordable(self, budget: float, metadata: float) -> int:
        """Keys per KV head that a budget leaves after the always attended ones and `metadata` bytes; at 1, all."""
        if budget >= 1:
            return self.count
        always = 2 * self.kv_heads * (self.sinks + self.window) * self.row_bytes
        spare = budget * self.full_bytes - always - metadata
        return max(0, min(self.count, int(spare / (2 * self.kv_heads * self.row_bytes))))


@dataclass(frozen=True)
class Asked:
    """The queries of some rows in one layer.

    Attributes:
        layer: whose keys.
        query: [Hk, B, G, M, D], in the model's dtype.
        all_logits: [Hk, B, G, M, fixed tokens in use] float32, exact and scaled. Reading them is not free: a method
            that uses them counts the keys it would have read.
        places: [B, M] int64, each query's place among its row's own tokens.
        history: [Hk, B, G, P, D], all own queries so far, from the first own token; a row's are valid up to its places.
        budgets: per row, share of the full KV's bytes that it may read per query token, metadata included.
    """

    layer: LayerContext
    query: Tensor
    all_logits: Tensor
    places: Tensor
    history: Tensor
    budgets: tuple[float, ...]

    @property
    def logits(self) -> Tensor:
        """[Hk, B, G, M, n], those of the keys to choose among."""
        return self.all_logits[..., self.layer.inner]

    def times(self, vectors: Tensor) -> Tensor:
        """Scaled products with [Hk, K, D]: [Hk, B, G, M, K] float32."""
        return scaled_products(self.query, vectors, self.layer.scale)


@dataclass(frozen=True)
class Choice:
    """What the queries read beyond the always attended keys.

    Attributes:
        kept: [Hk, B, 1 or G, M, n] bool, keys attended exactly; None is all of them.
        metadata: bytes read to choose, all KV heads together; a number, or [B, M].
        log_weights: [Hk, B, G, M, n] added to the logits of kept keys (importance sampling).
        estimates: [Hk, B, G, M, K] float32, logits of stand-ins for keys that are not kept; -inf leaves one out.
        stand_ins: [Hk, K, D], their values.
    """

    kept: Tensor | None
    metadata: float | Tensor = 0.0
    log_weights: Tensor | None = None
    estimates: Tensor | None = None
    stand_ins: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A way to choose. Subclasses are frozen dataclasses, and their fields are its options.

    Attributes:
        title: what plots and tables call it.
        paper: where it is described.
        bound: it is no method that could be used, but a bound to compare with; what it reads to choose is not counted.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    bound: ClassVar[bool] = False

    def settings(self, budget: float) -> Hashable:
        """What has to be built differently for this budget; budgets with equal settings share what is built."""
        return None

    def prepare(self, layers: Sequence[LayerContext], settings: Any) -> list[Any]:
        """What is built once per context, for each layer."""
        return [self.prepare_layer(layer, settings) for layer in layers]

    def prepare_layer(self, layer: LayerContext, settings: Any) -> Any:
        return None

    def choose(self, state: Any, asked: Asked) -> Choice:
        """Choose for every query token by itself; `state` is what `prepare` built for this layer."""
        raise NotImplementedError


def per_row(values: Sequence[int], device: torch.device) -> Tensor:
    """One number per row as [1, B, 1, 1, 1] int64; filled in on the device, because nothing may be copied there while
    its work is being recorded."""
    filled = [torch.full((1,), value, dtype=torch.int64, device=device) for value in values]
    return torch.cat(filled).view(1, -1, 1, 1, 1)


def products(left: Tensor, right: Tensor) -> Tensor:
    """[H, R, C] x [H, C, K] -> float32. Half precision on a GPU is multiplied as it is and summed in float32."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and left.dtype == right.dtype:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def scaled_products(query: Tensor, vectors: Tensor, scale: float) -> Tensor:
    """[Hk, B, G, M, D] x [Hk, K, D] -> [Hk, B, G, M, K] float32, times `scale`."""
    flat = products(query.reshape(query.shape[0], -1, query.shape[-1]), vectors.transpose(1, 2))
    return flat.mul_(scale).view(*query.shape[:-1], vectors.shape[1])


def shared_scores(logits: Tensor, log_sizes: Tensor | None = None) -> Tensor:
    """Softmax of each query head, averaged over the heads of a group, which read the same keys: [Hk, B, 1, M, K].

    Args:
        logits: [Hk, B, G, M, K].
        log_sizes: [Hk, K], logarithm of how many keys each stands for; the result is then the weight of one of them.
    """
    if log_sizes is None:
        return logits.softmax(-1).mean(2, keepdim=True)
    denominator = (logits + log_sizes[:, None, None, None]).logsumexp(-1, keepdim=True)
    return (logits - denominator).exp_().mean(2, keepdim=True)


def keep_top(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts[b]` highest of each row b's scores [Hk, B, ..., n], as bool; ties at the border are all kept."""
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for row, count in enumerate(counts):
        if count <= 0 or count >= scores.shape[-1]:
            kept[:, row] = count > 0
        else:
            border = scores[:, row].kthvalue(scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
            kept[:, row] = scores[:, row] >= border
    return kept


def keep_groups(scores: Tensor, sizes: Tensor, tokens: Sequence[int]) -> Tensor:
    """The highest groups of keys that fit `tokens[b]` keys together, as bool.

    Args:
        scores: [Hk, B, 1, M, K].
        sizes: [Hk, K] keys per group; 0 is padding.
    """
    order = scores.argsort(-1, descending=True)
    sorted_sizes = sizes[:, None, None, None].expand_as(order).gather(-1, order)
    limit = per_row(tokens, scores.device)
    fits = (sorted_sizes.cumsum(-1) <= limit) & (sorted_sizes > 0)
    return torch.zeros_like(fits).scatter_(-1, order, fits)


def members(groups: Tensor, labels: Tensor) -> Tensor:
    """Which keys lie in a chosen group: [Hk, B, 1, M, K] bool and labels [Hk, n] -> [Hk, B, 1, M, n] bool."""
    index = labels[:, None, None, None].expand(*groups.shape[:-1], labels.shape[-1])
    return groups.gather(-1, index)
