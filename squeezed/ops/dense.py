"""Dense attention to the fixed part by the vendor's kernels, with its log-sum-exp, where nothing is left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_aten = torch.ops.aten
_FEW, _MANY = 1, 256
_failed: set[tuple[str, torch.dtype, int, int]] = set()


def serves(query: Tensor, keys: Tensor) -> bool:
    """Whether `attend_dense` takes these, [B, Hq, M, D] and [Hk, N, D]."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and keys.dtype == query.dtype and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, end: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to the first `end` keys.

    cuDNN is the fastest at one query and at many (docs/results/kernel-notes.md), but plans anew for every number of
    queries; a question's few go to FlashAttention-2.

    Args:
        query: [B, Hq, M, D] float16 or bfloat16.
        keys, values: [Hk, N, D] of the same dtype, shared by all B questions.
        scale: softmax scale.

    Returns:
        output [B, Hq, M, D] in the query's dtype, and log-sum-exp [B, Hq, M] float32.
    """
    batch, q_heads, queries, dim = query.shape
    keys, values = (part[None, :, :end].expand(batch, -1, -1, -1) for part in (keys, values))
    ways: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]] = {"flash": _flash}
    if queries <= _FEW or queries >= _MANY:
        ways = {"cudnn": _cudnn, "flash": _flash}
    for name, way in ways.items():
        shape = (name, query.dtype, dim, q_heads // keys.shape[1])
        if shape in _failed:
            continue
        try:
            output, lse, *_ = way(query, keys, values, scale)
        except RuntimeError:
            if len(ways) == 1 or name == "flash":
                raise
            _failed.add(shape)
            continue
        return output.contiguous(), lse.reshape(batch, q_heads, -1)[..., :queries]
    raise AssertionError("FlashAttention-2 is always tried")


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of M tokens to one another, each to itself and those before it; results as `attend_dense`.

    query [B, Hq, M, D], keys and values [B, Hk, M, D], float16 or bfloat16.
    """
    output, lse, *_ = _aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, True, False, scale=scale)
    return output, lse[..., : query.shape[2]]


def _cudnn(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, ...]:
    found = _aten._scaled_dot_product_cudnn_attention(query, keys, values, None, True, 0.0, False, False, scale=scale)
    return tuple(found)


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, ...]:
    found = _aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, False, False, scale=scale)
    return tuple(found)
