"""Running a model over the fixed context once, layer by layer, and handing out each layer's keys, values and queries.

Every chunk of the text goes through one layer before any goes through the next. So only one layer's keys and values are
held, and the hidden states of the text, which are much smaller; the same products are taken as chunk by chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from squeezed.cache import PrefillLayer
from squeezed.errors import InputError
from squeezed.layerwise import LayerRunner
from squeezed.models import LayerPlan, max_positions, plan_layers, rope_switch

_log = logging.getLogger(__name__)
_SPARE = 4  # hidden states stay on the GPU if they take at most this part of its free memory


@dataclass
class PrefilledLayer:
    """One layer of the prefilled context, in text order.

    Attributes:
        keys, values: [kv_heads, tokens, head_dim]; for a sliding-window layer only the last tokens that count.
        queries: [q_heads, window, head_dim], last queries after RoPE; None for a sliding-window layer.
        sliding_window: None for a full-attention layer.
        moment: [kv_heads, head_dim, head_dim] float32, sum of q^T q over all queries; None without queries.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    sliding_window: int | None
    moment: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """What stands before the text that is prefilled, as one layer keeps it: [kv_heads, tokens, head_dim].

    The order of a full-attention layer's keys does not matter; a sliding-window layer holds its last ones, in order.
    """

    keys: Tensor
    values: Tensor


class HiddenStates(Protocol):
    """The text's hidden states between two layers."""

    def read(self, first: int, last: int) -> Tensor:
        """[last - first, hidden size], those that go into the current layer."""

    def write(self, first: int, rows: Tensor) -> None:
        """Those that come out of it; read from the same place before."""

    def next_layer(self) -> None:
        """All are written; they are the next layer's input."""


def prefill(
    model: PreTrainedModel,
    ids: Sequence[int],
    window: int,
    chunk: int,
    on_chunk: Callable[[int], None] = lambda tokens: None,
    hidden: HiddenStates | None = None,
    start: int = 0,
    past: Callable[[int], Past] | None = None,
    past_tokens: int = 0,
) -> Iterator[PrefilledLayer]:
    """Prefill `ids` and yield the layers in order; one is made when it is asked for.

    Args:
        ids: token ids of the text.
        window: how many of the last queries to keep.
        chunk: tokens that go through a layer at once; the result does not depend on it beyond rounding. A GPU that runs
            out of memory goes on with fewer.
        on_chunk: called with a number of tokens as they have got through the model; in the end it adds up to all.
        hidden: where hidden states are kept between the layers; in memory if None.
        start: first layer to yield. `hidden` then holds what goes into it.
        past: each layer's keys and values of `past_tokens` tokens before `ids`; the yielded layers have only the new
            ones, and a sliding-window layer both.

    Raises:
        InputError: more tokens than the model has positions, or keys that are not finite.
    """
    plan = plan_layers(model)
    _check_length(model, past_tokens + len(ids))
    chunk = _whole_if_rope_depends_on_length(model, past_tokens, len(ids), chunk)
    runner = LayerRunner(model)
    tokens = torch.tensor([list(ids)], device=model.device)
    hidden = hidden or _InMemory(len(ids), model.device)
    through = 0
    for number in range(start, plan.num_layers):
        layer = _cache_layer(plan, number, len(ids), window)
        if past is not None:
            _begin_with(layer, past(number), past_tokens, len(ids))
        sizes = _Sizes(plan, number, layer)
        first = 0
        while first < len(ids):
            last = min(len(ids), first + chunk)
            before = _state(layer)
            try:
                rows = None if number == 0 else hidden.read(first, last).to(model.device).unsqueeze(0)
                out = runner.step(number, rows, sizes.cache(past_tokens + first), input_ids=tokens[:, first:last])
            except torch.OutOfMemoryError as error:
                chunk = _smaller(chunk, error)
                vars(layer).update(before)
                continue
            hidden.write(first, out[0])
            before_chunk = (number * len(ids) + first) // plan.num_layers
            through = (number * len(ids) + last) // plan.num_layers
            on_chunk(through - before_chunk)
            first = last
        hidden.next_layer()
        new = slice(layer.keys.shape[2] - len(ids) if number in plan.squeezed else 0, None)
        keys, values = layer.keys[0, :, new], layer.values[0, :, new]
        _check_finite(number, keys, values)
        if number in plan.sliding:
            yield PrefilledLayer(keys, values, None, plan.sliding[number])
        else:
            yield PrefilledLayer(keys, values, layer.queries[0], None, layer.moment)
        del layer, keys, values, sizes


class _InMemory:
    """Hidden states in one tensor: a chunk's are overwritten as they come out of a layer."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device = tokens, device
        self._rows: Tensor | None = None

    def read(self, first: int, last: int) -> Tensor:
        assert self._rows is not None
        return self._rows[first:last]

    def write(self, first: int, rows: Tensor) -> None:
        if self._rows is None:
            place = self._device
            if place.type == "cuda":
                needed = self._tokens * rows.shape[1] * rows.element_size()
                place = place if _SPARE * needed < torch.cuda.mem_get_info(place)[0] else torch.device("cpu")
            self._rows = torch.empty(self._tokens, rows.shape[1], dtype=rows.dtype, device=place)
        self._rows[first : first + len(rows)] = rows

    def next_layer(self) -> None:
        pass


class _Sizes:
    """Caches for a pass through one layer. The decoder makes its masks by the sizes of others: stand-ins tell them."""

    def __init__(self, plan: LayerPlan, number: int, layer: Any) -> None:
        self._layer = layer
        self._full, self._sliding = PrefillLayer(0, 1), None
        if plan.sliding:
            self._sliding = DynamicSlidingWindowLayer(sliding_window=next(iter(plan.sliding.values())))
        self._layers = [self._sliding if i in plan.sliding else self._full for i in range(plan.num_layers)]
        self._layers[number] = layer

    def cache(self, tokens: int) -> Cache:
        """The layer's own cache and stand-ins in which `tokens` tokens are already."""
        self._full.filled = tokens
        if self._sliding is not None:
            self._sliding.cumulative_length = tokens
        return Cache(layers=self._layers)


class _PrefillSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that keeps `kept` tokens, more than it shows to the attention."""

    def __init__(self, sliding_window: int, kept: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.keys: Tensor
        self.values: Tensor
        self.kept = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = keys[:, :, -self.kept :], values[:, :, -self.kept :]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]


def _cache_layer(plan: LayerPlan, number: int, tokens: int, window: int) -> Any:
    if number in plan.sliding:
        # A shortened window (see template) lets a question start up to `window` tokens earlier: keep those visible too.
        return _PrefillSlidingLayer(plan.sliding[number], kept=plan.sliding[number] + window)
    return PrefillLayer(tokens, window)


def _begin_with(layer: Any, past: Past, past_tokens: int, tokens: int) -> None:
    keys, values = past.keys.unsqueeze(0), past.values.unsqueeze(0)
    if isinstance(layer, _PrefillSlidingLayer):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, past_tokens
        return
    layer.tokens = past_tokens + tokens
    layer.lazy_initialization(keys, values)
    layer.keys[:, :, :past_tokens], layer.values[:, :, :past_tokens] = keys, values
    layer.filled = past_tokens


def _state(layer: Any) -> dict[str, Any]:
    """What a pass changes in a cache layer; tensors are replaced, or written behind `filled`."""
    names = ("keys", "values", "queries", "moment", "filled", "cumulative_length", "is_initialized")
    return {name: value for name, value in vars(layer).items() if name in names}


def _smaller(chunk: int, error: Exception) -> int:
    if chunk == 1:
        raise InputError("the GPU's memory is too small for a single token of prefill; pass --device cpu") from error
    torch.cuda.empty_cache()
    _log.warning("the GPU ran out of memory: going on with chunks of %d tokens", chunk // 2)
    return chunk // 2


def _check_finite(number: int, keys: Tensor, values: Tensor) -> None:
    for name, part in (("keys", keys), ("values", values)):
        low, high = part.flatten(1).aminmax(dim=1)  # NaN if there is one
        wrong = ~(torch.isfinite(low) & torch.isfinite(high))
        if wrong.any():
            raise InputError(
                f"layer {number}, KV head {int(wrong.nonzero()[0])} has {name} that are not finite (NaN or infinity); "
                "try --dtype float32"
            )


def _check_length(model: PreTrainedModel, tokens: int) -> None:
    limit = max_positions(model)
    if limit is not None and tokens >= limit:
        raise InputError(
            f"the text is {tokens} tokens long, {tokens - limit + 1} more than fit: the model has {limit} positions "
            "and a question needs room too; shorten the text or use a model with a longer context"
        )


def _whole_if_rope_depends_on_length(model: PreTrainedModel, past: int, tokens: int, chunk: int) -> int:
    """Some RoPE variants rotate by the length of the sequence so far; chunks would then disagree with one another."""
    kind, switch = rope_switch(model)
    if switch is None or past + tokens <= switch:
        return chunk
    if kind == "dynamic":
        raise InputError(
            f"{model.config.model_type} uses dynamic RoPE, which re-rotates a longer text with every token"
        )
    return chunk if past >= switch else tokens
