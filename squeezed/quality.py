"""What a sparsity costs in accuracy, measured on the context itself, so that a user may ask for accuracy instead.

The measure is the relative error of one query's attention output to the fixed context, |squeezed - dense| / |dense|,
as a mean over queries, heads and layers. All layers see the queries of a dense run, so that errors do not add up.
Dense is attention to all keys as they are kept: what keeping them in 8 bits costs is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squeezed import ops
from squeezed.calibration import ThresholdCurves
from squeezed.ops.layout import ClusteredKeys

MEASURED = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
_QUERIES = 16


def measure_errors(
    layers: Iterable[ClusteredKeys],
    queries: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    curves: ThresholdCurves,
) -> Tensor:
    """Mean relative error at each of the curves' sparsities, [P] float64, ascending.

    Args:
        layers: the squeezed layers' indices.
        queries: per layer, segments of queries [q_heads, length, head_dim] after RoPE, such as calibrated.
        scales: per layer, the attention module's scaling.
        curves: the thresholds to judge.
    """
    sums = torch.zeros(len(MEASURED), dtype=torch.float64)
    count = 0
    for layer, segments, scale in zip(layers, queries, scales, strict=True):
        every = torch.cat(list(segments), dim=1)
        pick = torch.linspace(0, every.shape[1] - 1, min(_QUERIES, every.shape[1]), device=every.device).long()
        query = every[:, pick].transpose(0, 1).unsqueeze(2).contiguous()  # each query is a question of its own
        dense = ops.attend_fixed(query, layer, None, layer.tokens, scale)[0]
        norms = dense.norm(dim=-1).clamp(min=1e-30)
        for i, sparsity in enumerate(MEASURED):
            at = curves.at(sparsity, 1)
            thresholds = torch.tensor(at, device=query.device) if query.is_cuda else at
            found = ops.attend_fixed(query, layer, thresholds, layer.tokens, scale)[0]
            sums[i] += float(((found - dense).norm(dim=-1) / norms).mean())
        count += 1
    measured = torch.cat([torch.zeros(1, dtype=torch.float64), (sums / count).cummax(0).values])
    return _interpolated(torch.tensor((0.0, *MEASURED), dtype=torch.float64), measured, curves.sparsities)


def _interpolated(xs: Tensor, ys: Tensor, at: Tensor) -> Tensor:
    right = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    share = (at - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
