"""Time attention to a fixed context on a GPU: dense and squeezed in one run, each a CUDA graph over several layers.

Consecutive layers hold different memory, so that no cache serves a repetition; times are per layer. The threshold is
the quantile over all heads and keys of calibration queries that are not the timed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from squeezed.bench.graphs import graph_ms
from squeezed.bench.planted import Planted, copies, planted_context, planted_queries
from squeezed.ops import reference
from squeezed.ops.layout import ClusteredKeys
from squeezed.ops.triton import attend_fixed
from squeezed.ops.triton.attend import attend_config
from squeezed.ops.triton.chain import select_keys
from squeezed.ops.triton.score_many import score_many_rows
from squeezed.storage import to_eight_bits

MEMORY_BANDWIDTH = 3.05e12  # bytes/s copied on an H100 80GB
DENSE_FLOPS = 604e12  # of cuDNN on long question prefills, same device


@dataclass(frozen=True)
class Case:
    """One row of the table. `coarse_keep`: share of keys that the coarse level leaves, where there is one."""

    name: str
    shape: Planted
    queries: int = 1
    sparsity: float = 0.9
    batch: int = 1
    eight_bits: bool = False
    coarse_keep: float = 0.5


def calibrated_thresholds(case: Case, layer: ClusteredKeys, scale: float) -> Tensor:
    """[levels] float32, finest first: global quantiles of the scores of queries other than the timed ones."""
    shape = case.shape
    query = planted_queries(shape, layer, 1 if case.queries > 1 else 8, case.queries, seed=991)
    thresholds = torch.full((len(layer.levels),), float("-inf"), device=query.device)
    allowed: Tensor | None = None
    for index in reversed(range(len(layer.levels))):
        level = layer.levels[index]
        if case.queries > 1 and allowed is None:
            grouped = query.reshape(1, shape.kv_heads, -1, shape.head_dim)
            scores = score_many_rows(grouped, level.centroids, level.sizes, scale, 8).logits.reshape(
                1, shape.kv_heads, -1
            )
        else:
            group = shape.q_heads // shape.kv_heads
            heads = []
            for head in range(shape.kv_heads):
                part = slice(head, head + 1)
                own = query[:, head * group : (head + 1) * group]
                inside = None if allowed is None else allowed[:, part]
                heads.append(reference.score_centroids(own, level.centroids[part], level.sizes[part], scale, inside))
            scores = torch.cat(heads, dim=1)
        weights = level.sizes.expand_as(scores).float()
        order = scores.flatten().sort(descending=True)
        reached = weights.flatten()[order.indices].cumsum(0) / weights.sum()
        keep = case.coarse_keep if index else 1 - case.sparsity
        thresholds[index] = order.values[torch.searchsorted(reached, keep).clamp(max=len(reached) - 1)]
        if index:
            children = layer.levels[index - 1].shape[1]
            allowed = reference.expand_to_children(scores > thresholds[index], level.offsets, children)
    return thresholds


def dense_times(case: Case, layers: list[ClusteredKeys]) -> dict[str, float]:
    """Milliseconds per layer of every dense kernel that runs; grouped heads also as queries of one head."""
    shape, times = case.shape, {}
    group = shape.q_heads // shape.kv_heads
    plain = torch.randn(case.batch, shape.q_heads, case.queries, shape.head_dim, device="cuda").to(shape.dtype)
    forms = {"": plain}
    if group > 1 and case.queries == 1:
        forms[" grouped"] = plain.reshape(case.batch, shape.kv_heads, group, shape.head_dim)
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):
        for form, query in forms.items():

            def run(backend: SDPBackend = backend, query: Tensor = query) -> None:
                with sdpa_kernel(backend):
                    for layer in layers:
                        keys, values = (
                            part[None].expand(case.batch, -1, -1, -1) for part in (layer.keys, layer.values)
                        )
                        gqa = query.shape[1] != shape.kv_heads
                        F.scaled_dot_product_attention(query, keys, values, enable_gqa=gqa)

            try:
                times[name + form] = graph_ms(run) / len(layers)
            except RuntimeError:
                continue  # this backend does not take the shape
    return times


def relative_error(case: Case, query: Tensor, layer: ClusteredKeys, thresholds: Tensor, output: Tensor) -> float:
    """Of the first head's output against float64 over the keys that the reference selects."""
    group = case.shape.q_heads // case.shape.kv_heads
    one = ClusteredKeys(
        layer.keys[:1],
        layer.values[:1],
        layer.positions[:1],
        tuple(
            replace(level, centroids=level.centroids[:1], sizes=level.sizes[:1], offsets=level.offsets[:1])
            for level in layer.levels
        ),
        layer.clustered,
    )
    own = query[:1, :group]
    scale = case.shape.head_dim**-0.5
    allowed = None
    for index in reversed(range(len(one.levels))):
        level = one.levels[index]
        scores = reference.score_centroids(own, level.centroids, level.sizes, scale, allowed)
        selected = scores > thresholds[index]
        if index:
            allowed = reference.expand_to_children(selected, level.offsets, one.levels[index - 1].shape[1])
    kept = reference.expand_to_children(selected, one.levels[0].offsets, layer.tokens)[0, 0]
    kept[layer.clustered :] = True
    logits = scale * own[0].double() @ one.keys[0][kept].double().T
    expected = logits.softmax(-1) @ one.values[0][kept].double()
    return float((output[0, :group].double() - expected).norm() / expected.norm())


def floor_ms(case: Case, layer: ClusteredKeys, kept: float) -> float:
    """Least time of the work that selecting needs: bytes read once, or products at the dense kernel's rate."""
    scored = layer.levels[-1].shape[1] + sum(level.shape[1] * case.coarse_keep for level in layer.levels[:-1])
    keys = kept * layer.clustered + layer.tokens - layer.clustered
    row = case.shape.kv_heads * case.shape.head_dim * (1 if case.eight_bits else 2)
    moved = row * (scored + 2 * case.batch * keys)
    flops = 4 * case.batch * case.shape.q_heads * case.queries * case.shape.head_dim * (scored + keys)
    return 1e3 * max(moved / MEMORY_BANDWIDTH, flops / DENSE_FLOPS)


def measure(case: Case, layers: int, build_seed: int = 0) -> dict[str, Any]:
    """One row: times per layer in milliseconds, speed-up over the fastest dense kernel, budget and error."""
    shape, scale = case.shape, case.shape.head_dim**-0.5
    layer = planted_context(shape, "cuda", build_seed)
    thresholds = calibrated_thresholds(case, layer, scale)
    query = planted_queries(shape, layer, case.batch, case.queries, seed=5)
    output, _, kept = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    error = relative_error(case, query, layer, thresholds, output)
    stack = copies(layer, layers)
    dense = dense_times(case, stack)
    stored = stack
    if case.eight_bits:
        packed = to_eight_bits(layer, keys_too=True)
        error = float((attend_fixed(query, packed, thresholds, layer.tokens, scale)[0] - output).norm() / output.norm())
        stored = copies(packed, layers)
    rows = shape.q_heads // shape.kv_heads * case.queries
    grouped = query.reshape(case.batch, shape.kv_heads, rows, shape.head_dim)
    dtype = torch.int8 if case.eight_bits else shape.dtype
    config = attend_config(shape.head_dim, rows, dtype, case.batch * shape.kv_heads * layer.tokens)

    def select() -> None:
        for part in stored:
            select_keys(
                grouped,
                [level.centroids for level in part.levels],
                [level.sizes for level in part.levels],
                [level.offsets for level in part.levels],
                part.clustered,
                thresholds,
                (part.clustered, part.tokens),
                scale,
                config,
                part.scales,
            )

    def whole() -> None:
        for part in stored:
            attend_fixed(query, part, thresholds, layer.tokens, scale)

    select_ms, whole_ms = graph_ms(select) / layers, graph_ms(whole) / layers
    share = (kept[0].float() / layer.clustered).flatten()
    fastest = min(dense, key=lambda name: dense[name])
    floor = floor_ms(case, layer, float(share.mean()))
    looked_at = [case.coarse_keep if level is not layer.levels[-1] else 1.0 for level in layer.levels]
    centroid_bytes = sum(part * level.centroids.nbytes for part, level in zip(looked_at, layer.levels, strict=True))
    return {
        "case": case.name,
        "dense": {"name": fastest, "ms": dense[fastest], "all": dense},
        "squeezed": {"ms": whole_ms, "select_ms": select_ms, "attend_ms": whole_ms - select_ms},
        "speedup": dense[fastest] / whole_ms,
        "floor_ms": floor,
        "floor_share": floor / whole_ms,
        "kept": float(share.mean()),
        "kept_lowest_head": float(share.min()),
        "kept_highest_head": float(share.max()),
        "kv_budget": (float(share.mean()) + centroid_bytes / layer.num_bytes) * (0.5 if case.eight_bits else 1.0),
        "rel_error": error,
        "layers": layers,
    }


def time_on_device(
    context: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    queries: int,
    sparsity: float,
    levels: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """One row as `squeeze bench attention` prints it, over as many layers as fill a few gigabytes."""
    coarse = 0.01 if levels > 1 else None
    shape = Planted(context, q_heads, kv_heads, head_dim, coarse_share=coarse, dtype=dtype)
    layers = max(2, min(16, 8 * 2**30 // (context * kv_heads * head_dim * 2 * dtype.itemsize)))
    row = measure(Case("", shape, queries=queries, sparsity=sparsity), layers)
    asked: dict[str, Any] = {
        "context": context,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "queries": queries,
    }
    asked |= {"sparsity": sparsity, "levels": levels, "dtype": str(dtype).removeprefix("torch.")}
    return {**asked, **{name: value for name, value in row.items() if name != "case"}}
