"""Join attention over two disjoint sets of keys, such as the fixed context and the user's own tokens."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_two(out_a, lse_a, out_b, lse_b, output, lse_out, rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = row < rows
    dim = tl.arange(0, HEAD_DIM)
    place = row[:, None] * HEAD_DIM + dim[None, :]
    log_a = tl.load(lse_a + row, mask=mask, other=float("-inf")).to(tl.float32)
    log_b = tl.load(lse_b + row, mask=mask, other=float("-inf")).to(tl.float32)
    top = tl.maximum(log_a, log_b)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(log_a - safe_top)
    weight_b = tl.exp(log_b - safe_top)
    total = weight_a + weight_b
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    a = tl.load(out_a + place, mask=mask[:, None], other=0.0).to(tl.float32)
    b = tl.load(out_b + place, mask=mask[:, None], other=0.0).to(tl.float32)
    joined = a * (weight_a * inverse)[:, None] + b * (weight_b * inverse)[:, None]
    tl.store(output + place, joined, mask=mask[:, None])
    lse = tl.where(total > 0, safe_top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_out + row, lse, mask=mask)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (output [..., D], lse [...]) pairs over disjoint sets of keys; 0 and -inf where all are empty."""
    output, lse = parts[0]
    for other, other_lse in parts[1:]:
        head_dim = output.shape[-1]
        rows = output.numel() // head_dim
        joined = torch.empty(output.shape, dtype=torch.float32, device=output.device)
        joined_lse = torch.empty(lse.shape, dtype=torch.float32, device=output.device)
        _merge_two[(triton.cdiv(rows, 16),)](
            output.contiguous(), lse.contiguous(), other.contiguous(), other_lse.contiguous(), joined, joined_lse, rows,
            HEAD_DIM=head_dim, BLOCK_R=16,
        )  # fmt: skip
        output, lse = joined, joined_lse
    return output, lse
