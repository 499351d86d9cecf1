"""The two steps that k-means is made of, in plain torch: find a better cluster for each row, take means.

These are the definitions, and what runs on a CPU; `squeezed.clustering.triton` does the same on a GPU.

Shapes: H heads, n rows of D dimensions, K clusters, G buckets of rows whose candidates are the same M clusters. Numbers
of rows and clusters are int64, as torch wants its indices; where the kernels do the work they may be int32.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 1e18  # added to the squared distance of a cluster that nothing may join; its square is still a number
_NEAR = 1e-12  # least squared distance: rounding may give less than nothing
_SCORES = 2**22  # float32 scores held at once on a CPU: 16 MB, so that they stay in its caches
_TILE = 64  # rows that share one copy of their candidates


class Buckets(NamedTuple):
    """Which clusters a row is compared with.

    Attributes:
        order: [H, n], the rows bucket by bucket.
        starts: [H, G + 1], bucket g's rows are order[starts[g] : starts[g + 1]].
        candidates: [H, G, M], clusters; None is one bucket, for which every cluster is one. Where a row has a cluster
            that it may leave, its bucket's candidates begin with the clusters of the bucket's rows, in order and once.
    """

    order: Tensor
    starts: Tensor
    candidates: Tensor | None


class Centres(NamedTuple):
    """The clusters' centres [H, K, D] float32, their squared lengths [H, K] (FAR if empty), and weights [H, K]."""

    rows: Tensor
    squares: Tensor
    sizes: Tensor


def places(rows: Tensor) -> torch.dtype:
    """Of numbers of rows and clusters, where `rows` are: what needs no conversion from step to step."""
    return torch.int32 if _on_gpu(rows) else torch.int64


def nearest(rows: Tensor, squares: Tensor, centres: Centres, buckets: Buckets | None = None) -> Tensor:
    """Each row's nearest centre among its candidates, [H, n] of `places`; every centre is one without buckets.

    Args:
        rows: [H, n, D].
        squares: [H, n] float32, squared lengths of the rows.
    """
    labels = torch.zeros(rows.shape[:2], dtype=places(rows), device=rows.device)
    ones = torch.ones_like(centres.squares)
    return _step(rows, squares, labels, centres, ones, None, buckets, 0, 1)


def exchange(rows: Tensor, squares: Tensor, labels: Tensor, centres: Centres, buckets: Buckets, phase: int) -> Tensor:
    """Move every other row of a bucket to where the sum of squared distances falls most (Hartigan and Wong 1979).

    A row that leaves a cluster of N rows takes N / (N - 1) times its squared distance out of the sum, and one that
    joins adds N / (N + 1) times: small clusters, which nearest centres alone would leave as they are, find their rows.
    Rows are judged at once, each as if alone; that every other one stays keeps a cluster's rows from leaving together.

    Args:
        labels: [H, n] of `places`.
        buckets: ordered by cluster.
        phase: 0 or 1, which half of the places in `buckets.order` is looked at.

    Returns:
        [H, n], the new labels.
    """
    sizes = centres.sizes
    join = (sizes / (sizes + 1)).clamp_(min=_NEAR)
    leave = (sizes / (sizes - 1)).nan_to_num_(posinf=0.0)  # who is alone stays
    return _step(rows, squares, labels.clone(), centres, join, leave, buckets, phase, 2)


def nearest_other(centres: Centres, buckets: Buckets | None) -> Tensor:
    """Each centre's nearest other one [H, K] int64, with buckets among its candidates; itself if it is in no bucket."""
    rows, ones = centres.rows, torch.ones_like(centres.squares)
    itself = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
    return _step(rows, centres.squares, itself.clone(), centres, ones, FAR * ones, buckets, 0, 1)


def farthest(rows: Tensor, squares: Tensor, order: Tensor, offsets: Tensor, centres: Centres) -> tuple[Tensor, Tensor]:
    """The row of each cluster that lies farthest from its centre, and what a cluster of its own would gain.

    Args:
        order, offsets: the clusters' rows, as for `run_means`.

    Returns:
        [H, K] int64, any row for an empty cluster; and [H, K] float32, by how much the sum of squared distances falls
        if the row becomes a centre, and those of its cluster that are nearer to it follow.
    """
    if _on_gpu(rows):
        from squeezed.clustering import triton

        return triton.farthest(rows, squares, order, offsets, centres)
    heads, n, _ = rows.shape
    runs = offsets.shape[1] - 1
    far = torch.zeros(heads, runs, dtype=torch.int64)
    gain = torch.zeros(heads, runs)
    sizes = offsets[:, 1:] - offsets[:, :-1]
    for head in range(heads):
        run = torch.repeat_interleave(sizes[head], output_size=n)
        here = order[head]
        wide, square = rows[head, here].float(), squares[head, here]
        distance = square + centres.squares[head, run] - 2 * (wide * centres.rows[head, run]).sum(-1)
        distance.clamp_(min=0)
        most = torch.full((runs,), -1.0).scatter_reduce_(0, run, distance, "amax")
        first = torch.where(distance == most[run], here, n)
        chosen = torch.full((runs,), n).scatter_reduce_(0, run, first, "amin").clamp_(max=n - 1)
        there = rows[head, chosen].float()
        distance -= square + squares[head, chosen][run] - 2 * (wide * there[run]).sum(-1)
        far[head] = chosen
        gain[head].index_add_(0, run, distance.clamp_(min=0))
    return far, gain


def run_means(rows: Tensor, order: Tensor | None, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of each run of rows: [H, K, D] float32, 0 for a run without weight.

    Args:
        rows: [H, n, D].
        order: [H, n]; run k is the rows order[offsets[k] : offsets[k + 1]]. None: they lie in that order.
        offsets: [H, K + 1].
        weights: [H, n] float32; 1 each when None.
    """
    if _on_gpu(rows):
        from squeezed.clustering import triton

        return triton.run_means(rows, order, offsets, weights)
    heads, n, dim = rows.shape
    sizes = offsets.diff(dim=1)
    means = torch.zeros(heads, sizes.shape[1], dim, device=rows.device)
    for head in range(heads):  # a float32 copy of one head's rows at a time
        run = _run_of_row(sizes[head], None if order is None else order[head], n)
        wide, mass = rows[head].float(), sizes[head].float()
        if weights is not None:
            wide = wide * weights[head].unsqueeze(-1)
            mass = torch.zeros_like(mass).index_add_(0, run, weights[head])
        means[head].index_add_(0, run, wide)
        means[head] /= mass.clamp(min=_NEAR).unsqueeze(-1)
    return means


def run_spread(rows: Tensor, offsets: Tensor, means: Tensor) -> Tensor:
    """Mean over the dimensions of each run's variance, [H, K] float32: rows [H, n, D] in order, means [H, K, D]."""
    if _on_gpu(rows):
        from squeezed.clustering import triton

        return triton.run_spread(rows, offsets, means)
    heads, n, _ = rows.shape
    sizes = offsets.diff(dim=1)
    spread = torch.zeros(sizes.shape, device=rows.device)
    for head in range(heads):
        run = _run_of_row(sizes[head], None, n)
        residual = rows[head].float() - means[head, run]
        spread[head].index_add_(0, run, residual.square_().mean(-1))
    return spread / sizes.clamp(min=1)


def _run_of_row(sizes: Tensor, order: Tensor | None, n: int) -> Tensor:
    """[n] int64, the run of each row of one head."""
    run = torch.repeat_interleave(sizes, output_size=n)
    return run if order is None else torch.empty_like(run).scatter_(0, order, run)


def _step(
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
    """Write new labels into `labels`: where the score join * (|x|^2 + |c|^2 - 2 x.c) is least.

    With `leave`, only if that is less than the own cluster's leave * (...).
    """
    if _on_gpu(rows):
        from squeezed.clustering import triton

        return triton.step(rows, squares, labels, centres, join, leave, buckets, phase, stride)
    candidates = None if buckets is None else buckets.candidates
    if candidates is None:
        _step_all(
            rows, squares, labels, centres, join, leave, None if buckets is None else buckets.order, phase, stride
        )
    else:
        assert buckets is not None
        _step_tiles(rows, squares, labels, centres, join, leave, buckets, candidates, phase, stride)
    return labels


def _step_all(
    rows: Tensor,
    squares: Tensor,
    labels: Tensor,
    centres: Centres,
    join: Tensor,
    leave: Tensor | None,
    order: Tensor | None,
    phase: int,
    stride: int,
) -> None:
    """Every centre is a candidate: whole blocks of rows of all heads."""
    heads, n, _ = rows.shape
    count = centres.rows.shape[1]
    if order is None:
        order = torch.arange(n, device=rows.device).expand(heads, -1)
    ids = torch.arange(count, device=rows.device).expand(heads, -1)
    table = _table(centres, join)
    places = order[:, phase::stride] + n * _heads(order)
    for some in places.split(max(1, _SCORES // (heads * count)), dim=1):
        _settle(rows, squares, labels, centres, leave, some, ids, table)


def _step_tiles(
    rows: Tensor,
    squares: Tensor,
    labels: Tensor,
    centres: Centres,
    join: Tensor,
    leave: Tensor | None,
    buckets: Buckets,
    candidates: Tensor,
    phase: int,
    stride: int,
) -> None:
    """Rows of a bucket in tiles of equal size, the last of each bucket filled up with its last row."""
    n = rows.shape[1]
    groups, width = candidates.shape[1:]
    count = centres.rows.shape[1]
    tile = max(_TILE, width // 4)
    first = buckets.starts[:, :-1] + (phase - buckets.starts[:, :-1]) % stride
    active = ((buckets.starts[:, 1:] - first).clamp(min=0) + stride - 1) // stride
    tiles = ((active + tile - 1) // tile).flatten()
    bucket_of_tile = torch.repeat_interleave(tiles)
    number = torch.arange(len(bucket_of_tile), device=rows.device) - (tiles.cumsum(0) - tiles)[bucket_of_tile]
    inside = number.unsqueeze(1) * tile + torch.arange(tile, device=rows.device)
    inside = torch.minimum(inside, active.flatten()[bucket_of_tile].unsqueeze(1) - 1)
    head = bucket_of_tile // groups
    places = first.flatten()[bucket_of_tile].unsqueeze(1) + stride * inside
    chosen = buckets.order.flatten()[places + n * head.unsqueeze(1)] + n * head.unsqueeze(1)
    ids, table = candidates.flatten(0, 1), _table(centres, join).flatten(0, 1)
    step = max(1, _SCORES // (tile * width + width * rows.shape[2]))
    for some, bucket in zip(chosen.split(step), bucket_of_tile.split(step), strict=True):
        mine = ids[bucket]
        place = mine + count * (bucket // groups).unsqueeze(1)
        found = table.index_select(0, place.flatten()).view(*place.shape, table.shape[1])
        _settle(rows, squares, labels, centres, leave, some, mine, found)


def _heads(like: Tensor) -> Tensor:
    """[H, 1], the number of each head."""
    return torch.arange(like.shape[0], device=like.device).unsqueeze(1)


def _table(centres: Centres, join: Tensor) -> Tensor:
    """[H, K, D + 2]: what gives the scores of a row when multiplied with (row, its squared length, 1)."""
    weight = join.unsqueeze(-1)
    return torch.cat([-2 * weight * centres.rows, weight, weight * centres.squares.unsqueeze(-1)], dim=-1)


def _settle(
    rows: Tensor,
    squares: Tensor,
    labels: Tensor,
    centres: Centres,
    leave: Tensor | None,
    chosen: Tensor,
    ids: Tensor,
    table: Tensor,
) -> None:
    """New labels of the rows `chosen` [T, B] (places in all heads' rows) among the clusters `ids` [T, M].

    `table` [T, M, D + 2] is `_table` of those.
    """
    n, count = rows.shape[1], centres.rows.shape[1]
    x = rows.flatten(0, 1).index_select(0, chosen.flatten()).view(*chosen.shape, rows.shape[2]).float()
    square = squares.flatten()[chosen].unsqueeze(-1)
    scores = torch.bmm(torch.cat([x, square, torch.ones_like(square)], dim=-1), table.transpose(1, 2))
    if leave is None:
        labels.view(-1)[chosen] = ids.gather(1, scores.argmin(-1))
        return
    own = labels.view(-1)[chosen]
    place = own + count * (chosen // n)
    distance = square.squeeze(-1) + centres.squares.flatten()[place]
    mean = centres.rows.flatten(0, 1).index_select(0, place.flatten()).view_as(x)
    distance -= 2 * (x * mean).sum(-1)
    distance.clamp_(min=_NEAR)
    least, which = scores.scatter_(2, (own - ids[:, :1]).unsqueeze(-1), FAR).min(-1)
    better = least < leave.flatten()[place] * distance
    labels.view(-1)[chosen] = torch.where(better, ids.gather(1, which), own)


def _on_gpu(rows: Tensor) -> bool:
    return rows.is_cuda and find_spec("triton") is not None
