"""The index of the largest of many scores, in two launches: of each piece, then of the pieces."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev

_PIECE = 1024


@triton.jit
def _of_a_piece(scores, best, place, count, pieces, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row.to(tl.int64) * count + index, mask=index < count, other=float("-inf"))
    top, first = tl.max(score.to(tl.float32), axis=0, return_indices=True)
    tl.store(best + row * pieces + tl.program_id(0), top)
    tl.store(place + row * pieces + tl.program_id(0), tl.program_id(0) * BLOCK + first)


@triton.jit
def _of_the_pieces(best, place, result, count, pieces, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    piece = tl.arange(0, BLOCK)
    top = tl.load(best + row * pieces + piece, mask=piece < pieces, other=float("-inf"))
    _, winner = tl.max(top, axis=0, return_indices=True)
    found = tl.load(place + row * pieces + tl.minimum(winner, pieces - 1))
    tl.store(result + row, tl.minimum(found, count - 1).to(tl.int64))


def largest(scores: Tensor) -> Tensor:
    """Index [B, 1] int64 of the first of the largest scores [B, V], contiguous."""
    rows, count = scores.shape
    pieces = triton.cdiv(count, _PIECE)
    best = torch.empty(rows, pieces, dtype=torch.float32, device=scores.device)
    place = torch.empty(rows, pieces, dtype=torch.int32, device=scores.device)
    result = torch.empty(rows, 1, dtype=torch.int64, device=scores.device)
    launch = {"PDL": dev.has_dependent_launch(scores.device), **dev.launch_options(scores.device)}
    _of_a_piece[(pieces, rows)](scores, best, place, count, pieces, BLOCK=_PIECE, **launch)
    _of_the_pieces[(rows,)](best, place, result, count, pieces, BLOCK=max(32, triton.next_power_of_2(pieces)), **launch)
    return result
