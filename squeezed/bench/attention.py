"""Time attention to a fixed context on this machine's CPU: dense and squeezed in one run, selection included."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squeezed.attention import attend_fixed
from squeezed.bench.planted import Planted, planted_keys, planted_queries
from squeezed.cache import FixedLayer, Selection
from squeezed.calibration import calibrate
from squeezed.clustering import cluster_layer
from squeezed.config import find_preset
from squeezed.errors import InputError
from squeezed.ops import cpu
from squeezed.ops.layout import ClusteredKeys


@dataclass(frozen=True)
class AttentionCase:
    """What to time: `context` tokens, `queries` of them asked at once by each query head."""

    context: int = 131072
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    queries: int = 1
    sparsity: float = 0.9
    levels: int = 1
    dtype: torch.dtype = torch.float32
    preset: str = "paper"
    repetitions: int = 15


@dataclass(frozen=True)
class Sweep:
    """Which cases to time: every combination, see `ways`.

    Attributes:
        heads: (query heads, KV heads).
        dtype: None is float32 on a CPU and bfloat16 elsewhere.
        preset: how the context is stored, see `squeezed.config.PRESETS`.
        eight_bits: keys and values in 8 bits, whatever the preset says; on a GPU only.
    """

    contexts: tuple[int, ...] = (131072,)
    heads: tuple[tuple[int, int], ...] = ((32, 8),)
    head_dim: int = 128
    queries: tuple[int, ...] = (1,)
    sparsities: tuple[float, ...] = (0.9,)
    levels: tuple[int, ...] = (1,)
    dtype: torch.dtype | None = None
    preset: str = "paper"
    eight_bits: bool = False

    def __post_init__(self) -> None:
        for heads in self.heads:
            for context in self.contexts:
                Planted(context, *heads, self.head_dim)  # refuses what can't be planted
        if min(self.queries) < 1:
            raise InputError(f"queries is {min(self.queries)}: expected at least 1")
        if not set(self.levels) <= {1, 2}:
            raise InputError(f"levels is {max(self.levels)}: expected 1 or 2 to be timed")

    @classmethod
    def published(cls) -> Sweep:
        """Decoding and questions of 1K and 4K tokens, 8K to 1M, with and without grouped heads."""
        return cls(
            contexts=(8192, 32768, 131072, 524288, 1048576),
            heads=((32, 32), (32, 8)),
            queries=(1, 1024, 4096),
            sparsities=(0.7, 0.9, 0.95),
            levels=(1, 2),
        )

    def ways(self) -> list[tuple[int, float]]:
        """(levels, sparsity): with two levels only one sparsity beside others, the highest up to 0.9."""
        flat = [(1, sparsity) for sparsity in self.sparsities] if 1 in self.levels else []
        if 2 not in self.levels:
            return flat
        deep = self.sparsities if not flat else (max((s for s in self.sparsities if s <= 0.9), default=0.9),)
        return [*flat, *((2, sparsity) for sparsity in deep)]


def time_on_cpu(asked: Sweep, on_stage: Callable[[str], None] = lambda stage: None) -> Iterator[dict[str, Any]]:
    """A row for every combination, as it is done."""
    if asked.eight_bits:
        raise InputError("--eight-bits is timed on a GPU only; leave it out, or pass --device cuda")
    if find_preset(asked.preset).key_bits == 8:
        raise InputError(f"preset {asked.preset} is timed on a GPU only; pass --preset best, or --device cuda")
    dtype = asked.dtype or torch.float32
    for heads in asked.heads:
        for context in asked.contexts:
            for queries in asked.queries:
                for levels, sparsity in asked.ways():
                    case = AttentionCase(
                        context, *heads, asked.head_dim, queries, sparsity, levels, dtype, asked.preset
                    )
                    yield time_attention(case, on_stage)


def time_attention(case: AttentionCase, on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """One row: torch's dense ways and our own, squeezed in total and by stage, realised budget, error against float64.

    The context is planted with the unevenness of a real model's attention, clustered by our own build and calibrated
    on other queries than those that are timed.
    """
    torch.manual_seed(0)
    config = replace(find_preset(case.preset), levels=case.levels, iterations=5)
    shape = Planted(case.context, case.q_heads, case.kv_heads, case.head_dim, config.window, dtype=case.dtype)
    on_stage("planting keys")
    keys, values = planted_keys(shape, "cpu")
    on_stage("clustering")
    index = cluster_layer(keys, values, config)
    del keys, values
    scale = case.head_dim**-0.5
    on_stage("calibrating")
    count = max(case.queries, 8)
    calibration = planted_queries(shape, index, 1, count, seed=1)[0]
    curves = calibrate([index], [[calibration]], [scale])
    query = planted_queries(shape, index, 1, case.queries, seed=2)
    layer = FixedLayer(index, Selection(curves, case.sparsity), index.tokens)
    on_stage("timing")
    dense = {name: _median_ms(call, case.repetitions) for name, call in _dense_ways(query, index, scale).items()}
    fastest = min(dense, key=lambda name: dense[name])
    total = _median_ms(lambda: attend_fixed(query, layer, None, scale), case.repetitions)
    stages = _stages(query, layer, scale, case.repetitions)
    usage = layer.usage()
    on_stage("measuring the error")
    return {
        "context": case.context,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "queries": case.queries,
        "sparsity": case.sparsity,
        "levels": case.levels,
        "preset": case.preset,
        "dtype": str(case.dtype).removeprefix("torch."),
        "dense": {"name": fastest, "ms": dense[fastest]},
        "dense_all": dense,
        "squeezed": {"ms": total, "stages": stages},
        "speedup": dense[fastest] / total,
        "kept_fraction": usage.kept_fraction,
        "kv_budget": usage.kv_budget,
        "floor_ms": dense[fastest] * usage.kv_budget if case.queries == 1 else None,
        "rel_error": _error(query, layer, scale),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }


def _dense_ways(query: Tensor, index: ClusteredKeys, scale: float) -> dict[str, Callable[[], Tensor]]:
    keys, values = index.keys, index.values
    group = query.shape[1] // keys.shape[0]
    grouped = query[0].reshape(keys.shape[0], group * query.shape[2], -1).to(keys.dtype)
    wide = query.to(keys.dtype)

    def matmul() -> Tensor:
        return torch.softmax((grouped * scale) @ keys.transpose(1, 2), -1) @ values

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(wide, keys[None], values[None], scale=scale, enable_gqa=True)

    def sdpa_packed() -> Tensor:
        # The group's heads as queries of one head: no key is read twice.
        return F.scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=scale)

    def ours_dense() -> Tensor:
        return cpu.attend_selected(query, keys, values, index.levels[0].offsets, None, (0, index.tokens), scale)[0]

    return {"matmul": matmul, "sdpa": sdpa, "sdpa_packed": sdpa_packed, "own_dense_loop": ours_dense}


def _stages(query: Tensor, layer: FixedLayer, scale: float, repetitions: int) -> dict[str, float]:
    """Milliseconds of the finest level's stages; coarser levels, and what stands in for what is left out, are only in
    the total."""
    index, level = layer.index, layer.index.levels[0]
    curves = layer.selection.curves
    assert curves is not None
    threshold = curves.at(layer.selection.sparsity, query.shape[2])[0]

    def score() -> Tensor:
        return cpu.score_centroids(query, level.centroids, level.sizes, scale, None, level.spread, index.scales)

    scores = score()
    selected = cpu.select_clusters(scores, threshold)
    window = (index.clustered, index.tokens)
    return {
        "score": _median_ms(score, repetitions),
        "select": _median_ms(lambda: cpu.select_clusters(scores, threshold), repetitions),
        "attend": _median_ms(
            lambda: cpu.attend_selected(query, index.keys, index.values, level.offsets, selected, window, scale),
            repetitions,
        ),
    }


def _error(query: Tensor, layer: FixedLayer, scale: float) -> float:
    """Mean over queries and heads of |squeezed - dense| / |dense|, dense in float64."""
    output, _ = attend_fixed(query, layer, None, scale)
    index = layer.index
    kv_heads, group = index.keys.shape[0], query.shape[1] // index.keys.shape[0]
    errors = []
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        logits = scale * (query[0, mine].double() @ index.keys[head].double().T)
        exact = torch.softmax(logits, -1) @ index.values[head].double()
        errors.append((output[0, mine].double() - exact).norm(dim=-1) / exact.norm(dim=-1))
    return float(torch.stack(errors).mean())


def _median_ms(call: Callable[[], Any], repetitions: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
