"""GPU kernels of `squeezed.decode.own`: append, rotate and attend in one launch, join all parts in another."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.decode.own import OwnTokens, Parts, Rope
from squeezed.ops.triton import device as dev

# A part is read by one program from its beginning to its end: short enough that this takes few microseconds.
_SLOTS_PER_PART, _MOST_PARTS = 32, 16
_BLOCK_SLOTS = 32


@triton.jit
def _rotated(rows, mask, gamma, eps, cos, sin, HEAD_DIM: tl.constexpr):
    """[R, HEAD_DIM] float32 from pointers to the rows [R, 1]: RMS norm per row, then RoPE by halves."""
    dim = tl.arange(0, HEAD_DIM)
    x = tl.load(rows + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    if cos is not None:
        partner = (dim + HEAD_DIM // 2) % HEAD_DIM
        y = tl.load(rows + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        if gamma is not None:
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
            x = x * inverse[:, None] * tl.load(gamma + dim).to(tl.float32)[None, :]
            y = y * inverse[:, None] * tl.load(gamma + partner).to(tl.float32)[None, :]
        signed = tl.load(sin + dim).to(tl.float32) * tl.where(dim < HEAD_DIM // 2, -1.0, 1.0)
        x = x * tl.load(cos + dim).to(tl.float32)[None, :] + y * signed[None, :]
    return x


@triton.jit
def _attend_own(
    query,
    key,
    value,
    cos,
    sin,
    query_norm,
    key_norm,
    eps,
    own_keys,
    own_values,
    lengths,
    query_out,
    part_out,
    part_lse,
    scale,
    query_batch,
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    kv_heads,
    capacity,
    window,
    parts,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % parts
    problem = program // parts
    batch = (problem // kv_heads).to(tl.int64)
    head = problem % kv_heads
    row = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, HEAD_DIM)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths + batch)
    if cos is not None:
        cos += length * HEAD_DIM
        sin += length * HEAD_DIM
    dtype = own_keys.dtype.element_ty
    query_rows = query + batch * query_batch + (head * GROUP + row)[:, None] * query_head
    q = _rotated(query_rows, (row < GROUP)[:, None], query_norm, eps, cos, sin, HEAD_DIM).to(dtype)
    one = tl.arange(0, 1)
    key_row = key + batch * key_batch + (head + one)[:, None] * key_head
    k = tl.sum(_rotated(key_row, (one < 1)[:, None], key_norm, eps, cos, sin, HEAD_DIM), axis=0).to(dtype)
    v = tl.load(value + batch * value_batch + head * value_head + dim).to(dtype)
    own = (batch * kv_heads + head) * capacity * HEAD_DIM
    first_part = part == 0
    if first_part:
        tl.store(own_keys + own + length * HEAD_DIM + dim, k)
        tl.store(own_values + own + length * HEAD_DIM + dim, v)
        if query_out is not None:
            place = (batch * kv_heads + head) * GROUP + row
            tl.store(query_out + place[:, None] * HEAD_DIM + dim[None, :], q, mask=(row < GROUP)[:, None])
    # The new token is attended from registers, by the first part; the others begin empty.
    logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
    top = tl.where(first_part, logit, float("-inf"))
    total = tl.where(first_part, 1.0, 0.0) + tl.zeros([BLOCK_R], tl.float32)
    acc = total[:, None] * v.to(tl.float32)[None, :]
    begin = tl.maximum(0, length + 1 - window)
    share = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), parts) * BLOCK_N
    start = begin + part * share
    stop = tl.minimum(start + share, length)
    for block in range(start, stop, BLOCK_N):
        slot = block + tl.arange(0, BLOCK_N)
        inside = slot < stop
        place = own + slot[:, None] * HEAD_DIM + dim[None, :]
        old_k = tl.load(own_keys + place, mask=inside[:, None], other=0.0)
        old_v = tl.load(own_values + place, mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(old_k), input_precision=PRECISION) * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        weight = tl.exp(logits - new_top[:, None])
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(dtype), old_v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    empty = total == 0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    place = program.to(tl.int64) * GROUP + row
    tl.store(part_out + place[:, None] * HEAD_DIM + dim[None, :], acc * inverse[:, None], mask=(row < GROUP)[:, None])
    tl.store(part_lse + place, lse, mask=row < GROUP)


def attend_own(query: Tensor, own: OwnTokens, scale: float, rope: Rope | None = None) -> tuple[Tensor, Parts]:
    """See :func:`squeezed.decode.own.attend_own`; the rows of query, key and value must be contiguous."""
    assert own.pending is not None
    key, value = own.pending
    batch, q_heads, _, head_dim = query.shape
    kv_heads, group = own.keys.shape[1], q_heads // own.keys.shape[1]
    dev.check_head_dim(head_dim)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    visible = own.capacity if own.window is None else min(own.window, own.capacity)
    parts = min(_MOST_PARTS, triton.cdiv(visible, _SLOTS_PER_PART))
    rotated = query if rope is None else query.new_empty(batch, q_heads, 1, head_dim)
    output = query.new_empty(batch, kv_heads, parts, group, head_dim, dtype=torch.float32)
    lse = query.new_empty(batch, kv_heads, parts, group, dtype=torch.float32)
    _attend_own[(batch * kv_heads * parts,)](
        query,
        key,
        value,
        *(rope[:2] if rope else (None, None)),
        *(rope[2:] if rope else (None, None, 0.0)),
        own.keys,
        own.values,
        own.lengths,
        None if rope is None else rotated,
        output,
        lse,
        scale,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        kv_heads,
        own.capacity,
        own.capacity + 1 if own.window is None else own.window,
        parts,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_R=dev.padded_rows(group),
        BLOCK_N=_BLOCK_SLOTS,
        PRECISION=dev.dot_precision(query.dtype),
        **dev.launch_options(query.device),
    )
    return rotated, Parts(output, lse)


@triton.jit
def _join(
    part_out,
    part_lse,
    fixed_out,
    fixed_lse,
    kept,
    tally,
    running,
    output,
    batch_size,
    kv_heads,
    parts,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    problem = row // GROUP
    member = row % GROUP
    dim = tl.arange(0, HEAD_DIM)
    part = tl.arange(0, BLOCK_PARTS)
    place = (problem * parts + part) * GROUP + member
    lse = tl.load(part_lse + place, mask=part < parts, other=float("-inf"))
    out = tl.load(part_out + place[:, None] * HEAD_DIM + dim[None, :], mask=(part < parts)[:, None], other=0.0)
    top = tl.max(lse, axis=0)
    if fixed_out is not None:
        lse_fixed = tl.load(fixed_lse + row)
        top = tl.maximum(top, lse_fixed)
    weight = tl.exp(lse - top)
    total = tl.sum(weight, axis=0)
    joined = tl.sum(weight[:, None] * out, axis=0)
    if fixed_out is not None:
        weight_fixed = tl.exp(lse_fixed - top)
        total += weight_fixed
        joined += weight_fixed * tl.load(fixed_out + row * HEAD_DIM + dim).to(tl.float32)
    tl.store(output + row * HEAD_DIM + dim, (joined / total).to(output.dtype.element_ty))
    if kept is not None:  # noqa: SIM102
        if row % (kv_heads * GROUP) == 0:
            batch = problem // kv_heads
            head = tl.arange(0, BLOCK_HEADS)
            counts = tl.load(running)
            for level in tl.static_range(LEVELS):
                where_kept = kept + (level * batch_size + batch) * kv_heads + head
                found = tl.load(where_kept, mask=head < kv_heads, other=0).to(tl.int64)
                where_tally = tally + level * batch_size + batch
                tl.store(where_tally, tl.load(where_tally) + tl.sum(found, axis=0) * counts)


def join(
    parts: Parts,
    fixed: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
    own: OwnTokens,
    like: Tensor,
) -> Tensor:
    """See :func:`squeezed.decode.own.join`."""
    batch, kv_heads, count, group, head_dim = parts.output.shape
    if own.kept is None:
        kept = None
    output = like.new_empty(batch, kv_heads * group * head_dim)
    _join[(batch * kv_heads * group,)](
        *parts,
        *(fixed or (None, None)),
        kept,
        own.kept,
        own.running,
        output,
        batch,
        kv_heads,
        count,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_PARTS=triton.next_power_of_2(count),
        BLOCK_HEADS=triton.next_power_of_2(kv_heads),
        LEVELS=0 if kept is None else kept.shape[0],
        num_warps=4,
        **dev.launch_options(like.device),
    )
    return output
