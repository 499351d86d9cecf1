"""The four operations in plain torch. These are the definitions; every other version is tested against them.

Shapes: B questions, Hq query heads, Hk KV heads (G = Hq // Hk query heads share one KV head and one selection),
M queries that share one selection (1 when decoding), D head_dim, N fixed tokens, K clusters of a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.ops.layout import ChannelScales, Recalled, from_eight_bits


def centroid_logits(
    grouped: Tensor, centroids: Tensor, scale: float, spread: Tensor | None, scales: ChannelScales | None
) -> Tensor:
    """Estimated logit of the keys of each cluster; every score of a cluster comes from here.

    s q.C_i, and with a spread v the next term of log E[exp(s q.k)] over the cluster's keys: + s^2 |q|^2 v_i / 2.

    Args:
        grouped: [B, Hk, rows, D] float32, the queries of each KV head's group.
        centroids, spread, scales: as for `score_centroids`.

    Returns:
        [B, Hk, rows, K] float32.
    """
    rows = centroids.float() if scales is None else from_eight_bits(centroids, *scales[:2])
    logits = scale * (grouped @ rows.transpose(-1, -2))
    if spread is not None:
        logits += 0.5 * scale**2 * grouped.square().sum(-1, keepdim=True) * spread.unsqueeze(1)
    return logits


def score_centroids(
    query: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    spread: Tensor | None = None,
    scales: ChannelScales | None = None,
) -> Tensor:
    """Log of the estimated attention weight of each key of each cluster (paper section 3.2, eq. 2 and 4).

    S_i = exp(s q.C_i) / sum_j N_j exp(s q.C_j), averaged over the M queries and the G heads of the group, in log space.
    With a spread, s q.C_i gets another term, see `centroid_logits`.

    Args:
        query: [B, Hq, M, D].
        centroids: [Hk, K, D].
        sizes: [Hk, K] int32, keys per cluster; 0 marks padding.
        scale: the attention module's own scaling s.
        allowed: [B, Hk, K] bool, clusters inside surviving coarser clusters; the denominator counts only those.
        spread: [Hk, K] float32, mean variance per dimension of the cluster's keys.
        scales: of centroids in 8 bits.

    Returns:
        [B, Hk, K] float32; -inf for padding and for what is not allowed.
    """
    batch, q_heads, queries, dim = query.shape
    kv_heads, clusters, _ = centroids.shape
    grouped = query.reshape(batch, kv_heads, (q_heads // kv_heads) * queries, dim).float()
    logits = centroid_logits(grouped, centroids, scale, spread, scales)
    valid = (sizes > 0).expand(batch, kv_heads, clusters)
    if allowed is not None:
        valid = valid & allowed
    logits = logits.masked_fill(~valid.unsqueeze(2), float("-inf"))
    log_sizes = sizes.clamp(min=1).log().unsqueeze(1)
    log_denominator = torch.logsumexp(logits + log_sizes, dim=-1, keepdim=True)
    # A row without any allowed cluster has denominator -inf; its scores must stay -inf, not become NaN.
    log_scores = (logits - log_denominator.nan_to_num(neginf=0.0)).logsumexp(dim=2)
    return log_scores - torch.log(torch.tensor(float(grouped.shape[2]), device=query.device))


def select_clusters(log_scores: Tensor, log_threshold: float) -> Tensor:
    """Clusters whose score is above the threshold (paper section 3.2): [B, Hk, K] bool.

    A threshold of -inf keeps every cluster but padding, +inf keeps none.
    """
    return log_scores > log_threshold


def expand_to_children(selected: Tensor, offsets: Tensor, children: int) -> Tensor:
    """Which children lie in a selected cluster.

    Args:
        selected: [B, Hk, K] bool.
        offsets: [Hk, K + 1] int32 CSR offsets into the children.
        children: number of children per head, padding included.

    Returns:
        [B, Hk, children] bool; False for children that belong to no cluster (padding, the window).
    """
    kv_heads, clusters = selected.shape[1:]
    parents = torch.searchsorted(
        offsets.contiguous(),
        torch.arange(children, dtype=offsets.dtype, device=offsets.device).expand(kv_heads, -1).contiguous(),
        right=True,
    )  # 1-based; 0 is before the first cluster, K + 1 past the last
    inside = (parents >= 1) & (parents <= clusters)
    index = (parents - 1).clamp(0, clusters - 1).expand(selected.shape[0], -1, -1)
    return selected.gather(2, index) & inside


def attend_selected(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    selected: Tensor | None,
    window: tuple[int, int],
    scale: float,
    scales: ChannelScales | None = None,
    bias: Tensor | None = None,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys of the selected clusters and the window.

    The same operation lets centroids stand in for clusters that are left out (Multipole Attention, arXiv 2506.13059,
    eq. 3): with centroids as keys, their mean values as values, one "key" per cluster and log N_i as bias.

    Args:
        query: [B, Hq, M, D].
        keys, values: [Hk, N, D], cluster by cluster, shared by all B questions.
        offsets: [Hk, K + 1] int32, the finest level's runs of keys.
        selected: [B, Hk, K] bool, or None for every key before the window's end (dense).
        window: [start, end) of the keys that are always attended.
        scale: softmax scale.
        scales: of keys and values in 8 bits.
        bias: [Hk, N] or [B, Hk, N] float32, added to the logits of every query.
        recalled: single keys that are attended whether their clusters are selected or not.

    Returns:
        output [B, Hq, M, D] float32 and log-sum-exp [B, Hq, M] float32 (-inf where nothing was attended).
    """
    if scales is not None:
        keys, values = from_eight_bits(keys, *scales[:2]), from_eight_bits(values, *scales[2:])
    batch, q_heads, queries, dim = query.shape
    kv_heads, tokens, _ = keys.shape
    position = torch.arange(tokens, device=keys.device)
    if selected is None:
        kept = (position < window[1]).expand(batch, kv_heads, tokens)
    else:
        in_window = (position >= window[0]) & (position < window[1])
        kept = expand_to_children(selected, offsets, tokens) | in_window
        if recalled is not None:
            kept = kept | _at(recalled.slots, tokens)
    grouped = query.reshape(batch, kv_heads, -1, dim).float()
    logits = scale * (grouped @ keys.float().transpose(-1, -2))
    if bias is not None:
        logits = logits + bias.unsqueeze(-2)
    logits = logits.masked_fill(~kept.unsqueeze(2), float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    output = weights @ values.float()
    return output.reshape(batch, q_heads, queries, dim), lse.reshape(batch, q_heads, queries)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys exactly, by their log-sum-exps.

    Args:
        parts: (output [..., D] float32, lse [...] float32) of each set.

    Returns:
        output [..., D] float32 and lse [...] float32 of the union; zeros and -inf where every part is empty.
    """
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(dim=0)
    base = lse.nan_to_num(neginf=0.0)
    output = sum((part_lse - base).exp().unsqueeze(-1) * part for part, part_lse in parts)
    return output, lse  # type: ignore[return-value]


def kept_keys(selected: Tensor, sizes: Tensor, recalled: Recalled | None = None) -> Tensor:
    """Number of clustered keys that a selection and recalled keys attend: [B, Hk] int64."""
    kept = (selected * sizes).sum(dim=-1)
    if recalled is not None:
        kept = kept + (~selected * (sizes - recalled.sizes[0])).sum(dim=-1)
    return kept


def _at(slots: Tensor, tokens: int) -> Tensor:
    """Which keys the slots [B, Hk, R] name: [B, Hk, tokens] bool."""
    marks = torch.zeros(*slots.shape[:2], tokens + 1, dtype=torch.bool, device=slots.device)
    return marks.scatter_(2, slots.long().where(slots >= 0, tokens), True)[..., :tokens]


def peak_weights(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: ChannelScales | None = None) -> Tensor:
    """The highest attention weight that any query of a KV head's group gives each key: [B, Hk, N] float32.

    Args:
        query: [B, Hq, M, D].
        keys: [Hk, N, D].
        lse: [B, Hq, M], log-sum-exp of each query's attention; +inf for a query that does not count.
        scale: softmax scale.
        scales: of keys in 8 bits.
    """
    if scales is not None:
        keys = from_eight_bits(keys, *scales[:2])
    batch, q_heads, queries, dim = query.shape
    kv_heads = keys.shape[0]
    rows = q_heads // kv_heads * queries
    logits = scale * (query.reshape(batch, kv_heads, rows, dim).float() @ keys.float().transpose(-1, -2))
    return (logits - lse.reshape(batch, kv_heads, rows, 1)).amax(2).exp()
