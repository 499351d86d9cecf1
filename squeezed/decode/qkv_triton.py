"""A new token's queries, keys and values on the GPU: product, rotation and append to the own tokens in one launch."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from squeezed.decode.linear_triton import Norm, Tiling
from squeezed.decode.own import OwnTokens, Rope
from squeezed.ops.triton import device as dev


@triton.jit
def _project_rotated(
    x,
    query_weight,
    key_weight,
    value_weight,
    query_bias,
    key_bias,
    value_bias,
    gamma,
    eps,
    cos,
    sin,
    lengths,
    query_out,
    own_keys,
    own_values,
    columns,
    q_heads,
    kv_heads,
    capacity,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """PAIRS of rows i and i + HEAD_DIM / 2 of one head, which rotation mixes."""
    HALF: tl.constexpr = HEAD_DIM // 2
    first = tl.program_id(0) * PAIRS
    head = first // HALF
    i = first % HALF + tl.arange(0, PAIRS)
    k = tl.arange(0, BLOCK_K)
    weight = query_weight
    bias = query_bias
    local = head
    if head >= q_heads + kv_heads:
        weight = value_weight
        bias = value_bias
        local = head - q_heads - kv_heads
    elif head >= q_heads:
        weight = key_weight
        bias = key_bias
        local = head - q_heads
    row = local * HEAD_DIM + i
    low_base = weight + row.to(tl.int64)[:, None] * columns + k[None, :]
    high_base = low_base + HALF * columns
    low_w = tl.load(low_base, mask=(k < columns)[None, :], other=0.0)
    high_w = tl.load(high_base, mask=(k < columns)[None, :], other=0.0)
    # The length is last step's doing, many launches ago.
    length = tl.load(lengths).to(tl.int64)
    angle = length * HEAD_DIM + i
    cos_low = tl.load(cos + angle).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF).to(tl.float32)
    sin_low = tl.load(sin + angle).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    low_acc = tl.zeros([PAIRS, BLOCK_K], tl.float32)
    high_acc = tl.zeros([PAIRS, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = k < columns - start
        value = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        square += value * value
        value *= tl.load(gamma + start + k, mask=inside, other=0.0).to(tl.float32)
        more = (k < columns - start - BLOCK_K)[None, :]
        next_low = tl.load(low_base + start + BLOCK_K, mask=more, other=0.0)
        next_high = tl.load(high_base + start + BLOCK_K, mask=more, other=0.0)
        low_acc += low_w.to(tl.float32) * value[None, :]
        high_acc += high_w.to(tl.float32) * value[None, :]
        low_w = next_low
        high_w = next_high
    inverse = 1.0 / tl.sqrt(tl.sum(square, axis=0) / columns + eps)
    low = tl.sum(low_acc, axis=1) * inverse
    high = tl.sum(high_acc, axis=1) * inverse
    if query_bias is not None:
        low += tl.load(bias + row).to(tl.float32)
        high += tl.load(bias + row + HALF).to(tl.float32)
    target = query_out + row
    slot = (local.to(tl.int64) * capacity + length) * HEAD_DIM + i
    if head >= q_heads + kv_heads:
        target = own_values + slot
    else:
        turned = low * cos_low - high * sin_low
        high = high * cos_high + low * sin_high
        low = turned
        if head >= q_heads:
            target = own_keys + slot
    dtype = query_out.dtype.element_ty
    tl.store(target, low.to(dtype))
    tl.store(target + HALF, high.to(dtype))


def project_rotated(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    norm: Norm,
    rope: Rope,
    own: OwnTokens,
    tiling: Tiling | None = None,
) -> Tensor:
    """Queries [1, Hq, 1, D] of one token, normalised and rotated; its key and value go into their slot of `own`.

    Args:
        x: [columns].
        weights: [rows, columns] of queries, keys and values, contiguous.
        biases: [rows] of each, or None.
        norm: to be applied to x first.
        rope: without norms per head.
        own: of one question.
    """
    kv_heads, capacity, head_dim = own.keys.shape[1:]
    q_heads = weights[0].shape[0] // head_dim
    tiling = tiling or _tiling(x)
    pairs = max(1, tiling.rows // 2)
    query = x.new_empty(1, q_heads, 1, head_dim)
    _project_rotated[((q_heads + 2 * kv_heads) * head_dim // 2 // pairs,)](
        x,
        *weights,
        *(biases or (None, None, None)),
        norm.weight,
        norm.eps,
        rope.cos,
        rope.sin,
        own.lengths,
        query,
        own.keys,
        own.values,
        x.shape[0],
        q_heads,
        kv_heads,
        capacity,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_K=tiling.columns,
        num_warps=tiling.warps,
        **dev.launch_options(x.device),
    )
    own.pending = None
    return query


def _tiling(x: Tensor) -> Tiling:
    """The fastest of those measured (docs/results/kernel-notes.md): four pairs of rows, 256 columns at a time."""
    if dev.INTERPRETED:
        return Tiling(16, 512)
    return Tiling(8, 256 if -(-x.shape[0] // 256) * 256 <= 1.15 * x.shape[0] else 128)
