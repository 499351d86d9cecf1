"""Distances between keys as queries feel them.

Two keys may be exchanged for one another if queries give them the same logit: the expected squared difference of
their logits is (k - k') E[q q^T] (k - k')^T. So keys are clustered in k L, with L L^T that second moment over the
fixed context's own queries and some of any direction, by Euclidean distance. The paper clusters by cosine similarity.

A user asks what the text itself seldom asks: with three queries of any direction to ten of the text's own, the worst
hundredth of all outputs errs less than by the text's own alone (by 0 to 10%), and the mean no more, on SmolLM2 as on
Qwen2.5 (docs/results/selection-notes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 0.3  # weight of queries of any direction, that of the text's own being 1
_ENOUGH = 16  # queries per dimension below which the text's own count for less


def add_moment(moment: Tensor | None, query: Tensor, kv_heads: int) -> Tensor:
    """The sum of q^T q over all queries so far and those of `query` [1, q_heads, m, D]: [kv_heads, D, D] float32."""
    grouped = query[0].reshape(kv_heads, -1, query.shape[-1]).float()
    more = grouped.transpose(1, 2) @ grouped
    return more if moment is None else moment + more


def factor(moment: Tensor, queries: int) -> Tensor:
    """L with L L^T the second moment of those queries, [kv_heads, D, D] float32 lower triangular, of unit mean square.

    Args:
        moment: [kv_heads, D, D], sum of q^T q.
        queries: how many were summed for each KV head.
    """
    dim = moment.shape[-1]
    trace = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-30)
    ridge = max(_RIDGE, _ENOUGH * dim / max(1, queries))
    eye = torch.eye(dim, device=moment.device)
    return torch.linalg.cholesky(moment / trace + ridge * eye) / (1 + ridge) ** 0.5
