"""When reading every key is faster for a generated token on a CPU: a model of both, fitted to measurements.

Keys in a row stream at memory's pace; a kept key lies among others that are passed over, and a centroid in 8 bits is
widened and multiplied twice, for its score and for what stands in for its keys. Fitted on two cores, in units of one
key in a row: 5,500 tokens of three KV heads, head_dim 64, and 131,072 of eight, head_dim 128 (docs/results/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

_START = 6000.0  # of a layer, whatever its heads
_KEPT = 2.0
_SCORED = 1.5
_STOOD_IN = 1.5


def selecting_pays(tokens: int, kv_heads: int, clusters: Sequence[int], kept: float, stand_ins: bool) -> bool:
    """Whether squeezed attention of one query is expected to take less time than attention to all fixed tokens.

    Args:
        tokens: fixed tokens.
        clusters: per KV head on each level, finest first; of every level but the coarsest about half is scored.
        kept: share of keys expected to be kept.
        stand_ins: what is left out is attended at its centroids.
    """
    scored = clusters[-1] + sum(clusters[:-1]) / 2
    squeezed = _START / kv_heads + _KEPT * kept * tokens + (_SCORED + (_STOOD_IN if stand_ins else 0.0)) * scored
    return squeezed < tokens
