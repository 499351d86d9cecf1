"""k-means of all heads at once, at a cost that grows almost linearly with the text although its clusters grow with it.

1. Seeds are rows at even distances in the text. Neighbouring keys are alike, so that this spreads them better than
   k-means++ does, and costs nothing.
2. Each row takes its nearest seed. This is the one step that compares with all; beyond _EXACT clusters with that many.
3. Passes of exchanges (`steps.exchange`), in which a row is compared with the _CANDIDATES clusters around its own
   only: clusters are put into groups of _GROUP, anew every few passes.
4. Between them, clusters that are worth little are joined to their neighbour, and begin anew at the row that lies
   farthest out of all. It mends what the seeds have missed.

On real keys that ends 2% to 5% below scikit-learn's k-means++, whose clusters no row leaves as long as its own centre
is the nearest (docs/results/build-notes.md).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from squeezed.clustering.steps import (
    FAR,
    Buckets,
    Centres,
    exchange,
    farthest,
    nearest,
    nearest_other,
    places,
    run_means,
)
from squeezed.errors import InputError

METRICS = ("cosine", "euclidean")
_GROUP = 32  # clusters that lie together and share their candidates
_CANDIDATES = 128
# Seeds that a row is compared with at the start, and those that share them. Small groups matter where clusters lie in
# all directions alike: of 9,830 planted ones, with 16% of the seeds, groups of a 50th, 150th and 400th of them end
# 3.3%, 0.9% and 0.4% above comparing with all.
_EXACT = 8192
_EXACT_GROUP = 128
_REGROUP = 4  # passes with the same groups
_SETTLED = 0.02  # stop when passes move fewer than this share of the rows: 0.6% above where they would end
_MENDED = 0.005  # and clusters that began anew took off less than this share of the sum of squared distances
_DISTANCES = {"cpu": 2**24, "cuda": 2**28}  # float32 distances between centres held at once
_log = logging.getLogger(__name__)


def kmeans(
    vectors: Tensor,
    clusters: int,
    iterations: int = 20,
    weights: Tensor | None = None,
    metric: str = "cosine",
    space: Tensor | None = None,
) -> Tensor:
    """k-means of all heads at once, deterministic.

    Args:
        vectors: [heads, n, dim], any float dtype; sums are float32.
        clusters: number of clusters wanted, at most n.
        iterations: most passes after the first assignment; each looks at half of the rows.
        weights: [heads, n], how many keys each row stands for; 1 when None. Rows of weight 0 are padding at the end.
        metric: "cosine" clusters normalised rows, "euclidean" the rows as they are.
        space: [heads, dim, dim] float32; vectors @ space is clustered. None: the vectors themselves.

    Returns:
        [heads, n] int64 labels below `clusters`. Some labels may be unused (duplicate rows); see `build_levels`.

    Raises:
        InputError: one head does not fit into the GPU's free memory.
    """
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}: expected one of {', '.join(METRICS)}")
    together = vectors.shape[0]
    while True:
        try:
            return torch.cat(
                [
                    _kmeans(
                        vectors[some],
                        clusters,
                        iterations,
                        None if weights is None else weights[some].float(),
                        metric,
                        None if space is None else space[some],
                    )
                    for some in (slice(at, at + together) for at in range(0, len(vectors), together))
                ]
            )
        except torch.OutOfMemoryError as error:
            if together == 1:
                raise InputError(
                    f"the GPU's memory is too small to cluster {vectors.shape[1]:,} keys of one head; "
                    "free some of it (each of eval's --workers takes its own), or pass --device cpu"
                ) from error
        together = (together + 1) // 2
        torch.cuda.empty_cache()
        _log.warning("the GPU ran out of memory: clustering %d heads at a time", together)


def inertia(vectors: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    """[heads] float64, each row's squared distance to the mean of its cluster, summed; rows normalised for cosine."""
    found = []
    for head, label in zip(vectors, labels, strict=True):
        rows = torch.nn.functional.normalize(head.double(), dim=-1) if metric == "cosine" else head.double()
        sizes = torch.bincount(label)
        sums = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64, device=rows.device)
        means = sums.index_add_(0, label, rows) / sizes.clamp(min=1).unsqueeze(-1)
        found.append((rows - means[label]).square().sum())
    return torch.stack(found)


def _kmeans(
    vectors: Tensor, clusters: int, iterations: int, mass: Tensor | None, metric: str, space: Tensor | None
) -> Tensor:
    rows, squares = _prepare(vectors, metric, space)
    labels, groups = _regrouped(rows, _first_labels(rows, squares, mass, clusters), mass, clusters)
    moved, mended, looked_at = torch.zeros((), dtype=torch.int64, device=rows.device), rows.new_zeros(1), 0
    for iteration in range(iterations):
        if iteration and iteration % _REGROUP == 0:
            if int(moved) < _SETTLED * looked_at and float(mended.max()) < _MENDED:
                break
            # Until the second grouping, clusters that began anew were many.
            labels, groups = _regrouped(rows, labels, mass, clusters, groups if iteration > _REGROUP else None)
            moved.zero_()
            looked_at = 0
        if iteration < _REGROUP or iteration % _REGROUP == 0:
            labels, mended = _begin_anew(rows, squares, labels, mass, groups)
        order, offsets = _sorted(labels, clusters)
        centres = _centres(rows, order, offsets, mass)
        buckets = Buckets(order, offsets.gather(1, groups.starts), groups.candidates)
        before, labels = labels, exchange(rows, squares, labels, centres, buckets, iteration % 2)
        moved += (before != labels).sum()
        looked_at += labels.numel() // 2
    return labels.long()


def _regrouped(
    rows: Tensor, labels: Tensor, mass: Tensor | None, clusters: int, before: _Groups | None = None
) -> tuple[Tensor, _Groups]:
    """The clusters of `labels` in groups, see `_group`, and the labels in the groups' numbers."""
    centres = _centres(rows, *_sorted(labels, clusters), mass)
    groups = _group(centres, _GROUP, _CANDIDATES, before)
    return groups.number.gather(1, labels.long()).to(labels.dtype), groups


def _prepare(vectors: Tensor, metric: str, space: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows at most 1 long (float16 on a GPU, for its matrix units) and their squared lengths [heads, n] float32."""
    heads, n, dim = vectors.shape
    dtype = torch.float16 if vectors.is_cuda else torch.float32
    rows = torch.empty(heads, n, dim, dtype=dtype, device=vectors.device)
    squares = torch.empty(heads, n, device=vectors.device)
    step = max(1, _DISTANCES[vectors.device.type] // (heads * dim))
    blocks = [slice(first, first + step) for first in range(0, n, step)]
    # Euclidean distances do not depend on the origin, but their rounding does.
    centre = vectors.mean(dim=1, keepdim=True, dtype=torch.float32) if metric == "euclidean" else None

    def wide(block: slice) -> Tensor:
        some = vectors[:, block].float() if centre is None else vectors[:, block].float() - centre
        return some if space is None else some @ space

    longest = torch.full((heads, 1, 1), 1e-30, device=vectors.device)
    if centre is not None:
        for block in blocks:
            longest = torch.maximum(longest, wide(block).norm(dim=-1, keepdim=True).amax(dim=1, keepdim=True))
    for block in blocks:
        some = wide(block)
        rows[:, block] = torch.nn.functional.normalize(some, dim=-1) if centre is None else some / longest
        squares[:, block] = rows[:, block].float().square().sum(-1)
    return rows, squares


def _first_labels(rows: Tensor, squares: Tensor, mass: Tensor | None, clusters: int) -> Tensor:
    heads, n, dim = rows.shape
    present = torch.full((heads, 1), n, device=rows.device) if mass is None else (mass > 0).sum(1, keepdim=True)
    at = torch.arange(clusters, device=rows.device) * present // clusters
    seeds = _of(rows.gather(1, at.unsqueeze(-1).expand(-1, -1, dim)).float())
    if clusters <= _EXACT:
        return nearest(rows, squares, seeds)
    groups = _group(seeds, _EXACT_GROUP, _EXACT)
    order, offsets = _sorted(nearest(rows, squares, _of(groups.means)), groups.means.shape[1])
    renumbered = groups.number.argsort(1)
    seeds = Centres(*(part.gather(1, _wide(renumbered, part)) for part in seeds))
    return nearest(rows, squares, seeds, Buckets(order, offsets, groups.candidates))


def _of(rows: Tensor) -> Centres:
    """Centres that stand for one row each."""
    return Centres(rows, rows.square().sum(-1), torch.ones(rows.shape[:2], device=rows.device))


def _sorted(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Rows by cluster, stable: order [heads, n], and where each cluster begins in it, [heads, clusters + 1]."""
    heads, n = labels.shape
    kind = places(labels)
    head = torch.arange(heads, dtype=kind, device=labels.device).unsqueeze(1)
    # One sort of all heads: a GPU would take them one after another.
    found, order = (labels + head * clusters).int().flatten().sort(stable=True)
    bounds = torch.arange(clusters + 1, dtype=torch.int32, device=labels.device) + (head * clusters).int()
    offsets = torch.searchsorted(found.view(heads, n), bounds, out_int32=kind == torch.int32)
    return order.view(heads, n).to(kind).sub_(head * n), offsets


def _centres(rows: Tensor, order: Tensor, offsets: Tensor, mass: Tensor | None) -> Centres:
    sizes = offsets[:, 1:] - offsets[:, :-1]
    means = run_means(rows, order, offsets, mass)
    return Centres(means, means.square().sum(-1) + FAR * (sizes == 0), sizes.float())


class _Groups(NamedTuple):
    """Clusters numbered anew, so that rows sorted by cluster are sorted by group too.

    Attributes:
        number: [heads, clusters], each cluster's new number; the empty ones are last.
        starts: [heads, groups + 1], in new numbers.
        candidates: [heads, groups, M], the clusters around each group, in new numbers; None: all.
        means: [heads, groups, dim], of the groups' centres.
    """

    number: Tensor
    starts: Tensor
    candidates: Tensor | None
    means: Tensor

    def buckets_of_clusters(self) -> Buckets:
        """Each cluster to be compared with its group's candidates."""
        heads, clusters = self.number.shape
        return Buckets(
            torch.arange(clusters, device=self.number.device).expand(heads, -1), self.starts, self.candidates
        )


def _group(centres: Centres, size: int, width: int, before: _Groups | None = None) -> _Groups:
    """Groups of `size` clusters that lie near one another, all equally large, whatever the keys look like.

    A group's candidates are its own clusters, those nearest to its mean, and the nearest other one of each of its own:
    where clusters lie in all directions alike, few that matter are near the mean. That other one is looked for among
    all, the one part of a pass that grows with the square of the text; where `centres` are numbered as in the groups
    `before`, among the candidates that those had.
    """
    heads, clusters, _ = centres.rows.shape
    itself = torch.arange(clusters, device=centres.rows.device).expand(heads, -1)
    if clusters <= width:
        starts = torch.tensor([[0, clusters]], device=itself.device).expand(heads, -1)
        return _Groups(itself, starts, None, centres.rows[:, :1])
    order = _by_pivot(centres, clusters // size)
    number = torch.empty_like(order).scatter_(1, order, itself)
    partner = nearest_other(centres, before.buckets_of_clusters() if before else None)
    partner = number.gather(1, partner.gather(1, order))
    centres = Centres(*(part.gather(1, _wide(order, part)) for part in centres))
    starts = torch.arange(0, clusters + size, size, device=itself.device).clamp(max=clusters).expand(heads, -1)
    means = run_means(centres.rows, None, starts.contiguous())
    groups = means.shape[1]
    members = torch.arange(groups * size, device=itself.device).view(groups, size)
    within = members.clamp(max=clusters - 1)
    near = torch.empty(heads, groups, width - 2 * size, dtype=torch.int64, device=itself.device)
    step = max(1, _DISTANCES[itself.device.type] // (heads * clusters))
    for some in torch.arange(groups, device=itself.device).split(step):
        distances = torch.baddbmm(centres.squares.unsqueeze(1), means[:, some], centres.rows.transpose(1, 2), alpha=-2)
        distances.scatter_(2, within[some].expand(heads, -1, -1), FAR)
        near[:, some] = distances.topk(width - 2 * size, dim=-1, largest=False).indices
    # Its own are there once, so that a row may be kept from the one it is in.
    partners = partner[:, within]
    partners = torch.where(partners // size == members[:, :1] // size, near[..., :1], partners)
    own = torch.where(members < clusters, members, near[..., :1])
    return _Groups(number, starts, torch.cat([own, near, partners], dim=2).to(places(means)), means)


def _by_pivot(centres: Centres, pivots: int) -> Tensor:
    """Clusters sorted by the nearest of a few centres spread among them, [heads, clusters]; empty ones last."""
    empty = centres.sizes == 0
    present = (~empty).sum(1, keepdim=True)
    at = torch.arange(pivots, device=empty.device) * present // pivots
    at = empty.int().argsort(dim=1, stable=True).gather(1, at)
    chosen = _of(centres.rows.gather(1, _wide(at, centres.rows)))
    mass = centres.sizes.clamp(max=1)
    for _ in range(2):
        order, offsets = _sorted(nearest(centres.rows, centres.squares, chosen), pivots)
        chosen = _centres(centres.rows, order, offsets, mass)
    group = nearest(centres.rows, centres.squares, chosen).masked_fill_(empty, pivots)
    return group.argsort(dim=1, stable=True)


def _begin_anew(
    rows: Tensor, squares: Tensor, labels: Tensor, mass: Tensor | None, groups: _Groups
) -> tuple[Tensor, Tensor]:
    """Join pairs of clusters where that costs less than making the farthest row of another a cluster gains.

    Returns:
        [heads, n] new labels, and by how much the sum of squared distances fell: a share [heads].
    """
    clusters = groups.number.shape[1]
    order, offsets = _sorted(labels, clusters)
    centres = _centres(rows, order, offsets, mass)
    sizes = centres.sizes
    around = groups.buckets_of_clusters()
    itself = around.order
    partner = nearest_other(centres, around)
    apart = (centres.rows - centres.rows.gather(1, _wide(partner, centres.rows))).square().sum(-1)
    mates = sizes.gather(1, partner)
    cost = apart * sizes * mates / (sizes + mates).clamp(min=1)
    # Of each two that are each other's nearest, the later one gives way: no cluster is then part of two pairs.
    gives_way = (partner.gather(1, partner) == itself) & (itself > partner)
    cost = torch.where(sizes == 0, 0.0, torch.where(gives_way & (mates > 0), cost, FAR))
    far, gain = farthest(rows, squares, order, offsets, centres)
    gain = torch.where(sizes > 1, gain, -1.0)
    cheapest, joined = cost.sort(dim=1, stable=True)
    dearest, split = gain.sort(dim=1, descending=True, stable=True)
    worth = dearest > cheapest
    # A cluster that is to be split is in no pair, nor the other way round.
    to_split = torch.zeros_like(worth).scatter_(1, split, worth)
    paired = to_split.gather(1, joined) | (
        to_split.gather(1, partner.gather(1, joined)) & (sizes.gather(1, joined) > 0)
    )
    worth &= ~paired
    number = torch.where(worth & (sizes.gather(1, joined) > 0), partner.gather(1, joined), joined)
    kind = labels.dtype
    labels = itself.scatter(1, joined, number).gather(1, labels.long())
    n = labels.shape[1]
    row = torch.where(worth, far.gather(1, split), n)  # a column that is cut off again takes what is not worth it
    labels = torch.nn.functional.pad(labels, (0, 1)).scatter_(1, row, joined)[:, :n].to(kind).contiguous()
    inertia = squares.sum(1) - (sizes * centres.rows.square().sum(-1)).sum(1)
    return labels, (worth * (dearest - cheapest)).sum(1) / inertia.clamp(min=1e-30)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of rows [heads, m] as `gather` wants it for [heads, n] or [heads, n, dim]."""
    return index if like.dim() == 2 else index.unsqueeze(-1).expand(-1, -1, like.shape[2])
