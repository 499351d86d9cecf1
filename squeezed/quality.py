"""What a sparsity costs in accuracy, measured on the context itself, so that a user may ask for accuracy instead.

The measure is the relative error of one query's attention output to the fixed context, |squeezed - dense| / |dense|,
as a mean over queries, heads and layers. All layers see the queries of a dense run, so that errors do not add up.
What keeping keys and values in 8 bits puts on it counts too, so that with them even sparsity 0 has an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squeezed import ops
from squeezed.calibration import ThresholdCurves
from squeezed.ops.layout import ChannelScales, ClusteredKeys, from_eight_bits

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
    sums = torch.zeros(1 + len(MEASURED), dtype=torch.float64)
    count = 0
    for layer, segments, scale in zip(layers, queries, scales, strict=True):
        every = torch.cat(list(segments), dim=1)
        pick = torch.linspace(0, every.shape[1] - 1, min(_QUERIES, every.shape[1]), device=every.device).long()
        query = every[:, pick].transpose(0, 1).unsqueeze(2).contiguous()  # each query is a question of its own
        dense, lse, _ = ops.attend_fixed(query, layer, None, layer.tokens, scale)
        norms = dense.norm(dim=-1).clamp(min=1e-30)
        rounded = rounding_error(query[:, :, 0], layer, dense[:, :, 0], lse[:, :, 0], scale).unsqueeze(-1) / norms
        sums[0] += float(rounded.mean())
        for i, sparsity in enumerate(MEASURED, 1):
            at = curves.at(sparsity, 1)
            thresholds = torch.tensor(at, device=query.device) if query.is_cuda else at
            found = ops.attend_fixed(query, layer, thresholds, layer.tokens, scale)[0]
            sums[i] += float(torch.hypot((found - dense).norm(dim=-1) / norms, rounded).mean())
        count += 1
    measured = (sums / count).cummax(0).values
    return _interpolated(torch.tensor((0.0, *MEASURED), dtype=torch.float64), measured, curves.sparsities)


def rounding_error(query: Tensor, layer: ClusteredKeys, dense: Tensor, lse: Tensor, scale: float) -> Tensor:
    """What 8 bits put on the output of dense attention, to be expected: root mean square of the difference's norm.

    A rounded number is off by up to half a step of its channel, anything as likely as anything else and each number for
    itself. To first order a key of weight p_i then moves the output by p_i ((v_i - output) dlogit_i + dv_i), and the
    squares add up. (On SmolLM2 at 2,800 tokens 0.0074 of the output; measured against the unrounded keys, 0.0072.)

    Args:
        query: [n, q_heads, head_dim].
        dense: [n, q_heads, head_dim] float32, the output for all keys as they are kept.
        lse: [n, q_heads] float32.
        scale: the attention module's scaling.

    Returns:
        [n, q_heads] float32; 0 if keys are not in 8 bits.
    """
    if layer.scales is None or layer.keys.dtype != torch.int8:
        return torch.zeros_like(lse)
    kv_heads = layer.keys.shape[0]
    group, found = query.shape[1] // kv_heads, []
    for head in range(kv_heads):  # one at a time: in float32 all keys may be more than there is room for
        own, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        scales = ChannelScales(*(part[one] for part in layer.scales))
        asked, output = query[:, own].float(), dense[:, own]
        keys = from_eight_bits(layer.keys[one], *scales[:2])[0]
        values = from_eight_bits(layer.values[one], *scales[2:])[0]
        squares = (2 * (asked @ keys.T * scale - lse[:, own].unsqueeze(-1))).exp()
        squares[..., layer.clustered : layer.window_start] = 0  # sinks are not rounded
        total = squares.sum(-1)
        apart = squares @ values.square().sum(-1) - 2 * (squares @ values * output).sum(-1)
        apart += total * output.square().sum(-1)
        logit = scale**2 * (asked.square() @ scales.key_scale[0].square()) / 12
        found.append((logit * apart + total * scales.value_scale.square().sum() / 12).clamp(min=0).sqrt())
    return torch.cat(found, dim=1)


def _interpolated(xs: Tensor, ys: Tensor, at: Tensor) -> Tensor:
    right = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    share = (at - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
