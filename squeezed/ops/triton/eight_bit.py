"""Keep a fixed context in 8 bits (e4m3): half the bytes to read, for an error far below that of dropping keys.

Keys and values are stored less their mean over the head and divided by a scale per channel, so that channels with a
large constant part, which real keys have, lose nothing. The kernels never undo it key by key: the key scales multiply
the query, the mean key adds one number to every logit of a row (to the log-sum-exp, then), the value scales and mean
apply once to the output. Centroids share the scales of the keys.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import ClusteredKeys

LARGEST = 448.0  # of e4m3
# Scaled queries are multiplied in float16, whose small numbers lose bits: lift them by a power of two.
LIFT = tl.constexpr(64.0)


class ChannelScales(NamedTuple):
    """[Hk, D] float32 each: stored = (key - key_mean) / key_scale, and the same for values."""

    key_scale: Tensor
    key_mean: Tensor
    value_scale: Tensor
    value_mean: Tensor


@dataclass(frozen=True)
class EightBitKeys:
    """A layer whose keys, values and centroids are float8_e4m3fn, and what they were divided by."""

    layer: ClusteredKeys
    scales: ChannelScales


def _scale_and_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.float().mean(dim=1)
    low, high = rows.amin(dim=1).float(), rows.amax(dim=1).float()
    return (torch.maximum(high - mean, mean - low) / LARGEST).clamp(min=1e-12), mean


def _stored(rows: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    out = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    for head in range(rows.shape[0]):
        scaled = (rows[head].float() - mean[head]) / scale[head]
        out[head] = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return out


def to_eight_bits(layer: ClusteredKeys) -> EightBitKeys:
    """Keys, values and centroids of every level in e4m3."""
    scales = ChannelScales(*_scale_and_mean(layer.keys), *_scale_and_mean(layer.values))
    levels = tuple(
        replace(level, centroids=_stored(level.centroids, scales.key_scale, scales.key_mean)) for level in layer.levels
    )
    keys = _stored(layer.keys, scales.key_scale, scales.key_mean)
    values = _stored(layer.values, scales.value_scale, scales.value_mean)
    return EightBitKeys(replace(layer, keys=keys, values=values, levels=levels), scales)


@triton.jit
def scaled_query(q, key_scale, key_mean, head, scale_log2, HEAD_DIM: tl.constexpr):
    """The query rows to multiply with stored keys, the scale of those logits, and what every logit of a row lacks."""
    dim = tl.arange(0, HEAD_DIM)
    if key_scale is None:
        shift = tl.zeros([q.shape[0]], tl.float32)
    else:
        full = q.to(tl.float32)
        shift = tl.sum(full * tl.load(key_mean + head * HEAD_DIM + dim)[None, :], axis=1) * scale_log2
        q = (full * (tl.load(key_scale + head * HEAD_DIM + dim) * LIFT)[None, :]).to(tl.float16)
        scale_log2 = scale_log2 / LIFT
    return q, scale_log2, shift
