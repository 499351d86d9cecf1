"""The steps of k-means on a GPU; `steps` defines them.

A program of `_step` takes a tile of rows of one bucket and goes through the bucket's candidates, so that no score
leaves the chip. Rows and centres are multiplied in float16 (their lengths are at most 1), sums are float32 throughout,
and every sum has a fixed order: the same keys give the same clusters.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.clustering.steps import Buckets, Centres

_MEANS = (32, 1)  # rows taken at once, warps: 2.7 TB/s where 4 warps took 0.9
# (candidates are listed, heads wider than 128) -> rows and candidates of a tile, warps
_BLOCKS = {
    (False, False): (64, 32, 4),
    (False, True): (64, 64, 4),
    (True, False): (64, 32, 4),
    (True, True): (64, 64, 4),
}


@triton.jit
def _step(
    rows,
    squares,
    order,
    labels,
    tile_bucket,
    tile_number,
    starts,
    candidates,
    centres,
    centre_squares,
    join,
    leave,
    n,
    dim,
    clusters,
    groups,
    width,
    tiles,
    phase,
    STRIDE: tl.constexpr,
    ORDERED: tl.constexpr,
    LISTED: tl.constexpr,
    EXCHANGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    bucket = tl.zeros([], tl.int32)
    if LISTED:
        bucket = tl.load(tile_bucket + head * tiles + tl.program_id(0))
        if bucket >= groups:
            return
        number = tl.load(tile_number + head * tiles + tl.program_id(0))
        start = tl.load(starts + head * (groups + 1) + bucket)
        end = tl.load(starts + head * (groups + 1) + bucket + 1)
        first = start + (phase + STRIDE - start % STRIDE) % STRIDE
    else:
        number = tl.program_id(0)
        first = phase
        end = n
    place = first + STRIDE * (number * BLOCK_R + tl.arange(0, BLOCK_R))
    live = place < end
    row = place
    if ORDERED:
        row = tl.load(order + head * n + place, mask=live, other=0)
    row = head * n + row
    channel = tl.arange(0, DIM)
    x = tl.load(rows + row[:, None] * dim + channel[None, :], mask=live[:, None] & (channel < dim)[None, :], other=0.0)
    square = tl.load(squares + row, mask=live, other=0.0)
    own = tl.full([BLOCK_R], -1, tl.int32)
    limit = tl.full([BLOCK_R], float("inf"), tl.float32)
    if EXCHANGE:
        own = tl.load(labels + row, mask=live, other=0)
        mine = head * clusters + own
        mean = tl.load(centres + mine[:, None] * dim + channel[None, :], mask=(channel < dim)[None, :], other=0.0)
        product = tl.sum(x.to(tl.float32) * mean.to(tl.float32), 1)
        distance = square + tl.load(centre_squares + mine) - 2.0 * product
        limit = tl.load(leave + mine) * tl.maximum(distance, 1e-12)
    least = tl.full([BLOCK_R, BLOCK_C], float("inf"), tl.float32)
    which = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    listed = candidates + (head * groups + bucket) * width
    for begin in range(0, width, BLOCK_C):
        at = begin + tl.arange(0, BLOCK_C)
        inside = at < width
        ids = at
        if LISTED:
            ids = tl.load(listed + at, mask=inside, other=0)
        there = head * clusters + ids
        centre = tl.load(
            centres + there[:, None] * dim + channel[None, :],
            mask=inside[:, None] & (channel < dim)[None, :],
            other=0.0,
        )
        offset = tl.load(centre_squares + there, mask=inside, other=float("inf"))
        weight = tl.load(join + there, mask=inside, other=1.0)
        score = weight[None, :] * (square[:, None] + offset[None, :] - 2.0 * tl.dot(x, tl.trans(centre)))
        if EXCHANGE:
            score = tl.where(ids[None, :] == own[:, None], float("inf"), score)
        better = score < least
        least = tl.where(better, score, least)
        which = tl.where(better, ids[None, :], which)
    best = tl.min(least, 1)
    # Of equally good ones the one with the lowest number, whatever block it came in.
    chosen = tl.min(tl.where(least == best[:, None], which, 2147483647), 1)
    if EXCHANGE:
        chosen = tl.where(best < limit, chosen, own)
    tl.store(labels + row, chosen, mask=live)


def step(
    rows: Tensor,
    squares: Tensor,
    labels: Tensor,
    centres: Centres,
    join: Tensor,
    leave: Tensor | None,
    buckets: Buckets | None,
    phase: int,
    stride: int,
) -> Tensor:
    """See `steps._step`."""
    heads, n, dim = rows.shape
    if rows.is_cuda:  # the interpreter multiplies as exactly as the rows are given
        rows = rows.half()
    clusters = centres.rows.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    candidates = None if buckets is None else buckets.candidates
    groups, width = (1, clusters) if candidates is None else candidates.shape[1:]
    block_r, block_c, warps = _BLOCKS[candidates is not None, padded > 128]
    out = labels.int()
    bucket = number = starts = listed = out  # not looked at
    tiles = -(-(n - phase) // (stride * block_r))
    if candidates is not None:
        assert buckets is not None
        starts, listed = buckets.starts.int().contiguous(), candidates.int().contiguous()
        tiles = -(-n // (stride * block_r)) + groups  # an upper bound: the number itself stays on the device
        bucket, number = _tiles(starts, phase, stride, block_r, tiles)
    _step[(tiles, heads)](
        rows,
        squares,
        out if buckets is None else buckets.order.int(),
        out,
        bucket,
        number,
        starts,
        listed,
        centres.rows.to(rows.dtype),
        centres.squares,
        join,
        join if leave is None else leave,
        n,
        dim,
        clusters,
        groups,
        width,
        tiles,
        phase,
        STRIDE=stride,
        ORDERED=buckets is not None,
        LISTED=candidates is not None,
        EXCHANGE=leave is not None,
        DIM=padded,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return out.to(labels.dtype)


@triton.jit
def _list_tiles(
    starts,
    tile_bucket,
    tile_number,
    groups,
    tiles,
    phase,
    STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
):
    bucket, head = tl.program_id(0), tl.program_id(1)
    each = tl.arange(0, GROUPS)
    start = tl.load(starts + head * (groups + 1) + each, mask=each < groups, other=0)
    end = tl.load(starts + head * (groups + 1) + each + 1, mask=each < groups, other=0)
    first = start + (phase + STRIDE - start % STRIDE) % STRIDE
    active = (tl.maximum(end - first, 0) + STRIDE - 1) // STRIDE
    counts = (active + BLOCK_R - 1) // BLOCK_R
    before = tl.sum(tl.where(each < bucket, counts, 0), 0)
    mine = tl.sum(tl.where(each == bucket, counts, 0), 0)
    out = head * tiles + before
    for done in range(0, mine, 64):
        number = done + tl.arange(0, 64)
        tl.store(tile_bucket + out + number, tl.zeros([64], tl.int32) + bucket, mask=number < mine)
        tl.store(tile_number + out + number, number, mask=number < mine)
    if bucket == groups - 1:  # what is left belongs to nobody
        for done in range(before + mine, tiles, 64):
            tile = done + tl.arange(0, 64)
            tl.store(tile_bucket + head * tiles + tile, tl.zeros([64], tl.int32) + groups, mask=tile < tiles)


def _tiles(starts: Tensor, phase: int, stride: int, block: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Bucket of each tile [H, tiles] int32 (the number of buckets where there is none left), and which of its tiles."""
    heads, groups = starts.shape[0], starts.shape[1] - 1
    bucket, number = torch.empty(2, heads, tiles, dtype=torch.int32, device=starts.device)
    _list_tiles[(groups, heads)](
        starts,
        bucket,
        number,
        groups,
        tiles,
        phase,
        STRIDE=stride,
        BLOCK_R=block,
        GROUPS=triton.next_power_of_2(groups),
    )
    return bucket, number


@triton.jit
def _run_means(
    rows,
    order,
    offsets,
    weights,
    means,
    stride,
    n,
    dim,
    runs,
    ORDERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + head * (runs + 1) + run)
    end = tl.load(offsets + head * (runs + 1) + run + 1)
    channel = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    mass = tl.zeros([], tl.float32)
    for first in range(start, end, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = place < end
        row = place
        if ORDERED:
            row = tl.load(order + head * n + place, mask=live, other=0)
        x = tl.load(
            rows + head * stride + row[:, None] * dim + channel[None, :],
            mask=live[:, None] & (channel < dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + head * n + row, mask=live, other=0.0)
            total += tl.sum(x * weight[:, None], 0)
            mass += tl.sum(weight, 0)
        else:
            total += tl.sum(x, 0)
            mass += tl.sum(live.to(tl.float32), 0)
    mean = total / tl.maximum(mass, 1e-12)
    tl.store(means + (head * runs + run) * dim + channel, mean, mask=channel < dim)


def run_means(rows: Tensor, order: Tensor | None, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """See `steps.run_means`."""
    heads, n, dim = rows.shape
    rows = _row_major(rows)
    runs = offsets.shape[1] - 1
    means = torch.empty(heads, runs, dim, device=rows.device)
    _run_means[(runs, heads)](
        rows,
        means if order is None else order.int(),
        offsets.int().contiguous(),
        means if weights is None else weights,
        means,
        rows.stride(0),
        n,
        dim,
        runs,
        ORDERED=order is not None,
        WEIGHTED=weights is not None,
        DIM=triton.next_power_of_2(dim),
        BLOCK=_MEANS[0],
        num_warps=_MEANS[1],
    )
    return means


def _row_major(rows: Tensor) -> Tensor:
    """Rows that lie one behind the other within a head, as those of a longer store do."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()


@triton.jit
def _run_spread(
    rows,
    offsets,
    means,
    spread,
    stride,
    dim,
    runs,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + head * (runs + 1) + run)
    end = tl.load(offsets + head * (runs + 1) + run + 1)
    channel = tl.arange(0, DIM)
    mean = tl.load(means + (head * runs + run) * dim + channel, mask=channel < dim, other=0.0)
    total = 0.0
    for first in range(start, end, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = (place < end)[:, None] & (channel < dim)[None, :]
        x = tl.load(rows + head * stride + place[:, None] * dim + channel[None, :], mask=live, other=0.0)
        residual = tl.where(live, x.to(tl.float32) - mean[None, :], 0.0)
        total += tl.sum(tl.sum(residual * residual, 1), 0)
    tl.store(spread + head * runs + run, total / (dim * tl.maximum(end - start, 1)).to(tl.float32))


def run_spread(rows: Tensor, offsets: Tensor, means: Tensor) -> Tensor:
    """See `steps.run_spread`."""
    heads, _, dim = rows.shape
    rows = _row_major(rows)
    runs = offsets.shape[1] - 1
    spread = torch.empty(heads, runs, device=rows.device)
    _run_spread[(runs, heads)](
        rows,
        offsets.int().contiguous(),
        means,
        spread,
        rows.stride(0),
        dim,
        runs,
        DIM=triton.next_power_of_2(dim),
        BLOCK=32,
        num_warps=4,
    )
    return spread


@triton.jit
def _farthest(
    rows,
    squares,
    order,
    offsets,
    centres,
    centre_squares,
    far,
    gains,
    n,
    dim,
    runs,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + head * (runs + 1) + run)
    end = tl.load(offsets + head * (runs + 1) + run + 1)
    mine = head * runs + run
    channel = tl.arange(0, DIM)
    centre = tl.load(centres + mine * dim + channel, mask=channel < dim, other=0.0)
    centre_square = tl.load(centre_squares + mine)
    found = n - 1
    most = -1.0
    for first in range(start, end, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = place < end
        row = tl.load(order + head * n + place, mask=live, other=0)
        x = tl.load(
            rows + (head * n + row)[:, None] * dim + channel[None, :],
            mask=live[:, None] & (channel < dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        distance = tl.load(squares + head * n + row, mask=live, other=0.0) + centre_square
        distance = tl.maximum(distance - 2.0 * tl.sum(x * centre[None, :], 1), 0.0)
        distance = tl.where(live, distance, -1.0)
        here = tl.max(distance, 0)
        at = tl.min(tl.where(distance == here, row, n), 0)
        found = tl.where(here > most, at, tl.where(here == most, tl.minimum(found, at), found))
        most = tl.maximum(most, here)
    there = tl.load(rows + (head * n + found) * dim + channel, mask=channel < dim, other=0.0).to(tl.float32)
    # |x - c|^2 - |x - f|^2, in which |x|^2 is no more.
    level = centre_square - tl.load(squares + head * n + found)
    gain = 0.0
    for first in range(start, end, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = place < end
        row = tl.load(order + head * n + place, mask=live, other=0)
        x = tl.load(
            rows + (head * n + row)[:, None] * dim + channel[None, :],
            mask=live[:, None] & (channel < dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        nearer = level + 2.0 * tl.sum(x * (there - centre)[None, :], 1)
        gain += tl.sum(tl.where(live, tl.maximum(nearer, 0.0), 0.0), 0)
    tl.store(far + mine, found)
    tl.store(gains + mine, gain)


def farthest(rows: Tensor, squares: Tensor, order: Tensor, offsets: Tensor, centres: Centres) -> tuple[Tensor, Tensor]:
    """See `steps.farthest`."""
    heads, n, dim = rows.shape
    runs = offsets.shape[1] - 1
    far = torch.empty(heads, runs, dtype=torch.int32, device=rows.device)
    gains = torch.empty(heads, runs, device=rows.device)
    _farthest[(runs, heads)](
        rows,
        squares,
        order.int(),
        offsets.int().contiguous(),
        centres.rows,
        centres.squares,
        far,
        gains,
        n,
        dim,
        runs,
        DIM=triton.next_power_of_2(dim),
        BLOCK=32,
        num_warps=4,
    )
    return far.long(), gains
