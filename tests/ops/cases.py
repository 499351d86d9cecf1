"""Small clustered layers with every awkward feature, and the float64 judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.ops import reference
from squeezed.ops.layout import ClusteredKeys, ClusterLevel, Recalled, from_eight_bits, recalled_at
from squeezed.storage import add_centroid_values, to_eight_bits


@dataclass(frozen=True)
class Case:
    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    queries: int = 1
    head_dim: int = 64
    clusters: int = 37
    largest: int = 40
    levels: int = 1
    window: int = 21
    dtype: torch.dtype = torch.float32
    seed: int = 0
    second_order: bool = False
    compensate: bool = False
    centroid_bits: int = 16
    key_bits: int = 16
    sinks: int = 5  # of the window; they are stored apart where keys are in 8 bits


def _partition(total: int, parts: int, generator: torch.Generator) -> Tensor:
    """Sizes of `parts` non-empty groups that make up `total`."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])).int()


def _level(children_sizes: list[Tensor], runs: list[Tensor], means: list[Tensor], dtype: torch.dtype) -> ClusterLevel:
    clusters = max(len(run) for run in runs)
    head_dim = means[0].shape[1]
    heads = len(runs)
    centroids = torch.zeros(heads, clusters, head_dim, dtype=dtype)
    sizes = torch.zeros(heads, clusters, dtype=torch.int32)
    offsets = torch.zeros(heads, clusters + 1, dtype=torch.int32)
    for head in range(heads):
        count = len(runs[head])
        centroids[head, :count] = means[head].to(dtype)
        sizes[head, :count] = children_sizes[head]
        offsets[head, 1 : count + 1] = runs[head].cumsum(0)
        offsets[head, count + 1 :] = offsets[head, count]
    return ClusterLevel(centroids, sizes, offsets)


def _means(rows: Tensor, weights: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    label = torch.repeat_interleave(torch.arange(len(runs)), runs.long())
    sizes = torch.zeros(len(runs)).index_add(0, label, weights.float())
    sums = torch.zeros(len(runs), rows.shape[1]).index_add(0, label, rows.float() * weights[:, None])
    return sums / sizes[:, None], sizes.int()


def make_layer(case: Case, device: str = "cpu") -> ClusteredKeys:
    """Random keys around random centres; heads differ in their number of clusters, some clusters hold one key."""
    generator = torch.Generator().manual_seed(case.seed)
    per_head = [max(1, case.clusters - (5 * head) % max(1, case.clusters - 1)) for head in range(case.kv_heads)]
    clustered = max(case.clusters, case.clusters * case.largest // 3)
    runs = [_partition(clustered, count, generator) for count in per_head]
    keys = torch.randn(case.kv_heads, clustered + case.window, case.head_dim, generator=generator)
    for head in range(case.kv_heads):
        centres = 1.5 * torch.randn(per_head[head], case.head_dim, generator=generator)
        keys[head, :clustered] += centres.repeat_interleave(runs[head].long(), 0)
    keys = keys.to(case.dtype)
    values = torch.randn(keys.shape, generator=generator).to(case.dtype)
    ones = torch.ones(clustered)
    stats = [_means(keys[head, :clustered], ones, runs[head]) for head in range(case.kv_heads)]
    levels = [_level([s for _, s in stats], runs, [m for m, _ in stats], case.dtype)]
    for _ in range(case.levels - 1):
        counts = [len(run) for run in runs]
        runs = [_partition(count, max(1, count // 4), generator) for count in counts]
        stats = [_means(mean, size, run) for (mean, size), run in zip(stats, runs, strict=True)]
        levels.append(_level([s for _, s in stats], runs, [m for m, _ in stats], case.dtype))
    if case.second_order:
        levels = [
            replace(level, spread=torch.rand(level.sizes.shape, generator=generator) / level.shape[2] * 40)
            for level in levels
        ]
    positions = torch.arange(clustered, dtype=torch.int32).expand(case.kv_heads, -1).contiguous()
    layer = ClusteredKeys(keys, values, positions, tuple(levels), clustered)
    if case.compensate:
        layer = add_centroid_values(layer)
    if min(case.centroid_bits, case.key_bits) == 8:
        layer = to_eight_bits(layer, keys_too=case.key_bits == 8, sinks=case.sinks)
    return layer.to(device)


def make_query(case: Case, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.q_heads, case.queries, case.head_dim)
    return (1.5 * torch.randn(shape, generator=generator)).to(case.dtype).to(device)


def make_recalled(case: Case, layer: ClusteredKeys, count: int = 30, shared: bool = False) -> Recalled:
    """Random clustered keys, neighbours and whole clusters among them; the last head's are partly padding."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    shape = (1 if shared else case.batch, case.kv_heads)
    places = torch.stack(
        [torch.randperm(layer.clustered, generator=generator)[:count] for _ in range(shape[0] * shape[1])]
    )
    places = places.view(*shape, -1)
    neighbours = places.shape[2] // 3
    places[..., :neighbours] = torch.arange(neighbours)  # the first clusters as a whole
    for row in places.flatten(0, 1):
        kept = row.unique()
        row.fill_(-1)[: len(kept)] = kept
    places[:, -1, -3:] = -1
    return recalled_at(places.to(layer.keys.device), layer.levels)[0]


def reference_selection(query: Tensor, layer: ClusteredKeys, log_thresholds: Tensor, scale: float) -> Tensor:
    """[B, Hk, K] bool on the finest level, every level through the reference operations."""
    allowed = None
    for level in reversed(range(len(layer.levels))):
        here = layer.levels[level]
        scores = reference.score_centroids(query, here.centroids, here.sizes, scale, allowed, here.spread, layer.scales)
        selected = reference.select_clusters(scores, float(log_thresholds[level]))
        if level:
            allowed = reference.expand_to_children(selected, here.offsets, layer.levels[level - 1].shape[1])
    return selected


def quantile_thresholds(query: Tensor, layer: ClusteredKeys, scale: float, keep: float) -> Tensor:
    """Thresholds of all levels that keep about `keep` of the clusters, placed midway between two scores."""
    thresholds = torch.full((len(layer.levels),), float("-inf"))
    allowed = None
    for level in reversed(range(len(layer.levels))):
        here = layer.levels[level]
        scores = reference.score_centroids(query, here.centroids, here.sizes, scale, allowed, here.spread, layer.scales)
        finite = scores[scores.isfinite()].sort().values
        if len(finite) > 1:
            share = keep ** (1 / len(layer.levels))
            index = min(len(finite) - 1, max(1, int((1 - share) * len(finite))))
            # The widest gap nearby: rounding must not decide what is kept.
            low, high = max(0, index - 8), min(len(finite) - 1, index + 8)
            gap = low + int(torch.diff(finite[low : high + 1]).argmax())
            thresholds[level] = (finite[gap] + finite[gap + 1]) / 2
        selected = reference.select_clusters(scores, float(thresholds[level]))
        if level:
            allowed = reference.expand_to_children(selected, here.offsets, layer.levels[level - 1].shape[1])
    return thresholds.to(query.device)


def judge(
    query: Tensor, layer: ClusteredKeys, selected: Tensor, window_end: int, scale: float
) -> tuple[Tensor, Tensor]:
    """float64 attention over the selected keys and the window."""
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, tokens, _ = layer.keys.shape
    position = torch.arange(tokens, device=query.device)
    kept = reference.expand_to_children(selected, layer.levels[0].offsets, tokens)
    kept = kept | ((position >= layer.clustered) & (position < window_end))
    grouped = query.double().reshape(batch, kv_heads, -1, head_dim)
    logits = scale * grouped @ layer.keys.double().transpose(-1, -2)
    logits = logits.masked_fill(~kept[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (weights @ layer.values.double()).reshape(query.shape), lse.reshape(batch, q_heads, queries)


def judge_whole(
    query: Tensor,
    layer: ClusteredKeys,
    log_thresholds: Tensor | list[float],
    window_end: int,
    scale: float,
    asking: Tensor | None = None,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor]:
    """float64 softmax over selected keys, the window, and a stand-in of N_i keys for every cluster left out.

    `asking`: the queries by which clusters are scored; by default all. `recalled` keys are attended once, whether their
    clusters are selected or stood in for, and then not stood in for.
    """
    asking = query if asking is None else asking
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, tokens, _ = layer.keys.shape
    keys, values = _rows(layer, layer.keys, layer.values)
    if layer.sinks is not None:
        apart = slice(layer.clustered, layer.window_start)
        keys[:, apart], values[:, apart] = (rows.double() for rows in layer.sinks)
    position = torch.arange(tokens, device=query.device)
    in_window = (position >= layer.clustered) & (position < window_end)
    also = torch.zeros(batch, kv_heads, tokens, dtype=torch.bool, device=query.device)
    if recalled is not None:
        for b in range(batch):
            for head in range(kv_heads):
                slots = recalled.slots[b % len(recalled.slots), head].tolist()
                also[b, head, [slot for slot in slots if slot >= 0]] = True
    zeros = torch.zeros(batch, kv_heads, tokens).to(keys)
    rows, means, bias, kept, allowed = [keys], [values], [zeros], [], None
    for depth in reversed(range(len(layer.levels))):
        here = layer.levels[depth]
        scores = reference.score_centroids(
            asking, here.centroids, here.sizes, scale, allowed, here.spread, layer.scales
        )
        selected = reference.select_clusters(scores, float(log_thresholds[depth]))
        if here.values is not None:
            centroids, centroid_values = _rows(layer, here.centroids, here.values)
            rows.append(centroids)
            means.append(centroid_values)
            sizes = here.sizes.double() - _members(also, layer, depth)
            bias.append(sizes.clamp(min=1).log())
            left_out = (sizes > 0) & ~selected
            kept.append(left_out if allowed is None else left_out & allowed)
        children = layer.levels[depth - 1].shape[1] if depth else tokens
        allowed = reference.expand_to_children(selected, here.offsets, children)
    assert allowed is not None
    seen = torch.cat([allowed | in_window | also, *kept], 2)
    grouped = query.double().reshape(batch, kv_heads, -1, head_dim)
    logits = scale * grouped @ torch.cat(rows, 1).transpose(-1, -2) + torch.cat(bias, 2).unsqueeze(2)
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (weights @ torch.cat(means, 1)).reshape(query.shape), lse.reshape(batch, q_heads, queries)


def _members(marked: Tensor, layer: ClusteredKeys, depth: int) -> Tensor:
    """How many of the marked keys [B, Hk, N] are in each cluster of a level, [B, Hk, K] int64, counted one by one."""
    counts = torch.zeros(*marked.shape[:2], layer.levels[depth].shape[1], dtype=torch.int64, device=marked.device)
    for head in range(marked.shape[1]):
        for cluster in range(counts.shape[2]):
            first, end = (int(edge) for edge in layer.levels[depth].offsets[head, cluster : cluster + 2])
            for below in reversed(layer.levels[:depth]):
                first, end = int(below.offsets[head, first]), int(below.offsets[head, end])
            counts[:, head, cluster] = marked[:, head, first:end].sum(-1)
    return counts


def decided(query: Tensor, layer: ClusteredKeys, log_thresholds: Tensor, scale: float) -> Tensor:
    """[B, Hk] bool: no score lies so near its level's threshold that rounding to 16 bits could decide about it."""
    sure = torch.ones(query.shape[0], layer.keys.shape[0], dtype=torch.bool, device=query.device)
    allowed = None
    for depth in reversed(range(len(layer.levels))):
        here = layer.levels[depth]
        scores = reference.score_centroids(query, here.centroids, here.sizes, scale, allowed, here.spread, layer.scales)
        sure &= ((scores - log_thresholds[depth]).abs() < 0.003).logical_not().all(-1)
        if depth:
            selected = reference.select_clusters(scores, float(log_thresholds[depth]))
            allowed = reference.expand_to_children(selected, here.offsets, layer.levels[depth - 1].shape[1])
    return sure


def _rows(layer: ClusteredKeys, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if layer.scales is None:
        return keys.double(), values.double()
    return from_eight_bits(keys, *layer.scales[:2]).double(), from_eight_bits(values, *layer.scales[2:]).double()


def list_to_mask(entries: Tensor, counts: Tensor, width: int, tokens: int) -> Tensor:
    """How often each child is in each list: [problems, tokens] int64."""
    times = torch.zeros(entries.shape[0], tokens, dtype=torch.int64)
    for problem in range(entries.shape[0]):
        for entry in entries[problem, : int(counts[problem])].tolist():
            start, length = (entry, 1) if width == 1 else (entry >> 4, entry & 15)
            times[problem, start : start + length] += 1
    return times


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
