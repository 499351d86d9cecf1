"""Measure the device at hand: peak matrix product, copy bandwidth and the fixed cost of one operation."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from squeezed.analysis.devices import Achievable, Device
from squeezed.errors import InputError

_WARM_UP, _REPEATS = 3, 9


def measure_device(kind: str) -> Device:
    """This machine's CPU (float32) or CUDA device (bfloat16) as a `Device` whose peaks are medians measured now.

    Nothing is taken from a datasheet, so bandwidth and linear layers reach their peaks by definition. On a CPU
    attention is taken to reach the rate of a matrix product; on a CUDA device it is measured.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': torch finds no CUDA device; name one of the catalogue, or use cpu")
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    side, megabytes = (1024, 128) if kind == "cpu" else (8192, 2048)
    a, b = (torch.randn(side, side, dtype=dtype, device=kind) for _ in range(2))
    flops = 2 * side**3 / _median_seconds(lambda: a @ b, kind)
    # A buffer larger than the last-level cache: otherwise the cache is measured, not the memory.
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _median_seconds(lambda: target.copy_(source), kind)
    one = torch.zeros(1, device=kind)
    eager = _median_seconds(lambda: one.add_(1), kind)
    attention = 1.0 if kind == "cpu" else min(1.0, _attention_rate(dtype) / flops)
    probes = f"{side}-square {str(dtype)[6:]} product, {megabytes} MiB copy"
    seen = f"measured on this machine: {probes}, torch {torch.__version__}"
    return Device(
        name=kind,
        title=_title(kind),
        flops=flops,
        bandwidth=bandwidth,
        memory=_memory(kind),
        source=seen,
        achievable=Achievable(1, 1, attention, eager, eager if kind == "cpu" else _graph_seconds(dtype), source=seen),
        element_bytes=dtype.itemsize,
    )


def _attention_rate(dtype: torch.dtype, heads: int = 32, queries: int = 1024, keys: int = 32768) -> float:
    """FLOP/s of dense attention of many queries, the compute-bound case."""
    q = torch.randn(1, heads, queries, 128, dtype=dtype, device="cuda")
    k = torch.randn(1, heads, keys, 128, dtype=dtype, device="cuda")
    seconds = _median_seconds(lambda: functional.scaled_dot_product_attention(q, k, k), "cuda")
    return 4 * heads * queries * keys * 128 / seconds


def _graph_seconds(dtype: torch.dtype, calls: int = 20) -> float:
    """Seconds of one operation that does next to nothing, attention over 128 keys, inside a CUDA graph."""
    q = torch.randn(1, 32, 1, 128, dtype=dtype, device="cuda")
    k = torch.randn(1, 32, 128, 128, dtype=dtype, device="cuda")
    functional.scaled_dot_product_attention(q, k, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            functional.scaled_dot_product_attention(q, k, k)
    return _median_seconds(graph.replay, "cuda") / calls


def _median_seconds(function: Callable[[], object], kind: str) -> float:
    for _ in range(_WARM_UP):
        function()
    return statistics.median(_seconds(function, kind) for _ in range(_REPEATS))


def _seconds(function: Callable[[], object], kind: str) -> float:
    if kind == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def _title(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _memory(kind: str) -> float:
    if kind == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return float(psutil.virtual_memory().total)
