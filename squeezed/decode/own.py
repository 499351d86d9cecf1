"""Attention to the own tokens while decoding: buffers of a fixed size, with their lengths on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squeezed import ops
from squeezed.ops import reference


class Rope(NamedTuple):
    """How the model turns and normalises a new token's queries and keys; for a step that does it itself.

    Attributes:
        cos, sin: [capacity, head_dim] of the position that each slot stands for.
        query_norm, key_norm: [head_dim] weights of an RMS norm per head, or None.
        eps: of those norms.
    """

    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(eq=False)
class OwnTokens:
    """One layer's own tokens while decoding; left padding is not among them.

    Attributes:
        keys, values: [B, kv_heads, capacity, head_dim], contiguous.
        lengths: [B] int32, slots in use before this step's token, which takes the next one. Other layers may share it;
            the step counts up once all layers are done.
        window: most tokens that a token of a sliding-window layer sees, itself included.
        kept: [levels, B] int64, sum over steps and KV heads of what `squeezed.ops.attend_fixed` kept; None if nothing
            is selected.
        running: [1] int64, 1 while a question of the batch is unanswered: later steps are not counted in `kept`.
        pending: keys and values [B, kv_heads, 1, head_dim] of this step's token, not yet in its slot.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    window: int | None = None
    kept: Tensor | None = None
    running: Tensor | None = None
    pending: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def hold(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take this step's token; the attention that follows puts it into its slot. Returns the whole buffers."""
        self.pending = (key, value)
        return self.keys, self.values


class Parts(NamedTuple):
    """Attention to disjoint sets of own tokens: output [B, kv_heads, parts, group, D], lse [B, kv_heads, parts, group].

    Float32; an empty part has output 0 and lse -inf.
    """

    output: Tensor
    lse: Tensor


def attend_own(query: Tensor, own: OwnTokens, scale: float, rope: Rope | None = None) -> tuple[Tensor, Parts]:
    """Put this step's token into its slot and attend to the own tokens, itself included.

    Args:
        query: [B, Hq, 1, D].
        scale: softmax scale.
        rope: None if query and the pending key are rotated already.

    Returns:
        the rotated query [B, Hq, 1, D] and the attention in parts.
    """
    if ops.uses_triton(query):
        from squeezed.decode import own_triton

        return own_triton.attend_own(query, own, scale, rope)
    assert own.pending is not None
    key, value = own.pending
    row, slot = torch.arange(key.shape[0], device=key.device), own.lengths.long()
    if rope is not None:
        query, key = rotated(query, slot, rope.query_norm, rope), rotated(key, slot, rope.key_norm, rope)
    own.keys[row, :, slot] = key[:, :, 0]
    own.values[row, :, slot] = value[:, :, 0]
    place = torch.arange(own.capacity, device=key.device)
    visible = place <= slot[:, None]
    if own.window is not None:
        visible &= place > slot[:, None] - own.window
    batch, kv_heads, _, dim = own.keys.shape
    grouped = query.reshape(batch, kv_heads, -1, dim).float() * scale
    logits = grouped @ own.keys.float().transpose(-1, -2)
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    output = logits.softmax(-1) @ own.values.float()
    return query, Parts(output.unsqueeze(2), logits.logsumexp(-1).unsqueeze(2))


def rotated(states: Tensor, slot: Tensor, norm: Tensor | None, rope: Rope) -> Tensor:
    """[B, H, 1, D] after the RMS norm per head, if there is one, and RoPE by halves, for slots [B]."""
    wide = states.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rope.eps) * norm.float()
    low, high = wide.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    cos, sin = (table[slot].float()[:, None, None] for table in (rope.cos, rope.sin))
    return (wide * cos + turned * sin).to(states.dtype)


def join(
    parts: Parts,
    fixed: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
    own: OwnTokens,
    like: Tensor,
) -> Tensor:
    """All of a step's attention as one, and what was kept added to the count.

    Args:
        parts: of the own tokens.
        fixed: output [B, Hq, 1, D] and lse [B, Hq, 1] of the fixed part; None for a layer without one.
        kept: [levels, B, kv_heads], see `squeezed.ops.attend_fixed`; None if everything was attended.
        like: the result gets this tensor's dtype.

    Returns:
        [B, Hq * D]
    """
    if ops.uses_triton(parts.output):
        from squeezed.decode import own_triton

        return own_triton.join(parts, fixed, kept, own, like)
    batch, kv_heads, count, group, dim = parts.output.shape
    sets = [
        (parts.output[:, :, i].reshape(batch, -1, dim), parts.lse[:, :, i].reshape(batch, -1)) for i in range(count)
    ]
    if fixed is not None:
        sets.append((fixed[0][:, :, 0], fixed[1][:, :, 0]))
    if kept is not None and own.kept is not None and own.running is not None:
        own.kept += kept.sum(-1) * own.running
    output, _ = reference.merge_attention(sets)
    return output.reshape(batch, kv_heads * group * dim).to(like.dtype)
