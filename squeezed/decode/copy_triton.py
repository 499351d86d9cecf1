"""On a GPU: where the last tokens stand in the fixed text, and which keys that brings into view, in two launches.

As torch operations (`squeezed.copying.copied`, `squeezed.ops.layout.recalled_at`) this takes some eighty launches, and
0.37 ms of every token of a model of Llama-3.1-8B's shape over 128K tokens.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed import copying
from squeezed.ops.layout import Recalled

_PIECE = 2048  # tokens of the text that a program compares
_KNOWN = 64  # recalled places that are compared at once


@triton.jit
def _last(places, agrees):
    """The last of the places where `agrees`; -1 for none."""
    return tl.max(tl.where(agrees, places, -1), axis=0)


@triton.jit
def _find(
    text,
    token,
    recent,
    known,
    found,
    longest,
    counts,
    ends,
    arrived,
    tokens,
    knowns,
    LONGEST: tl.constexpr,
    LEAST: tl.constexpr,
    MANY: tl.constexpr,
    PASSAGES: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    KNOWN: tl.constexpr,
    NEWER: tl.constexpr,
):
    """Each program compares its piece of the text; the one that arrives last for a row does all the rest.

    What the others left is published by the release of their arrival, and read behind the L1 cache.
    """
    piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    row = tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    run = place < tokens
    length = tl.zeros([PIECE], tl.int32)
    for back in tl.static_range(LONGEST):
        wanted = tl.load(token + row) if back == 0 else tl.load(recent + row * LONGEST + LONGEST - back)
        stands = tl.load(text + place - back, mask=run & (place >= back), other=-2)
        run = run & (place >= back) & (stands == wanted.to(tl.int32)) & (stands >= 0)
        length += run.to(tl.int32)
    best = tl.max(length, axis=0)
    agrees = (length == best) & (length >= LEAST)
    tl.store(longest + row * pieces + piece, best)
    tl.store(counts + row * pieces + piece, tl.sum(agrees.to(tl.int32), axis=0))
    for number in tl.static_range(PASSAGES):
        latest = _last(place, agrees)
        tl.store(ends + (row * PASSAGES + number) * pieces + piece, latest)
        agrees = agrees & (place != latest)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == pieces - 1:
        each = tl.arange(0, BLOCK_PIECES)
        inside = each < pieces
        bests = tl.load(longest + row * pieces + each, mask=inside, other=0, cache_modifier=".cg")
        inside = inside & (bests == tl.max(bests, axis=0))
        count = tl.sum(tl.load(counts + row * pieces + each, mask=inside, other=0, cache_modifier=".cg"), axis=0)
        passage = tl.arange(0, PASSAGES)
        where_end = (row * PASSAGES + passage[:, None]) * pieces + each[None, :]
        few = tl.where(count <= MANY, pieces, 0)
        taken = (passage[:, None] < PASSAGES) & (inside & (each < few))[None, :]
        left = tl.load(ends + where_end, mask=taken, other=-1, cache_modifier=".cg")
        lane = tl.arange(0, PASSAGES * (BEFORE + BEHIND))
        around = lane % (BEFORE + BEHIND) + 1 - BEFORE
        here = tl.full([PASSAGES * (BEFORE + BEHIND)], -1, tl.int32)
        rest = left
        for number in tl.static_range(PASSAGES):
            end = tl.max(tl.max(rest, axis=1), axis=0)
            rest = tl.where(rest == end, -1, rest)
            here = tl.where((lane // (BEFORE + BEHIND) == number) & (end >= 0), end + around, here)
        here = tl.where(here < tokens, here, -1)
        # Each place once: not what an earlier passage has, nor what is known already.
        rest = left
        for number in tl.static_range(PASSAGES):
            end = tl.max(tl.max(rest, axis=1), axis=0)
            rest = tl.where(rest == end, -1, rest)
            again = (lane // (BEFORE + BEHIND) > number) & (here > end - BEFORE) & (here <= end + BEHIND) & (end >= 0)
            here = tl.where(again, -1, here)
        for start in range(0, knowns, KNOWN):
            which = start + tl.arange(0, KNOWN)
            there = tl.load(known + row * knowns + which, mask=which < knowns, other=-2)
            here = tl.where(tl.max((here[:, None] == there[None, :]).to(tl.int32), axis=1) > 0, -1, here)
        tl.store(found + row * PASSAGES * (BEFORE + BEHIND) + lane, tl.maximum(here, -1))
        age = tl.arange(0, NEWER)
        newer = tl.load(recent + row * LONGEST + age + 1, mask=age < LONGEST - 1, other=0)
        newer = tl.where(age == LONGEST - 1, tl.load(token + row), newer)
        tl.debug_barrier()
        tl.store(recent + row * LONGEST + age, newer, mask=age < LONGEST)
        tl.store(arrived + row, 0)


@triton.jit
def _holder(children, offsets, clusters, STEPS: tl.constexpr):
    """The cluster that holds each child: the last that begins at or before it."""
    low, high = tl.zeros_like(children), tl.zeros_like(children) + clusters
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        begins = tl.load(offsets + middle) <= children
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


@triton.jit
def _bring(
    found,
    slots_of,
    slots,
    holders,
    offsets,
    sizes,
    coarse_offsets,
    coarse_sizes,
    coarsest_offsets,
    coarsest_sizes,
    heads,
    tokens,
    knowns,
    clusters,
    coarse,
    coarsest,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    COARSE_STEPS: tl.constexpr,
    COARSEST_STEPS: tl.constexpr,
):
    """A head's keys at those places, in the stead of those that the step before brought."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    asker = (head // heads * tl.num_programs(1) + row) * heads + head % heads
    lane = tl.arange(0, WIDTH)
    place = tl.load(found + row * WIDTH + lane)
    there = (place >= 0) & (place < tokens)
    slot = tl.load(slots_of + head * tokens + place, mask=there, other=-1)
    there = slot >= 0
    where_held = asker * (knowns + WIDTH) + knowns + lane
    before = tl.load(holders + where_held)
    gone = before < clusters
    holder = _holder(tl.maximum(slot, 0), offsets + head * (clusters + 1), clusters, STEPS)
    tl.atomic_add(sizes + asker * clusters + before, 1, mask=gone, sem="relaxed")
    tl.atomic_add(sizes + asker * clusters + holder, -1, mask=there, sem="relaxed")
    tl.store(slots + where_held, slot)
    tl.store(holders + where_held, tl.where(there, holder, clusters))
    if coarse_sizes is not None:
        base = coarse_offsets + head * (coarse + 1)
        before = _holder(tl.where(gone, before, 0), base, coarse, COARSE_STEPS)
        holder = _holder(holder, base, coarse, COARSE_STEPS)
        tl.atomic_add(coarse_sizes + asker * coarse + before, 1, mask=gone, sem="relaxed")
        tl.atomic_add(coarse_sizes + asker * coarse + holder, -1, mask=there, sem="relaxed")
    if coarsest_sizes is not None:
        base = coarsest_offsets + head * (coarsest + 1)
        before = _holder(before, base, coarsest, COARSEST_STEPS)
        holder = _holder(holder, base, coarsest, COARSEST_STEPS)
        tl.atomic_add(coarsest_sizes + asker * coarsest + before, 1, mask=gone, sem="relaxed")
        tl.atomic_add(coarsest_sizes + asker * coarsest + holder, -1, mask=there, sem="relaxed")


class Finder:
    """Finds what a batch's last tokens copy; what a launch needs besides stays where it is.

    Args:
        text: [N] int64.
        batch: questions.
    """

    def __init__(self, text: Tensor, batch: int) -> None:
        self._text = text.int()
        pieces = triton.cdiv(len(text), _PIECE)
        self._longest, self._counts = (text.new_empty(batch, pieces, dtype=torch.int32) for _ in range(2))
        self._ends = text.new_empty(batch, copying.PASSAGES, pieces, dtype=torch.int32)
        self._arrived = text.new_zeros(batch, dtype=torch.int32)

    def follow(self, token: Tensor, recent: Tensor, known: Tensor, found: Tensor) -> None:
        """Move `recent` on by a token, and find what it copies besides what is known.

        Args:
            token: [B, 1] int64, about to be read.
            recent: [B, copying.LONGEST] int64, the tokens before it; those up to it afterwards.
            known: [B, R] int32, places in view anyway.
            found: [B, copying.WIDTH] int32, written: places, each once; -1 for none.
        """
        batch, pieces = self._longest.shape
        _find[(pieces, batch)](
            self._text,
            token.contiguous(),
            recent,
            known,
            found,
            self._longest,
            self._counts,
            self._ends,
            self._arrived,
            len(self._text),
            known.shape[1],
            LONGEST=copying.LONGEST,
            LEAST=copying.LEAST,
            MANY=copying.MANY,
            PASSAGES=copying.PASSAGES,
            BEFORE=copying.BEFORE,
            BEHIND=copying.BEHIND,
            PIECE=_PIECE,
            BLOCK_PIECES=triton.next_power_of_2(pieces),
            KNOWN=_KNOWN,
            NEWER=triton.next_power_of_2(copying.LONGEST),
            num_warps=4,
        )


def bring(found: Tensor, slots_of: Tensor, offsets: list[Tensor], held: Recalled) -> None:
    """Have the keys at the places found in view, behind those that are recalled, in many layers at once.

    Args:
        found: [B, copying.WIDTH] int32, -1 for none.
        slots_of: [layers * kv_heads, N] int32, where each place lies among a head's clustered keys; -1 if nowhere.
        offsets: of each level, finest first, [layers * kv_heads, clusters + 1] int32.
        held: [layers, B, kv_heads, ...] each, contiguous; its last copying.WIDTH slots and their clusters are replaced,
            its sizes changed by as much.
    """
    layers, batch, heads, width = held.slots.shape
    clusters = [sizes.shape[3] for sizes in held.sizes]
    none = (None,) * (3 - len(clusters))
    levels = [*zip(offsets, held.sizes, strict=True), *((None, None) for _ in none)]
    counts = [*clusters, *(0 for _ in none)]
    _bring[(layers * heads, batch)](
        found,
        slots_of,
        held.slots,
        held.clusters,
        *levels[0],
        *levels[1],
        *levels[2],
        heads,
        slots_of.shape[1],
        width - copying.WIDTH,
        *counts,
        WIDTH=copying.WIDTH,
        STEPS=counts[0].bit_length(),
        COARSE_STEPS=counts[1].bit_length(),
        COARSEST_STEPS=counts[2].bit_length(),
        num_warps=2,
    )
