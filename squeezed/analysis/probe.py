"""Measure the device at hand: peak matrix product, copy bandwidth and the fixed cost of one operation."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from squeezed.analysis.devices import Achievable, Device
from squeezed.errors import InputError

_WARM_UP, _REPEATS = 3, 9


def measure_device(kind: str) -> Device:
    """This machine's CPU (float32) or CUDA device (bfloat16) as a `Device` whose peaks are medians measured now.

    Nothing is taken from a datasheet, so the achievable fractions are 1 by definition; attention is taken to reach the
    rate of a matrix product.
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
    launch = _median_seconds(lambda: one.add_(1), kind)
    probes = f"{side}-square {str(dtype)[6:]} product, {megabytes} MiB copy"
    seen = f"measured on this machine: {probes}, torch {torch.__version__}"
    return Device(
        name=kind,
        title=_title(kind),
        flops=flops,
        bandwidth=bandwidth,
        memory=_memory(kind),
        source=seen,
        achievable=Achievable(1, 1, 1, eager=launch, graph=launch, source=seen),
        element_bytes=dtype.itemsize,
    )


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
