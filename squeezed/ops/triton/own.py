"""Attention to own tokens while centroids are scored: work for programs of the same launch, so that it takes no time.

Decoding a token starts with launches that leave most of the machine idle; the own tokens need nothing but the query.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

# A part is read by one program from its beginning to its end: short enough that this takes few microseconds.
_SLOTS_PER_PART, _MOST_PARTS = 32, 16
BLOCK_SLOTS = tl.constexpr(32)


@dataclass(frozen=True)
class OwnKeys:
    """Own tokens that a step attends to, this step's already in its slot.

    Attributes:
        keys, values: [B, Hk, capacity, D] contiguous.
        lengths: [B] int32, the slot of this step's token; those up to it are attended.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @property
    def parts(self) -> int:
        """Programs for each KV head."""
        return min(_MOST_PARTS, triton.cdiv(self.keys.shape[2], _SLOTS_PER_PART))


@dataclass(frozen=True)
class Tally:
    """Where what a step keeps is added up, see `squeezed.decode.own.OwnTokens`.

    Attributes:
        total: [levels, B] int64.
        running: [1] int64, what one step counts.
    """

    total: Tensor
    running: Tensor


@triton.jit
def attend_own_part(
    query,
    own_keys,
    own_values,
    length,
    part_out,
    part_lse,
    part,
    parts,
    problem,
    kv_heads,
    rows,
    part_rows,
    capacity,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the first `length` slots of one question and KV head, as `Parts` have it."""
    row = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, HEAD_DIM)
    q = tl.load(
        query + (problem.to(tl.int64) * rows + row[:, None]) * HEAD_DIM + dim[None, :],
        mask=(row < rows)[:, None],
        other=0.0,
    )
    own = problem.to(tl.int64) * capacity * HEAD_DIM
    share = tl.cdiv(tl.cdiv(length, BLOCK_SLOTS), parts) * BLOCK_SLOTS
    start = part * share
    stop = tl.minimum(start + share, length)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, HEAD_DIM], tl.float32)
    for begin in range(start, stop, BLOCK_SLOTS):
        slot = begin + tl.arange(0, BLOCK_SLOTS)
        inside = slot < stop
        place = own + slot[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(own_keys + place, mask=inside[:, None], other=0.0)
        v = tl.load(own_values + place, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(q.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    safe_total = tl.where(total > 0, total, 1.0)
    where_part = (problem * parts + part).to(tl.int64) * part_rows + row
    needed = row < rows
    tl.store(part_out + where_part[:, None] * HEAD_DIM + dim[None, :], acc / safe_total[:, None], mask=needed[:, None])
    tl.store(part_lse + where_part, top + tl.log2(safe_total), mask=needed)
