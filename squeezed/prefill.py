"""Running a model over the fixed context once, in chunks, and handing out keys, values and queries layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from squeezed.attention import attached
from squeezed.cache import PrefillLayer
from squeezed.errors import InputError
from squeezed.models import max_positions, plan_layers, rope_switch


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


def prefill(
    model: PreTrainedModel,
    ids: Sequence[int],
    window: int,
    chunk: int,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> Iterator[PrefilledLayer]:
    """Prefill `ids` and yield the layers in order, each freed as the next is asked for.

    Args:
        ids: token ids of the fixed context.
        window: how many of the last queries to keep.
        chunk: tokens per forward pass; the result does not depend on it beyond rounding.
        on_chunk: called with the number of tokens done after each chunk.

    Raises:
        InputError: more tokens than the model has positions, or keys that are not finite.
    """
    plan = plan_layers(model)
    _check_length(model, len(ids))
    chunk = _whole_if_rope_depends_on_length(model, len(ids), chunk)
    # A shortened window (see template) lets a question start up to `window` tokens earlier: keep those visible too.
    layers = [
        _PrefillSlidingLayer(plan.sliding[i], kept=plan.sliding[i] + window)
        if i in plan.sliding
        else PrefillLayer(len(ids), window)
        for i in range(plan.num_layers)
    ]
    cache = Cache(layers=layers)
    decoder = model.get_decoder()
    tokens = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad(), attached(model):
        for first in range(0, len(ids), chunk):
            part = tokens[:, first : first + chunk]
            decoder(input_ids=part, past_key_values=cache, use_cache=True)
            on_chunk(part.shape[1])
    for i in range(plan.num_layers):
        layer = cache.layers[i]
        cache.layers[i] = None
        keys, values = layer.keys[0], layer.values[0]
        if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise InputError(f"layer {i} has keys or values that are not finite; try --dtype float32")
        if i in plan.sliding:
            yield PrefilledLayer(keys, values, None, plan.sliding[i])
        else:
            yield PrefilledLayer(keys, values, layer.queries[0], None, layer.moment)
        del layer, keys, values


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


def _check_length(model: PreTrainedModel, tokens: int) -> None:
    limit = max_positions(model)
    if limit is not None and tokens >= limit:
        raise InputError(
            f"the text is {tokens} tokens long, {tokens - limit + 1} more than fit: the model has {limit} positions "
            "and a question needs room too; shorten the text or use a model with a longer context"
        )


def _whole_if_rope_depends_on_length(model: PreTrainedModel, tokens: int, chunk: int) -> int:
    """Some RoPE variants rotate by the length of the sequence so far; chunks would then disagree with one another."""
    kind, switch = rope_switch(model)
    if switch is None or tokens <= switch:
        return chunk
    if kind == "dynamic":
        raise InputError(
            f"{model.config.model_type} uses dynamic RoPE, which re-rotates a longer text with every token"
        )
    return tokens
