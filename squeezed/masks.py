"""The masks that transformers asks for on an attached model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "squeezed"  # of our attention function and of its masks, among transformers' own


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' boolean mask [B, 1, M, L]; explicit when it belongs to own tokens after a fixed context.

    The left padding of a batch of questions lies between the fixed context and the question. transformers measures a
    sliding window in slots of the cache, padding included; here it is measured in the question's real tokens.
    """
    covered = attention_mask is not None and attention_mask.shape[-1] >= max(q_offset + q_length, kv_offset + kv_length)
    if attention_mask is not None and covered and local_size is not None and batch_size > 1:
        place = attention_mask.long().cumsum(-1)
        queries = place[:, q_offset : q_offset + q_length].unsqueeze(-1)
        keys = place[:, kv_offset : kv_offset + kv_length].unsqueeze(-2)
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool().unsqueeze(-2)
        return (real & (keys <= queries) & (keys > queries - local_size)).unsqueeze(1)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and isinstance(kv_offset, int) and kv_offset == 0,
        **kwargs,
    )


AttentionMaskInterface.register(NAME, mask)
