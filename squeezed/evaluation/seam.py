"""How the rows' cache layers get between a model and its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from squeezed.evaluation.rows import RowsLayer
from squeezed.models import attention_modules

NAME = "squeezed-evaluation"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    scored_layer: RowsLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert scored_layer is not None
    output = scored_layer.attend(query, scaling if scaling is not None else query.shape[-1] ** -0.5)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


# Without masks of the same name: transformers then makes none, and the layers know which own tokens a row may see.
AttentionInterface.register(NAME, _attention)


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` run on the caches of this module for the length of a with block."""

    def hand_over(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache: Cache | None = kwargs.get("past_key_values")
        layer = None if cache is None else cache.layers[module.layer_idx]
        if isinstance(layer, RowsLayer):
            kwargs["scored_layer"] = layer
        return args, kwargs

    before = model.config._attn_implementation
    hooks = [m.register_forward_pre_hook(hand_over, with_kwargs=True) for m in attention_modules(model)]
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
