"""Which queries of a block decide for all of it what is attended.

A block's score of a cluster is a mean over its queries, and a mean over a few of them is nearly the same, while scoring
takes two products of all queries with all centroids, a third of a long question's time. So some may vote for all; what
is selected is attended by every query.
"""

from __future__ import annotations


def voting(queries: int, most: int | None) -> slice:
    """The queries of a block that vote: all where `most` is None, else at most that many, evenly spaced.

    Every s-th votes, s the least whole number for which these are no more than `most`, starting in the middle of the
    first s. One at least.
    """
    step = 1 if most is None else -(-queries // most)
    return slice(step // 2, queries, step)


def voters(queries: int, most: int | None) -> int:
    """How many vote: scores are means over that many queries, and thresholds must be."""
    return len(range(*voting(queries, most).indices(queries)))
