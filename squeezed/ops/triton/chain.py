"""The whole of attention to a fixed context on the GPU: score, select, attend, as one registered operator.

No step reads anything back to the host and every buffer has the size of the worst case, so a call can be captured in a
CUDA graph; the thresholds are read from device memory, so they may change between replays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from squeezed.ops.layout import ChannelScales, ClusteredKeys, ClusterLevel, Recalled
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.ahead import part
from squeezed.ops.triton.attend import AttendConfig, attend_config, attend_list, join_list
from squeezed.ops.triton.join import Parts
from squeezed.ops.triton.own import OwnKeys, Tally
from squeezed.ops.triton.score import Scores, score_few_rows
from squeezed.ops.triton.score_many import score_many_rows
from squeezed.ops.triton.select import Replaced, WorkList, chunks_of, select_clusters
from squeezed.ops.triton.stand_in import LeftOut, attend_left_out
from squeezed.ops.voting import voters, voting

# Bytes of the next launch's weights: as many as memory has time for beside selecting and joining.
_ASKED_SELECTING, _ASKED_JOINING = 6 * 2**20, 6 * 2**20


def select_keys(
    query: Tensor,
    centroids: list[Tensor],
    sizes: list[Tensor],
    offsets: list[Tensor],
    clustered: int,
    log_thresholds: Tensor,
    window: tuple[int, int],
    scale: float,
    config: AttendConfig,
    scales: ChannelScales | None = None,
    spreads: list[Tensor] | None = None,
    kept: Tensor | None = None,
    centroid_values: list[Tensor] | None = None,
    own: OwnKeys | None = None,
    own_parts: Parts | None = None,
    many: bool | None = None,
    recalled: Recalled | None = None,
    ahead: Tensor | None = None,
) -> tuple[WorkList, list[LeftOut]]:
    """Score and select level by level, coarsest first.

    Args:
        query: [B, Hk, rows, D] contiguous, those that vote.
        centroids, sizes, offsets: of each level, finest first, as in `ClusterLevel`.
        clustered: number of keys in clusters.
        log_thresholds: [levels] float32 on the device, finest first.
        window: [start, end) of the keys that every list ends with.
        config: of the attention that will read the list.
        scales: of centroids stored in 8 bits.
        spreads: `ClusterLevel.spread` of each level, for second-order scores.
        kept: [levels, B * Hk] int32 to write what each level selects to.
        centroid_values: of each level, if they are to stand in for what is left out.
        own, own_parts: own tokens for the first launch to attend to as well, and where to; few rows only.
        many: whether to score as for many rows, without keeping logits; by default, if there are many.
        recalled: single keys to list as well.
        ahead: bytes that a later launch reads, for the L2 cache to be asked for.

    Returns:
        the list of keys, and each level's left-out clusters, coarsest first; none without `centroid_values`.
    """
    batch, kv_heads, rows, _ = query.shape
    problems = batch * kv_heads
    many = rows > dev.FEW_ROWS if many is None else many
    score = score_many_rows if many else score_few_rows
    work: WorkList | None = None
    left_out: list[LeftOut] = []
    for level in reversed(range(len(centroids))):
        ids, id_counts = (work.entries, work.counts) if work else (None, None)
        capacity = centroids[level].shape[1] if ids is None else ids.shape[1]
        status_words = problems * chunks_of(capacity, ids is not None, many, bool(centroid_values))
        spread = spreads[level] if spreads else None
        beside = (own, own_parts) if own is not None and work is None else ()
        scores: Scores = score(
            query, centroids[level], sizes[level], scale, status_words, ids, id_counts, scales, spread, *beside
        )
        finest = level == 0
        replaced = None
        if centroid_values:
            # Memory has no time for values as well where weights are asked for or two levels are scored.
            asked = centroid_values[level] if ahead is None and len(centroids) == 1 else None
            stood_in = (sizes if recalled is None else recalled.sizes)[level]
            replaced = Replaced(stood_in, spread, query, scale, asked)
        work = select_clusters(
            scores,
            scores.sync,
            offsets[level],
            clustered if finest else centroids[level - 1].shape[1],
            log_thresholds,
            level,
            window if finest else (0, 0),
            config.width if finest else 1,
            ids,
            id_counts,
            None if kept is None else kept[level],
            replaced,
            recalled if finest else None,
            ahead if finest else None,
        )
        if centroid_values:
            left_out.append(
                LeftOut(
                    work.left_out,
                    scores,
                    centroids[level],
                    centroid_values[level],
                    ids,
                    id_counts,
                )
            )
    assert work is not None
    return work, left_out


@torch.library.custom_op("squeezed::attend_fixed", mutates_args=())
def _attend_fixed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    centroids: list[Tensor],
    sizes: list[Tensor],
    offsets: list[Tensor],
    clustered: int,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    scales: list[Tensor],
    spreads: list[Tensor],
    centroid_values: list[Tensor],
    sink_rows: list[Tensor],
    most_voters: int | None,
    recalled: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    output, lse, kept = _attend(
        query, None, None, None, keys, values, centroids, sizes, offsets, clustered, log_thresholds, window_end, scale,
        scales, spreads, centroid_values, sink_rows, most_voters, recalled,
    )  # fmt: skip
    shape = (batch, q_heads, queries)
    return output.reshape(*shape, head_dim), lse.reshape(shape), kept.reshape(-1, batch, keys.shape[0])


def _attend(
    query: Tensor,
    own: OwnKeys | None,
    tally: Tally | None,
    ahead: Tensor | None,
    keys: Tensor,
    values: Tensor,
    centroids: list[Tensor],
    sizes: list[Tensor],
    offsets: list[Tensor],
    clustered: int,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    scales: list[Tensor],
    spreads: list[Tensor],
    centroid_values: list[Tensor],
    sink_rows: list[Tensor],
    most_voters: int | None,
    recalled: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and lse [B, Hk, rows, ...] and kept [levels, B * Hk]; the output of the query's dtype with own tokens."""
    batch, q_heads, queries, head_dim = query.shape
    dev.check_head_dim(head_dim)
    kv_heads = keys.shape[0]
    rows = q_heads // kv_heads * queries
    grouped = query.reshape(batch, kv_heads, rows, head_dim).contiguous()
    asking = grouped
    voting_rows = q_heads // kv_heads * voters(queries, most_voters)
    if voting_rows < rows:
        asking = query[:, :, voting(queries, most_voters)].reshape(batch, kv_heads, voting_rows, head_dim).contiguous()
    config = attend_config(head_dim, rows, keys.dtype, batch * kv_heads * keys.shape[1], bool(centroid_values))
    channel_scales = ChannelScales(*scales) if scales else None
    centroid_scales = channel_scales if centroids[0].dtype == torch.int8 else None
    kept = torch.empty(len(centroids), batch * kv_heads, dtype=torch.int32, device=query.device)
    sinks = (sink_rows[0], sink_rows[1]) if sink_rows else None
    apart = sink_rows[0].shape[1] if sink_rows else 0
    own_parts = None if own is None else Parts.empty(batch * kv_heads, own.parts, rows, head_dim, query.device)
    work, left_out = select_keys(
        asking,
        centroids,
        sizes,
        offsets,
        clustered,
        log_thresholds,
        (clustered + apart, window_end),
        scale,
        config,
        centroid_scales,
        spreads,
        kept,
        centroid_values,
        own,
        own_parts,
        # Stand-ins of few rows need every row's logits.
        rows > dev.FEW_ROWS or voting_rows < rows,
        Recalled.from_tensors(recalled) if recalled else None,
        part(ahead, 0, _ASKED_SELECTING),
    )
    key_scales = channel_scales if keys.dtype == torch.int8 else None
    parts = attend_list(grouped, keys, values, work, scale, config, key_scales)
    # Runs while the list is attended: see `squeezed.ops.triton.stand_in`.
    others = attend_left_out(grouped, left_out, sinks, scale, centroid_scales)
    dtype = torch.float32 if own is None else query.dtype
    following = part(ahead, _ASKED_SELECTING, _ASKED_JOINING)
    output, lse = join_list(grouped, parts, key_scales, others, own_parts, dtype, kept, tally, following)
    return output, lse, kept


@_attend_fixed.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    centroids: list[Tensor],
    sizes: list[Tensor],
    offsets: list[Tensor],
    clustered: int,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    scales: list[Tensor],
    spreads: list[Tensor],
    centroid_values: list[Tensor],
    sink_rows: list[Tensor],
    most_voters: int | None,
    recalled: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_heads, queries, _ = query.shape
    return (
        query.new_empty(query.shape, dtype=torch.float32),
        query.new_empty((batch, q_heads, queries), dtype=torch.float32),
        query.new_empty((len(centroids), batch, keys.shape[0]), dtype=torch.int32),
    )


def _spread_or_zero(level: ClusterLevel) -> Tensor:
    return torch.zeros_like(level.sizes, dtype=torch.float32) if level.spread is None else level.spread


def attend_fixed(
    query: Tensor,
    layer: ClusteredKeys,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    voters: int | None = None,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squeezed attention of one layer to its fixed context.

    Args:
        query: [B, Hq, M, D] float32, float16 or bfloat16; the M queries of a group of heads share one selection.
        layer: contiguous, on the query's device and of its dtype or in 8 bits.
        log_thresholds: [levels] float32 on the device, finest level first; -inf keeps every cluster, +inf none.
        window_end: keys [layer.clustered, window_end) are always attended.
        scale: softmax scale.
        voters: most of the M queries by which clusters are scored, see `squeezed.ops.voting`; None: all.
        recalled: single keys to attend to as well.

    Returns:
        output [B, Hq, M, D] float32, log-sum-exp [B, Hq, M] float32 (0 and -inf where nothing is attended), and kept
        [levels, B, Hk] int32, finest first: the clustered keys attended, and of each coarser level how many clusters of
        the next finer one it left to look at.
    """
    arguments = _arguments(layer, log_thresholds, window_end, scale, voters, recalled)
    return torch.ops.squeezed.attend_fixed(query, *arguments)


def attend_with_own(
    query: Tensor,
    layer: ClusteredKeys,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    own: OwnKeys,
    tally: Tally | None,
    recalled: Recalled | None = None,
    ahead: Tensor | None = None,
) -> Tensor:
    """A decode step's whole attention, to the fixed context and to the own tokens: [B, Hq * D] of the query's dtype.

    Arguments as `attend_fixed`; query [B, Hq, 1, D] with at most `device.FEW_ROWS` heads per KV head; `ahead`: weights
    that the next launch reads.
    """
    arguments = _arguments(layer, log_thresholds, window_end, scale, None, recalled)
    output, _, _ = _attend(query, own, tally, ahead, *arguments)
    return output.reshape(query.shape[0], -1)


def _arguments(
    layer: ClusteredKeys,
    log_thresholds: Tensor,
    window_end: int,
    scale: float,
    most_voters: int | None,
    recalled: Recalled | None,
) -> tuple[Any, ...]:
    """What the operator takes after the query."""
    spreads: list[Tensor] = []
    if any(level.spread is not None for level in layer.levels):
        spreads = [_spread_or_zero(level) for level in layer.levels]
    return (
        layer.keys,
        layer.values,
        [level.centroids for level in layer.levels],
        [level.sizes for level in layer.levels],
        [level.offsets for level in layer.levels],
        layer.clustered,
        log_thresholds,
        window_end,
        scale,
        list(layer.scales or ()),
        spreads,
        [level.values for level in layer.levels if level.values is not None],
        list(layer.sinks or ()),
        most_voters,
        [] if recalled is None else recalled.tensors,
    )
