"""Keep a fixed context in 8 bits: half the bytes to read, for an error below that of dropping keys.

Keys, centroids and values are stored as int8, each less its mean over the head and divided by a scale per channel:
channels with a large constant part, which real keys have, lose nothing. (For a bell-shaped channel int8 errs by 1% of
its deviation, e4m3 by 2.6%, and an error of a logit multiplies the weight.) The kernels undo nothing key by key: the
key scales multiply the query, the mean key adds one number to every logit of a row (to the log-sum-exp, then), the
value scales and mean apply once to the output.
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

LARGEST = 127.0
# Scaled queries are multiplied in float16, whose small numbers lose bits: lift them by a power of two.
LIFT = tl.constexpr(16.0)


class ChannelScales(NamedTuple):
    """[Hk, D] float32 each: stored = (key - key_mean) / key_scale, and the same for values."""

    key_scale: Tensor
    key_mean: Tensor
    value_scale: Tensor
    value_mean: Tensor


@dataclass(frozen=True)
class EightBitKeys:
    """A layer stored in 8 bits, and what it was divided by."""

    layer: ClusteredKeys
    scales: ChannelScales


def _scale_and_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.float().mean(dim=1)
    low, high = rows.amin(dim=1).float(), rows.amax(dim=1).float()
    return (torch.maximum(high - mean, mean - low) / LARGEST).clamp(min=1e-12), mean


def _stored(rows: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    out = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for head in range(rows.shape[0]):
        out[head] = ((rows[head].float() - mean[head]) / scale[head]).clamp(-LARGEST, LARGEST).round().to(torch.int8)
    return out


def to_eight_bits(layer: ClusteredKeys) -> EightBitKeys:
    """Keys, values and the centroids of every level as int8."""
    scales = ChannelScales(*_scale_and_mean(layer.keys), *_scale_and_mean(layer.values))
    levels = tuple(
        replace(level, centroids=_stored(level.centroids, scales.key_scale, scales.key_mean)) for level in layer.levels
    )
    keys = _stored(layer.keys, scales.key_scale, scales.key_mean)
    values = _stored(layer.values, scales.value_scale, scales.value_mean)
    return EightBitKeys(replace(layer, keys=keys, values=values, levels=levels), scales)


@triton.jit
def unpack(word, FAST: tl.constexpr):
    """The four int8 of an int32 as float32, lowest byte first. FAST: in PTX; the interpreter knows none.

    Conversion is slow on the device; placing the biased byte in the mantissa of 2^23 and subtracting is quick.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 biased;
            xor.b32 biased, $4, 0x80808080;
            prmt.b32 $0, biased, 0x4B000000, 0x7650;
            prmt.b32 $1, biased, 0x4B000000, 0x7651;
            prmt.b32 $2, biased, 0x4B000000, 0x7652;
            prmt.b32 $3, biased, 0x4B000000, 0x7653;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }""",
            "=r,=r,=r,=r,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            ((word << 24) >> 24).to(tl.float32),
            ((word << 16) >> 24).to(tl.float32),
            ((word << 8) >> 24).to(tl.float32),
            (word >> 24).to(tl.float32),
        )


@triton.jit
def packed_query(query, key_scale, key_mean, HEAD_DIM: tl.constexpr):
    """One query row, scaled for packed keys: channels 4 w + i for i = 0..3, [HEAD_DIM / 4] each; shift and |q|^2."""
    word = tl.arange(0, HEAD_DIM // 4) * 4
    q0 = tl.load(query + word).to(tl.float32)
    q1 = tl.load(query + word + 1).to(tl.float32)
    q2 = tl.load(query + word + 2).to(tl.float32)
    q3 = tl.load(query + word + 3).to(tl.float32)
    mean = q0 * tl.load(key_mean + word) + q1 * tl.load(key_mean + word + 1)
    mean += q2 * tl.load(key_mean + word + 2) + q3 * tl.load(key_mean + word + 3)
    norm = tl.sum(q0 * q0 + q1 * q1 + q2 * q2 + q3 * q3, axis=0)
    q0 *= tl.load(key_scale + word)
    q1 *= tl.load(key_scale + word + 1)
    q2 *= tl.load(key_scale + word + 2)
    q3 *= tl.load(key_scale + word + 3)
    return q0, q1, q2, q3, tl.sum(mean, axis=0), norm


@triton.jit
def packed_logits(words, q0, q1, q2, q3, FAST: tl.constexpr):
    """Products of packed keys, [N, HEAD_DIM / 4] int32, with a packed query: [N]."""
    k0, k1, k2, k3 = unpack(words, FAST)
    return tl.sum(k0 * q0[None, :] + k1 * q1[None, :] + k2 * q2[None, :] + k3 * q3[None, :], axis=1)


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
