"""CPU versions of the operations.

With many queries everything is matrix products, which torch runs well. With few (decoding) the time goes into reading
memory, and a general library loses: gathering rows writes and reads every kept key again. The compiled loops read each
kept key once for all query heads of its group, and split kept keys evenly over the cores whatever each head keeps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import get_num_threads
from torch import Tensor

from squeezed.ops.cpu import attend, score
from squeezed.ops.layout import ChannelScales, Recalled
from squeezed.ops.reference import expand_to_children, kept_keys, merge_attention, select_clusters

__all__ = [
    "attend_selected",
    "expand_to_children",
    "kept_keys",
    "merge_attention",
    "score_centroids",
    "select_clusters",
]

_STREAMED_ROWS = 32  # above this many query rows per KV head, matrix products are faster than the streaming loops
_ITEMS_PER_THREAD = 4  # work items per core: enough to even out, few enough to merge for free
_ONE_CORE = 2**22  # products of a scoring below which one core is faster than several
_LOGITS = 2**22  # logits held at once when many queries attend: 16 MB


def score_centroids(
    query: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    spread: Tensor | None = None,
    scales: ChannelScales | None = None,
) -> Tensor:
    """See :func:`squeezed.ops.reference.score_centroids`."""
    batch, q_heads, queries, dim = query.shape
    kv_heads, clusters, _ = centroids.shape
    rows = (q_heads // kv_heads) * queries
    grouped = query.reshape(batch, kv_heads, rows, dim).float()
    # [B, Hk, rows], of the query itself; what multiplies centroids in 8 bits is scaled. Their centre adds the same to
    # every logit of a row, which the scores' denominator takes away again.
    stretch = (0.5 * scale**2) * grouped.square().sum(-1)
    if centroids.dtype == torch.int8:
        assert scales is not None
        grouped = grouped * scales.key_scale.unsqueeze(1)
    if rows <= _STREAMED_ROWS and centroids.dtype != torch.float16:
        flat_allowed = np.empty((0, 0), np.bool_)
        if allowed is not None:
            flat_allowed = allowed.reshape(batch * kv_heads, clusters).contiguous().numpy()
        scores = np.empty((batch * kv_heads, clusters), np.float32)
        flat_query = grouped.reshape(batch * kv_heads, rows, dim).contiguous().numpy()
        flat_spread = np.empty((0, 0), np.float32) if spread is None else spread.numpy()
        small = flat_query.size * clusters < _ONE_CORE
        (score.score_rows_on_one_core if small else score.score_rows)(
            flat_query,
            _raw(centroids),
            sizes.numpy(),
            flat_allowed,
            flat_spread,
            stretch.reshape(batch * kv_heads, rows).numpy(),
            np.float32(scale),
            scores,
        )
        return torch.from_numpy(scores).view(batch, kv_heads, clusters)
    by_head = (grouped * scale).transpose(0, 1).reshape(kv_heads, batch * rows, dim)
    logits = torch.bmm(by_head, centroids.float().transpose(1, 2)).view(kv_heads, batch, rows, clusters)
    if spread is not None:
        logits.addcmul_(stretch.transpose(0, 1).unsqueeze(-1), spread[:, None, None, :])
    valid = (sizes > 0).unsqueeze(1)
    if allowed is not None:
        valid = valid & allowed.transpose(0, 1)
    logits.masked_fill_(~valid.unsqueeze(2), float("-inf"))
    log_sizes = sizes.clamp(min=1).float().log()[:, None, None, :]
    denominator = (logits + log_sizes).logsumexp(-1, keepdim=True).nan_to_num_(neginf=0.0)
    return (logits.sub_(denominator).logsumexp(2) - math.log(rows)).transpose(0, 1)


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
    """See :func:`squeezed.ops.reference.attend_selected`."""
    batch, q_heads, queries, dim = query.shape
    kv_heads = keys.shape[0]
    rows = (q_heads // kv_heads) * queries
    if selected is None:
        nothing = np.empty((batch * kv_heads, 0), np.bool_)
        runs = attend.merge_runs(nothing, np.zeros((kv_heads, 1), np.int32), 0, window[1], *_NOTHING_RECALLED)
    else:
        flat = selected.reshape(batch * kv_heads, -1).contiguous().numpy()
        single = _NOTHING_RECALLED if recalled is None else _flat(recalled)
        runs = attend.merge_runs(flat, offsets.numpy(), window[0], window[1], *single)
    if bias is not None:
        bias = bias.reshape(-1, bias.shape[-1])
    grouped = query.float().reshape(batch, kv_heads, rows, dim)
    eight_bits = keys.dtype == torch.int8
    if eight_bits:
        assert scales is not None
        shift = scale * (grouped @ scales.key_centre.unsqueeze(-1)).view(batch * kv_heads, rows)
        grouped = grouped * scales.key_scale.unsqueeze(1)
    grouped = grouped.reshape(batch * kv_heads, rows, dim).contiguous()
    few = rows <= _STREAMED_ROWS and keys.dtype != torch.float16
    output, lse = (_attend_streamed if few else _attend_gathered)(grouped, keys, values, runs, scale, bias)
    if eight_bits:
        assert scales is not None
        lse = lse + shift
        by_head = output.view(batch, kv_heads, rows, dim)
        output = torch.addcmul(scales.value_centre.unsqueeze(1), by_head, scales.value_scale.unsqueeze(1))
        output.masked_fill_(lse.view(batch, kv_heads, rows, 1) == -math.inf, 0.0)
    return output.view(batch, q_heads, queries, dim), lse.view(batch, q_heads, queries)


Runs = tuple[np.ndarray, np.ndarray, np.ndarray]
_NOTHING_RECALLED = (np.empty((1, 0), np.int32), np.empty((1, 0), np.int32))


def _flat(recalled: Recalled) -> tuple[np.ndarray, np.ndarray]:
    """Slots and clusters, [B * Hk, R] each, or [Hk, R] where all questions share them."""
    slots, clusters = (part.reshape(-1, part.shape[-1]).contiguous().numpy() for part in recalled[:2])
    return slots, clusters


def _attend_streamed(
    grouped: Tensor, keys: Tensor, values: Tensor, runs: Runs, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Read every kept key once; partial results of equal work items are merged by log-sum-exp."""
    starts, ends, counts = runs
    rows, group, dim = grouped.shape
    items = attend.plan_items(starts, ends, counts, get_num_threads() * _ITEMS_PER_THREAD)
    partial = np.empty((len(items), group, dim), np.float32)
    partial_max = np.empty((len(items), group), np.float32)
    partial_sum = np.empty((len(items), group), np.float32)
    attend.stream_items(
        grouped.numpy(),
        _raw(keys),
        _raw(values),
        starts,
        ends,
        items,
        np.empty((0, 0), np.float32) if bias is None else bias.numpy(),
        np.float32(scale),
        partial,
        partial_max,
        partial_sum,
    )
    output = np.empty((rows, group, dim), np.float32)
    lse = np.empty((rows, group), np.float32)
    attend.merge_items(items, partial, partial_max, partial_sum, output, lse)
    return torch.from_numpy(output), torch.from_numpy(lse)


def _attend_gathered(
    grouped: Tensor, keys: Tensor, values: Tensor, runs: Runs, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gather each head's kept keys once for all its queries, then two matrix products per block of queries."""
    starts, ends, counts = runs
    output = grouped.new_zeros(grouped.shape)
    lse = grouped.new_full(grouped.shape[:2], float("-inf"))
    for row in range(grouped.shape[0]):
        if counts[row] == 0:
            continue
        head = row % keys.shape[0]
        if counts[row] == 1:  # everything, as a rule: nothing to gather
            index: slice | Tensor = slice(int(starts[row, 0]), int(ends[row, 0]))
        else:
            index = torch.from_numpy(attend.run_positions(starts[row], ends[row], counts[row]))
        transposed_keys = _rows(keys[head], index).float().t()
        kept_values = _rows(values[head], index).float()
        step = max(1, _LOGITS // kept_values.shape[0])
        for first in range(0, grouped.shape[1], step):
            block = slice(first, first + step)
            logits = (grouped[row, block] * scale) @ transposed_keys
            if bias is not None:
                logits += _rows(bias[row % bias.shape[0]], index)
            lse[row, block] = logits.logsumexp(-1)
            output[row, block] = logits.sub_(lse[row, block].unsqueeze(-1)).exp_() @ kept_values
    return output, lse


def _rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def _raw(tensor: Tensor) -> np.ndarray:
    """A numpy view; bfloat16 as its 16 bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
