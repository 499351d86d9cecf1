"""How much arithmetic and memory traffic k-means takes, for predictions and to judge a measured time by."""

from __future__ import annotations

from squeezed.clustering.batched_kmeans import _CANDIDATES, _EXACT, _EXACT_GROUP, _GROUP, _REGROUP

_ELEMENT = 2  # bytes of a row's element on a GPU


def kmeans_work(rows: int, dim: int, clusters: int, iterations: int) -> tuple[float, float]:
    """Floating-point operations and bytes of `kmeans` on the rows of one head, every pass taken.

    Each row is compared with every seed (or _EXACT of them) once and with its candidates in half of the passes; groups
    are found among the centres. Bytes are those of the rows alone: read and written as they are prepared, read once by
    the first assignment, and by each pass as it takes means and, half of them, as it exchanges.
    """
    width = 2.0 * rows * dim
    first = min(clusters, _EXACT) + (clusters // _EXACT_GROUP if clusters > _EXACT else 0)
    flops = width * first + width / 2 * min(clusters, _CANDIDATES) * iterations
    if clusters > _CANDIDATES:
        flops += 4 * 2.0 * clusters * dim * (clusters // _GROUP) * -(-iterations // _REGROUP)
    return flops, _ELEMENT * rows * dim * (3 + 1.5 * iterations)
