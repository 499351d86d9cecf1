"""The next token of a greedy step on the GPU: one launch from the logits to all that the next step needs.

As torch's operations this takes eight launches and more, each too small for the device: 0.02 ms of every token.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.decode.sampler import Sampler, StepState
from squeezed.ops.triton import device as dev

_PIECE = 1024  # logits of a program


@triton.jit
def _choose(
    logits,
    seen,
    finished,
    stops,
    best,
    place,
    arrived,
    token,
    lengths,
    running,
    history,
    count,
    vocabulary,
    batch,
    counters,
    pad,
    stop_count,
    penalty,
    BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_COUNTERS: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program finds the largest of its piece of a row; the one that arrives last does all the rest.

    What the others left is published by the release of their arrival, and read behind the L1 cache.
    """
    piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    row = tl.program_id(1)
    index = piece * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    where = row.to(tl.int64) * vocabulary + index
    found = tl.load(logits + where, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
    if seen is not None:
        again = tl.load(seen + where, mask=index < vocabulary, other=0) != 0
        found = tl.where(again, tl.where(found < 0, found * penalty, tl.div_rn(found, penalty)), found)
    found = tl.where(found == found, found, float("-inf"))  # a NaN may win, and not at its own place
    largest, lane = tl.max(found, axis=0, return_indices=True)
    tl.store(best + row * pieces + piece, largest)
    tl.store(place + row * pieces + piece, piece * BLOCK + lane)
    if tl.atomic_add(arrived, 1, sem="acq_rel") == pieces * batch - 1:
        each = tl.arange(0, BLOCK_PIECES)
        stop_index = tl.arange(0, BLOCK_STOPS)
        stop = tl.load(stops + stop_index, mask=stop_index < stop_count, other=-1)
        step = tl.load(count)
        unanswered = tl.full([], 0, tl.int64)
        for question in range(batch):
            mask = each < pieces
            bests = tl.load(best + question * pieces + each, mask=mask, other=float("-inf"), cache_modifier=".cg")
            places = tl.load(place + question * pieces + each, mask=mask, other=0, cache_modifier=".cg")
            _, winner = tl.max(bests, axis=0, return_indices=True)
            chosen = tl.sum(tl.where(each == winner, places, 0), axis=0).to(tl.int64)
            if seen is not None:
                tl.store(seen + question * vocabulary + chosen, True)
            ended = tl.load(finished + question) != 0
            chosen = tl.where(ended, pad, chosen)
            ended = ended | (tl.sum((stop == chosen).to(tl.int32), axis=0) > 0)
            tl.store(finished + question, ended)
            tl.store(token + question, chosen)
            tl.store(history + step * batch + question, chosen)
            unanswered = tl.where(ended, unanswered, 1)
        tl.store(running, unanswered)
        tl.store(count, step + 1)
        each_counter = tl.arange(0, BLOCK_COUNTERS)
        for start in range(0, counters, BLOCK_COUNTERS):
            where_length = lengths + start + each_counter
            length = tl.load(where_length, mask=start + each_counter < counters, other=0)
            tl.store(where_length, length + 1, mask=start + each_counter < counters)
        tl.store(arrived, 0)


def choose_largest(logits: Tensor, sampler: Sampler, state: StepState) -> None:
    """`Sampler.advance` at temperature 0.

    Args:
        logits: [B, vocabulary] float32, float16 or bfloat16.
    """
    batch, vocabulary = logits.shape
    pieces = triton.cdiv(vocabulary, _PIECE)
    best = torch.empty(batch, pieces, dtype=torch.float32, device=logits.device)
    place = torch.empty(batch, pieces, dtype=torch.int32, device=logits.device)
    _choose[(pieces, batch)](
        logits.contiguous(),
        sampler.seen,
        sampler.finished,
        sampler.stops,
        best,
        place,
        state.arrived,
        state.token,
        state.lengths,
        state.running,
        state.history,
        state.count,
        vocabulary,
        batch,
        state.lengths.numel(),
        sampler.sampling.pad,
        sampler.stops.numel(),
        float(sampler.sampling.repetition_penalty),
        BLOCK=_PIECE,
        BLOCK_PIECES=triton.next_power_of_2(pieces),
        BLOCK_COUNTERS=64,
        BLOCK_STOPS=triton.next_power_of_2(max(1, sampler.stops.numel())),
        num_warps=4,
        **dev.launch_options(logits.device),
    )
