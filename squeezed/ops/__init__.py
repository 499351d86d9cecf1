"""The four operations: score centroids, select clusters, attend to what is selected, merge.

`reference` defines them, `cpu` and `triton` are fast; the functions here choose by device.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from squeezed.ops import chain, reference
from squeezed.ops.layout import ChannelScales, ClusteredKeys, Recalled, from_eight_bits

Thresholds = tuple[float, ...]
_GPU_HEAD_DIMS = (16, 32, 64, 128, 256)
_LOGITS = {"cpu": 2**22, "cuda": 2**26}  # held at once where a library multiplies


def attend_fixed(
    query: Tensor,
    index: ClusteredKeys,
    log_thresholds: Thresholds | Tensor | None,
    window_end: int,
    scale: float,
    voters: int | None = None,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`squeezed.ops.chain.attend_fixed`; on a GPU the thresholds are a [levels] float32 tensor there."""
    if uses_triton(query):
        from squeezed.ops import triton

        if log_thresholds is None:
            log_thresholds = torch.full((len(index.levels),), float("-inf"), device=query.device)
        assert isinstance(log_thresholds, Tensor)
        return triton.attend_fixed(query, index, log_thresholds, window_end, scale, voters, recalled)
    if isinstance(log_thresholds, Tensor):
        log_thresholds = tuple(log_thresholds.tolist())
    if query.device.type == "cpu":
        from squeezed.ops import cpu

        return chain.attend_fixed(cpu, query, index, log_thresholds, window_end, scale, voters, recalled)
    return chain.attend_fixed(reference, query, index, log_thresholds, window_end, scale, voters, recalled)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """See :func:`squeezed.ops.reference.merge_attention`."""
    if uses_triton(parts[0][0]):
        from squeezed.ops import triton

        return triton.merge_attention(parts)
    return reference.merge_attention(parts)


def peak_weights(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: ChannelScales | None = None) -> Tensor:
    """See :func:`squeezed.ops.reference.peak_weights`; products in the query's dtype.

    It is asked for once a question, so that on a CPU, and in float32, a library's products are fast enough, piece by
    piece of the keys.
    """
    if uses_triton(query) and query.dtype.itemsize == 2 and keys.dtype in (query.dtype, torch.int8):
        from squeezed.ops import triton

        return triton.peak_weights(query, keys, lse, scale, scales)
    batch, kv_heads = query.shape[0], keys.shape[0]
    rows = query.reshape(batch, kv_heads, -1, keys.shape[2]).transpose(0, 1).reshape(kv_heads, -1, keys.shape[2])
    lse = lse.reshape(batch, kv_heads, -1, 1).transpose(0, 1)
    found = []
    for piece in keys.split(max(1, _LOGITS.get(query.device.type, 2**22) // query[..., 0].numel()), dim=1):
        wide = piece if scales is None else from_eight_bits(piece, *scales[:2])
        logits = rows @ wide.to(query.dtype).transpose(1, 2)
        peaks = logits.view(kv_heads, batch, -1, piece.shape[1]).float().mul_(scale)
        peaks -= lse
        found.append(peaks.amax(2).exp_().transpose(0, 1))
    return torch.cat(found, dim=2)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the compiled GPU operations serve tensors such as this one, [..., head_dim]."""
    return tensor.shape[-1] in _GPU_HEAD_DIMS and has_triton(tensor)


def has_triton(tensor: Tensor) -> bool:
    """Whether kernels of ours can be compiled for the tensor's device."""
    return tensor.is_cuda and find_spec("triton") is not None
