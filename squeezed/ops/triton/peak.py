"""The highest weight that a question gives each key: one read of the keys, all rows of a head's group at once.

By a library's products the logits of all rows go to memory and back several times over. For a model of Llama-3.1-8B's
shape and 128K tokens that is over 100 GB a question, where the keys are 4.3 GB and the arithmetic takes 2 ms.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import ChannelScales
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.eight_bit import scaled_query, unpack_rows


@triton.jit
def _peak_weights(
    query,
    keys,
    key_scale,
    key_centre,
    lse,
    output,
    scale,
    kv_heads,
    rows,
    count,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """PACKED: numbers in a word of keys, 4 if they are int8."""
    problem = tl.program_id(1).to(tl.int64)
    head = problem % kv_heads
    WORDS: tl.constexpr = HEAD_DIM // PACKED
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < count
    dim = tl.arange(0, HEAD_DIM)
    address = head * head_stride + place.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    k = tl.load(keys + address, mask=inside[:, None], other=0)
    if PACKED == 4:
        k = unpack_rows(k, FAST)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        where_row = problem * rows + row
        counts = row < rows
        q = tl.load(query + where_row[:, None] * HEAD_DIM + dim[None, :], mask=counts[:, None], other=0.0)
        q, logit_scale, shift = scaled_query(q, key_scale, key_centre, head, scale, HEAD_DIM)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * logit_scale
        normaliser = tl.load(lse + where_row, mask=counts, other=float("inf"))
        peak = tl.maximum(peak, tl.max(logits + (shift - normaliser)[:, None], axis=0))
    tl.store(output + problem * count + place, tl.exp(peak), mask=inside)


@torch.library.custom_op("squeezed::peak_weights", mutates_args=())
def _peak_weights_op(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: list[Tensor]) -> Tensor:
    batch, q_heads, queries, head_dim = query.shape
    dev.check_head_dim(head_dim)
    kv_heads, count = keys.shape[:2]
    rows = q_heads // kv_heads * queries
    if keys.stride()[1:] != (head_dim, 1):
        keys = keys.contiguous()
    packed = keys.dtype == torch.int8
    words = keys.view(torch.int32) if packed else keys
    output = torch.empty(batch, kv_heads, count, dtype=torch.float32, device=query.device)
    # Two programs a multiprocessor; with a tile of 128 rows their registers leave room for one.
    wide = head_dim * query.element_size() > 256
    block_rows = min(dev.padded_rows(rows), 16 if query.element_size() == 4 else 64)
    block_keys = 32 if query.element_size() == 4 else 64 if wide or dev.INTERPRETED else 128
    _peak_weights[(triton.cdiv(count, block_keys), batch * kv_heads)](
        query.contiguous(),
        words,
        *(scales[:2] if packed else (None, None)),
        lse.contiguous(),
        output,
        scale,
        kv_heads,
        rows,
        count,
        words.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_R=block_rows,
        BLOCK_N=block_keys,
        PRECISION=dev.dot_precision(query.dtype),
        PACKED=4 if packed else 1,
        FAST=not dev.INTERPRETED,
        num_warps=8 if block_rows == 64 else 4,
        num_stages=2,
    )
    return output


@_peak_weights_op.register_fake
def _(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: list[Tensor]) -> Tensor:
    return query.new_empty((query.shape[0], *keys.shape[:2]), dtype=torch.float32)


def peak_weights(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: ChannelScales | None = None) -> Tensor:
    """See `squeezed.ops.reference.peak_weights`; keys of the query's dtype or in 8 bits, [Hk, N, D] with any stride of
    heads: no piece of them need be copied. `lse` float32."""
    found: Tensor = torch.ops.squeezed.peak_weights(query, keys, lse, scale, list(scales or ()))
    return found
