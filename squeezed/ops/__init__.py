"""The four operations: score centroids, select clusters, attend to what is selected, merge.

`reference` defines them, `cpu` and `triton` are fast; the functions here choose by device.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from squeezed.ops import chain, reference
from squeezed.ops.layout import ClusteredKeys

Thresholds = tuple[float, ...]
_GPU_HEAD_DIMS = (16, 32, 64, 128, 256)


def attend_fixed(
    query: Tensor,
    index: ClusteredKeys,
    log_thresholds: Thresholds | Tensor | None,
    window_end: int,
    scale: float,
    voters: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`squeezed.ops.chain.attend_fixed`; on a GPU the thresholds are a [levels] float32 tensor there."""
    if uses_triton(query):
        from squeezed.ops import triton

        if log_thresholds is None:
            log_thresholds = torch.full((len(index.levels),), float("-inf"), device=query.device)
        assert isinstance(log_thresholds, Tensor)
        return triton.attend_fixed(query, index, log_thresholds, window_end, scale, voters)
    if isinstance(log_thresholds, Tensor):
        log_thresholds = tuple(log_thresholds.tolist())
    if query.device.type == "cpu":
        from squeezed.ops import cpu

        return chain.attend_fixed(cpu, query, index, log_thresholds, window_end, scale, voters)
    return chain.attend_fixed(reference, query, index, log_thresholds, window_end, scale, voters)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """See :func:`squeezed.ops.reference.merge_attention`."""
    if uses_triton(parts[0][0]):
        from squeezed.ops import triton

        return triton.merge_attention(parts)
    return reference.merge_attention(parts)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the compiled GPU operations serve tensors such as this one, [..., head_dim]."""
    return tensor.is_cuda and tensor.shape[-1] in _GPU_HEAD_DIMS and find_spec("triton") is not None
