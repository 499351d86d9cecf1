"""Time attention to a fixed context on a GPU: dense and squeezed in one run, each a CUDA graph over several layers.

What is timed is what generation calls: many queries are taken in blocks that share a selection, see `Selection`.

Consecutive layers hold different memory, so that no cache serves a repetition; times are per layer. Where one token is
timed there are as many layers as in a model, since what of a layer the cache is asked to keep would otherwise still be
there in the next round. The threshold is the quantile over all heads and keys of calibration queries that are not the
timed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from squeezed.attention import attend_fixed
from squeezed.bench.attention import Sweep
from squeezed.bench.graphs import graph_ms
from squeezed.bench.planted import Planted, copies, planted_context, planted_queries, with_clusters_copied
from squeezed.cache import FixedLayer, Selection
from squeezed.calibration import ThresholdCurves
from squeezed.config import PRESETS, BuildConfig, find_preset
from squeezed.ops import reference
from squeezed.ops.layout import ClusteredKeys
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.attend import attend_config
from squeezed.ops.triton.chain import select_keys
from squeezed.ops.triton.score import score_few_rows
from squeezed.ops.triton.score_many import score_many_rows
from squeezed.ops.voting import voters, voting
from squeezed.storage import store

MEMORY_BANDWIDTH = 3.05e12  # bytes/s copied on an H100 80GB
DENSE_FLOPS = 604e12  # of cuDNN on long question prefills, same device
_LOGITS = 2**27  # held at once by the checks in plain torch: 512 MB
_CHECKED_QUERIES = 16
_LONG_MS = 10.0
_LAYERS = 32  # whose clusters are read in turn, as in a model


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        storage: how the planted layer is kept and who votes; planted clusters have no spread.
        block: most queries that share a selection.
        coarse_keep: share of keys that the coarse level leaves, where there is one.
    """

    name: str
    shape: Planted
    queries: int = 1
    sparsity: float = 0.9
    batch: int = 1
    storage: BuildConfig = PRESETS["paper"]
    coarse_keep: float = 0.5
    block: int = Selection.block

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def group(self) -> int:
        return self.shape.q_heads // self.shape.kv_heads

    def blocks(self, query: Tensor) -> Tensor:
        """[B, Hq, M, D] as [B * blocks, Hq, queries of a block, D]; a shorter last block is left out."""
        size = min(self.block, query.shape[2])
        whole = query[:, :, : query.shape[2] // size * size].unflatten(2, (-1, size))
        return whole.transpose(1, 2).flatten(0, 1)

    def asking(self, query: Tensor) -> Tensor:
        """The queries of `blocks` that vote, KV head by KV head: [B * blocks, Hk, rows, D]."""
        blocks = self.blocks(query)
        asked = blocks[:, :, voting(blocks.shape[2], self.storage.voters)]
        return asked.reshape(len(blocks), self.shape.kv_heads, -1, self.shape.head_dim).contiguous()

    def selection(self, thresholds: Tensor) -> Selection:
        """How generation would select in a long context, with these thresholds [levels]."""
        levels = thresholds.double().cpu()[:, None, None]
        ends = (torch.full_like(levels, float(end)) for end in ("-inf", "inf"))
        curve = torch.cat([next(ends), levels, next(ends)], -1)
        sparsities = torch.tensor([0.0, self.sparsity, 1.0], dtype=torch.float64)
        curves = ThresholdCurves(sparsities, torch.tensor([1]), curve)
        return Selection(curves, self.sparsity, self.block, self.storage.voters, alone=0)


def mean_scores(rows: Tensor, centroids: Tensor, sizes: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """`reference.score_centroids` of one head, a few rows at a time: [K] from rows [R, D] and centroids [K, D]."""
    valid = sizes > 0 if allowed is None else (sizes > 0) & allowed
    wide, log_sizes = centroids.float(), sizes.clamp(min=1).log()
    total = torch.zeros(len(sizes), dtype=torch.float64, device=rows.device)
    for some in rows.float().split(max(1, _LOGITS // len(sizes))):
        logits = (scale * some @ wide.T).masked_fill(~valid, float("-inf"))
        total += (logits - (logits + log_sizes).logsumexp(-1, keepdim=True)).exp().sum(0)
    return (total / len(rows)).log()


def calibrated_thresholds(case: Case, layer: ClusteredKeys) -> Tensor:
    """[levels] float32, finest first: global quantiles of the scores of queries other than the timed ones."""
    shape = case.shape
    query = planted_queries(shape, layer, 1 if case.queries > 1 else 8, case.queries, seed=991)
    heads = case.asking(query)
    problems = [(batch, head) for batch in range(len(heads)) for head in range(shape.kv_heads)]
    thresholds = torch.full((len(layer.levels),), float("-inf"), device=query.device)
    allowed: dict[tuple[int, int], Tensor | None] = dict.fromkeys(problems)
    for index in reversed(range(len(layer.levels))):
        level = layer.levels[index]
        scores = {
            (b, h): mean_scores(heads[b, h], level.centroids[h], level.sizes[h], case.scale, allowed[b, h])
            for b, h in problems
        }
        flat = torch.cat([scores[problem] for problem in problems]).float()
        weights = level.sizes.repeat(len(heads), 1).flatten().double()
        order = flat.sort(descending=True)
        reached = weights[order.indices].cumsum(0) / weights.sum()
        keep = case.coarse_keep if index else 1 - case.sparsity
        thresholds[index] = order.values[torch.searchsorted(reached, keep).clamp(max=len(reached) - 1)]
        if index:
            children = layer.levels[index - 1].shape[1]
            for b, h in problems:
                selected = (scores[b, h] > thresholds[index])[None, None]
                allowed[b, h] = reference.expand_to_children(selected, level.offsets[h : h + 1], children)[0, 0]
    return thresholds


def dense_times(case: Case, layers: list[ClusteredKeys]) -> dict[str, float]:
    """Milliseconds per layer of every dense kernel that runs; grouped heads also as queries of one head.

    FlashAttention-2 is not asked where cuDNN takes long over many queries: it took 1.7 times as long in every such case
    (docs/results/kernel-notes.md), and most of a sweep's time.
    """
    shape, times = case.shape, dict[str, float]()
    plain = torch.randn(case.batch, shape.q_heads, case.queries, shape.head_dim, device="cuda").to(shape.dtype)
    ways = {"cudnn": (SDPBackend.CUDNN_ATTENTION, plain), "fa2": (SDPBackend.FLASH_ATTENTION, plain)}
    if case.group > 1 and case.queries == 1:
        grouped = plain.reshape(case.batch, shape.kv_heads, case.group, shape.head_dim)
        ways["fa2 grouped"] = (SDPBackend.FLASH_ATTENTION, grouped)
    for name, (backend, query) in ways.items():
        if case.queries > 1 and times.get("cudnn", 0.0) > _LONG_MS:
            continue

        def run(backend: SDPBackend = backend, query: Tensor = query) -> None:
            with sdpa_kernel(backend):
                for layer in layers:
                    keys, values = (part[None].expand(case.batch, -1, -1, -1) for part in (layer.keys, layer.values))
                    F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != shape.kv_heads)

        try:
            times[name] = graph_ms(run) / len(layers)
        except RuntimeError:
            continue  # this backend does not take the shape
    return times


def relative_errors(
    case: Case, query: Tensor, layer: ClusteredKeys, thresholds: Tensor, output: Tensor
) -> dict[str, float]:
    """Of the first head's output against float64 over the keys that the reference selects, and over all keys."""
    own = case.blocks(query)[0, : case.group]
    rows = case.asking(query)[0, 0]
    allowed: Tensor | None = None
    for index in reversed(range(len(layer.levels))):
        level = layer.levels[index]
        scores = mean_scores(rows, level.centroids[0], level.sizes[0], case.scale, allowed)
        selected = (scores.float() > thresholds[index])[None, None]
        children = layer.levels[index - 1].shape[1] if index else layer.tokens
        allowed = reference.expand_to_children(selected, level.offsets[:1], children)[0, 0]
    assert allowed is not None
    allowed[layer.clustered :] = True
    own = own[:, :_CHECKED_QUERIES]
    found = output[0, : case.group, : own.shape[1]].double()
    logits = case.scale * own.double() @ layer.keys[0].double().T
    errors = {}
    for name, kept in (("rel_error_same_selection", allowed), ("rel_error", torch.ones_like(allowed))):
        exact = logits[..., kept].softmax(-1) @ layer.values[0][kept].double()
        errors[name] = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
    return errors


def bytes_per_step(layer: ClusteredKeys, kept: float, coarse_keep: float) -> tuple[float, float]:
    """Bytes that one question's token reads of a layer, of centroids and of keys and values; `kept` is a share."""
    heads = layer.keys.shape[0]
    scored = layer.levels[-1].shape[1] + sum(level.shape[1] * coarse_keep for level in layer.levels[:-1])
    return (
        heads * scored * layer.centroid_bytes,
        heads * (kept * layer.clustered * layer.key_bytes + layer.always_bytes(layer.tokens)),
    )


def floor_ms(case: Case, layer: ClusteredKeys, kept: float) -> float:
    """Least time of the work that selecting needs: bytes read once, or products at the dense kernel's rate."""
    centroids, keys = bytes_per_step(layer, kept, case.coarse_keep)
    scored = layer.levels[-1].shape[1] + sum(level.shape[1] * case.coarse_keep for level in layer.levels[:-1])
    attended = kept * layer.clustered + layer.tokens - layer.clustered
    block = min(case.block, case.queries)
    vote = voters(block, case.storage.voters) / block
    flops = 4 * case.batch * case.shape.q_heads * case.queries * case.shape.head_dim * (vote * scored + attended)
    return 1e3 * max((centroids + case.batch * keys) / MEMORY_BANDWIDTH, flops / DENSE_FLOPS)


def stage_times(case: Case, query: Tensor, layers: list[ClusteredKeys], thresholds: Tensor) -> dict[str, float]:
    """Milliseconds per layer: `score` of the finest level alone (none with more levels), and score and select."""
    asking, scale = case.asking(query), case.scale
    batch, dim = len(asking), case.shape.head_dim
    kv_heads, tokens, _ = layers[0].keys.shape
    rows = case.group * min(case.block, case.queries)
    config = attend_config(dim, rows, layers[0].keys.dtype, batch * kv_heads * tokens)
    many = rows > dev.FEW_ROWS
    score_rows = score_many_rows if many else score_few_rows
    packed = layers[0].levels[0].centroids.dtype == torch.int8

    def score() -> None:
        for layer in layers:
            level = layer.levels[0]
            score_rows(asking, level.centroids, level.sizes, scale, 8, scales=layer.scales if packed else None)

    def select() -> None:
        for layer in layers:
            select_keys(
                asking,
                [level.centroids for level in layer.levels],
                [level.sizes for level in layer.levels],
                [level.offsets for level in layer.levels],
                layer.clustered,
                thresholds,
                (layer.window_start, tokens),
                scale,
                config,
                layer.scales if packed else None,
                many=many,
            )

    stages = {"score_ms": graph_ms(score) / len(layers)} if len(layers[0].levels) == 1 else {}
    return {**stages, "score_and_select_ms": graph_ms(select) / len(layers)}


@dataclass(frozen=True)
class Stack:
    """A planted layer and its copies in other memory, with dense times that serve every way of selecting from it."""

    shape: Planted
    layers: list[ClusteredKeys]
    dense: dict[tuple[int, int], dict[str, float]]

    @classmethod
    def plant(cls, shape: Planted, layers: int | None = None, seed: int = 0) -> Stack:
        """Two layers at least, and as many as fill 8 GB."""
        size = 2 * shape.tokens * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        count = layers or max(2, min(16, 8 * 2**30 // size))
        return cls(shape, copies(planted_context(shape, "cuda", seed), count), {})

    def flat(self) -> Stack:
        """The same keys and dense times with the finest level alone."""
        layers = [replace(layer, levels=layer.levels[:1]) for layer in self.layers]
        return Stack(replace(self.shape, coarse_share=None), layers, self.dense)


def measure(case: Case, stack: Stack) -> dict[str, Any]:
    """One row: times per layer in milliseconds, speed-up over the fastest dense kernel, budget and errors."""
    shape, planted, scale = case.shape, stack.layers[0], case.scale
    thresholds = calibrated_thresholds(case, planted)
    query = planted_queries(shape, planted, case.batch, case.queries, seed=5)
    asked = (case.batch, case.queries)
    if asked not in stack.dense:
        stack.dense[asked] = dense_times(case, stack.layers)
    dense = stack.dense[asked]
    selection = case.selection(thresholds)
    layers = [store(part, case.storage) for part in stack.layers]
    if case.queries == 1:
        layers = with_clusters_copied(layers, _LAYERS)
    layer = layers[0]
    asked_layers = [FixedLayer(part, selection, part.tokens) for part in layers]

    def whole() -> Tensor:
        for part in asked_layers:
            part.reads.clear()
            output, _ = attend_fixed(query, part, None, scale)
        return output

    output = whole()
    errors = relative_errors(case, query, planted, thresholds, output)
    kept = [read.kept[0] for read in asked_layers[0].reads if read.kept is not None]
    whole_ms = graph_ms(whole) / len(layers)
    stages = stage_times(case, query, layers, thresholds)
    share = torch.cat(kept).float().flatten() / layer.clustered
    fastest = min(dense, key=lambda name: dense[name])
    floor = floor_ms(case, layer, float(share.mean()))
    read = sum(bytes_per_step(layer, float(share.mean()), case.coarse_keep))
    row: dict[str, Any] = {
        "case": case.name,
        "dense": {"name": fastest, "ms": dense[fastest], "all": dense},
        "squeezed": {"ms": whole_ms, **stages, "attend_ms": whole_ms - stages["score_and_select_ms"]},
        "speedup": dense[fastest] / whole_ms,
        "floor_ms": floor,
        "floor_share": floor / whole_ms,
        "kept": float(share.mean()),
        "kept_lowest_head": float(share.min()),
        "kept_highest_head": float(share.max()),
        "kv_budget": read / (layer.keys.shape[0] * layer.tokens * layer.full_bytes),
        **errors,
        "layers": len(layers),
    }
    if case.queries > 1:
        block = min(case.block, case.queries)
        row |= {"block": block, "voters": voters(block, case.storage.voters)}
    return row


def time_on_device(asked: Sweep, on_stage: Callable[[str], None] = lambda stage: None) -> Iterator[dict[str, Any]]:
    """A row for every combination, as it is done; keys are planted and clustered once per context and head shape."""
    dtype = asked.dtype or torch.bfloat16
    coarse = 0.01 if max(asked.levels) > 1 else None
    preset = find_preset(asked.preset)
    storage = replace(preset, key_bits=8) if asked.eight_bits else preset
    for q_heads, kv_heads in asked.heads:
        for context in asked.contexts:
            on_stage(f"{context} tokens, {q_heads}/{kv_heads} heads: planting keys")
            deep = Stack.plant(Planted(context, q_heads, kv_heads, asked.head_dim, coarse_share=coarse, dtype=dtype))
            stacks = {1: deep.flat(), 2: deep}
            for queries in asked.queries:
                for levels, sparsity in asked.ways():
                    on_stage(f"{context} tokens, {q_heads}/{kv_heads} heads, {queries} queries, sparsity {sparsity}")
                    case = Case("", stacks[levels].shape, queries, sparsity, storage=storage)
                    about = {
                        "context": context,
                        "q_heads": q_heads,
                        "kv_heads": kv_heads,
                        "head_dim": asked.head_dim,
                        "queries": queries,
                        "sparsity": sparsity,
                        "levels": levels,
                        "preset": asked.preset,
                        "key_bits": storage.key_bits,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    found = measure(case, stacks[levels])
                    yield {**about, **{name: value for name, value in found.items() if name != "case"}}
            del deep, stacks
            torch.cuda.empty_cache()
