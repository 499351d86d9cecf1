"""When dense attention is faster: a model of both, fitted to the measurements in docs/results/kernel-notes.md.

Decoding is bound by bytes and by launches, question prefill by products; each is a constant plus work over a rate.
Fitted on one H100 80GB (2026-11-21 and 2026-11-22) over 8K to 1M tokens, 8 and 32 KV heads, head_dim 128, and on whole
steps of models with 2 and 8 KV heads, head_dim 64 and 128.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """One call: `tokens` fixed tokens, `queries` that share a selection, `kept` the share of keys expected to be kept.

    `clusters` per KV head on each level, finest first; of every level but the coarsest about half is scored.
    `centroid_bytes` are those of one centroid, with what is stored beside it; 0 is those of a key.
    `stand_ins`: what is left out is attended at its centroids. `voters`: of the queries, by which clusters are scored;
    None: all. `with_own`: a generated token, whose own tokens are attended too: beside scoring in squeezed attention,
    in launches of their own, joined by another, in dense.
    """

    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    head_dim: int
    tokens: int
    clusters: tuple[int, ...]
    kept: float
    key_bytes: int = 2
    centroid_bytes: int = 0
    stand_ins: bool = False
    voters: int | None = None
    with_own: bool = False


@dataclass(frozen=True)
class DeviceRates:
    """Of one kind of GPU: microseconds per call, bytes and operations per microsecond."""

    dense_start: float = 8.0
    dense_own_start: float = 11.0
    dense_bytes: float = 3.13e6
    dense_flops: float = 600e6
    dense_flops_of_few: float = 250e6
    dense_flops_per_query: float = 1.45e6
    dense_reread: float = 0.14
    squeezed_start: float = 12.5
    level_start: float = 7.0
    stand_in_start: float = 8.0
    squeezed_bytes: float = 2.95e6
    score_flops: float = 440e6
    attend_flops: float = 425e6
    stand_in_flops: float = 230e6
    joined_rows: float = 360.0


H100 = DeviceRates()


def dense_microseconds(shape: AttentionShape, rates: DeviceRates = H100) -> float:
    """Expected time of the fastest dense attention over all fixed tokens, 16-bit."""
    # The questions of a batch read the same keys about together: caches serve most of each one's reads but the first's.
    reads = 1 + rates.dense_reread * (shape.batch - 1)
    moved = 4 * shape.kv_heads * shape.tokens * shape.head_dim * reads
    flops = 4 * shape.batch * shape.q_heads * shape.queries * shape.tokens * shape.head_dim
    # Few queries fill the matrix units badly, whatever the kernel.
    rate = min(rates.dense_flops, max(rates.dense_flops_of_few, rates.dense_flops_per_query * shape.queries))
    start = rates.dense_start + (rates.dense_own_start if shape.with_own else 0.0)
    return start + max(moved / rates.dense_bytes, flops / rate)


def squeezed_microseconds(shape: AttentionShape, rates: DeviceRates = H100) -> float:
    """Expected time of score, select, attend and join together."""
    scored = shape.clusters[-1] + sum(shape.clusters[:-1]) / 2
    kept = shape.tokens * shape.kept
    key = shape.head_dim * shape.key_bytes
    row_flops = 4 * shape.batch * shape.q_heads * shape.head_dim
    voters = shape.queries if shape.voters is None else shape.voters
    read = scored * (shape.centroid_bytes or key) + 2 * kept * key
    moved = shape.batch * shape.kv_heads * read / rates.squeezed_bytes
    start = rates.squeezed_start + rates.level_start * (len(shape.clusters) - 1)
    if shape.stand_ins:
        start += rates.stand_in_start * len(shape.clusters)
    if shape.q_heads // shape.kv_heads * shape.queries <= 32:
        return start + moved
    products = voters * scored / rates.score_flops + shape.queries * kept / rates.attend_flops
    if shape.stand_ins:
        products += shape.queries * scored / rates.stand_in_flops
    joined = shape.batch * shape.q_heads * shape.queries / rates.joined_rows
    return start + joined + max(moved, row_flops * products)
