"""Time the preparation of a context besides prefill: clustering, layout and calibration of every layer, by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from squeezed import query_metric
from squeezed.bench.graphs import copy_bandwidth
from squeezed.bench.planted import Planted, planted_keys, planted_queries
from squeezed.calibration import calibrate, outline
from squeezed.clustering import COARSENING, cluster_layer
from squeezed.clustering.work import kmeans_work
from squeezed.config import BuildConfig
from squeezed.errors import InputError
from squeezed.memory import PeakMemory
from squeezed.ops.layout import ClusteredKeys
from squeezed.second_order import fit_spread

_SEGMENTS = (16, 24, 32, 80)  # calibration questions, in tokens
PAPER_SHARE = BuildConfig(clusters=0.05)
_PLANTED = 2  # layers whose keys are drawn; the others are the same again


@dataclass(frozen=True)
class BuildCase:
    """What to prepare: `layers` layers of `context` tokens each."""

    context: int = 131072
    q_heads: int = 32
    kv_heads: int = 8
    layers: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    config: BuildConfig = PAPER_SHARE

    def __post_init__(self) -> None:
        Planted(self.context, self.q_heads, self.kv_heads, self.head_dim)  # refuses what can't be planted
        if self.layers < 1:
            raise InputError(f"layers is {self.layers}: expected at least 1")


class _Watch:
    """Seconds and peak bytes of each stage, added up over the layers."""

    def __init__(self, device: torch.device, memory: PeakMemory) -> None:
        self._device, self._memory = device, memory
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.start()

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._memory.read()
        self._since = time.perf_counter()

    def stop(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] += time.perf_counter() - self._since
        self.peak[stage] = max(self.peak[stage], self._memory.read())
        self._since = time.perf_counter()


def time_build(case: BuildCase, device: str, on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """One row: seconds and peak bytes by stage, and how near that is to the arithmetic and bytes that it takes.

    Keys are planted with the unevenness of a real model's; finished layers are dropped but for what calibration reads,
    as they are written to disk in a build. A first, small build is left out: it compiles what there is to compile.
    """
    place = torch.device(device)
    shape = Planted(case.context, case.q_heads, case.kv_heads, case.head_dim, case.config.window, dtype=case.dtype)
    on_stage("warming up")
    small = replace(case, context=max(2000, min(case.context, 12000)), layers=1)
    small_shape = replace(shape, tokens=small.context)
    _build(small, small_shape, [planted_keys(small_shape, device)], place, on_stage)
    on_stage("planting keys")
    planted = [planted_keys(shape, device, seed) for seed in range(min(_PLANTED, case.layers))]
    seconds, peak = _build(case, shape, planted, place, on_stage)
    del planted
    total = sum(seconds.values())
    on_stage("measuring what the device can do")
    flops, moved = _work(case)
    bandwidth, rate = copy_bandwidth(place), _product_rate(place, case.dtype)
    floor = max(flops / rate, moved / bandwidth)
    return {
        "context": case.context,
        "layers": case.layers,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "levels": case.config.levels,
        "clusters": case.config.clusters_of(case.context - case.config.window - case.config.sinks),
        "seconds": total,
        "stages": seconds,
        "peak_bytes": peak,
        "kv_bytes": 2 * case.layers * case.kv_heads * case.context * case.head_dim * case.dtype.itemsize,
        "floor": {
            "flops": flops,
            "bytes": moved,
            "product_rate": rate,
            "bandwidth": bandwidth,
            "seconds": floor,
            "share": floor / total,
        },
    }


def _build(
    case: BuildCase,
    shape: Planted,
    planted: list[tuple[Tensor, Tensor]],
    device: torch.device,
    on_stage: Callable[[str], None],
) -> tuple[dict[str, float], dict[str, int]]:
    scale = case.head_dim**-0.5
    outlines: list[ClusteredKeys] = []
    queries: list[list[Tensor]] = []
    space = None
    if case.config.metric == "query":
        seen = torch.randn(1, case.q_heads, 4 * case.head_dim, case.head_dim, device=device)
        moment = query_metric.add_moment(None, seen, case.kv_heads)
        space = query_metric.factor(moment, case.context * case.q_heads // case.kv_heads)
    with PeakMemory(device, 0.001) as memory:
        watch = _Watch(device, memory)
        for number in range(case.layers):
            on_stage(f"layer {number + 1} of {case.layers}")
            watch.start()
            layer = cluster_layer(*planted[number % len(planted)], case.config, watch.stop, space)
            asked = [planted_queries(shape, layer, 1, count, seed=count)[0] for count in _SEGMENTS]
            watch.start()
            layer = fit_spread(layer, asked[-1], scale)
            watch.stop("second order")
            outlines.append(outline(layer))
            queries.append(asked)
            del layer
        on_stage("calibrating")
        watch.start()
        calibrate(outlines, queries, [scale] * case.layers)
        watch.stop("calibration")
    return dict(watch.seconds), dict(watch.peak)


def _work(case: BuildCase) -> tuple[float, float]:
    """Floating-point operations and bytes that must be moved, of all layers."""
    config, dim, wide = case.config, case.head_dim, case.dtype.itemsize
    keys = case.context - config.window - config.sinks
    clusters = config.clusters_of(keys)
    heads = case.layers * case.kv_heads
    flops, moved = 0.0, 4.0 * case.context * dim * wide  # keys and values, read and written in their new order
    rows, count = keys, clusters
    for _ in range(config.levels):
        some, other = kmeans_work(rows, dim, count, config.iterations)
        flops, moved = flops + some, moved + other
        rows, count = count, max(1, round(count / COARSENING))
    flops *= heads
    moved *= heads
    scores = 2.0 * sum(_SEGMENTS) * case.layers * case.q_heads * clusters * dim
    return flops + scores, moved


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, as k-means multiplies: in 16 bits on a GPU."""
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.float16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
