"""Time device work as it runs in generation: captured once in a CUDA graph and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_ENOUGH = 400.0  # milliseconds of replays; a long piece of work varies less


def graph_ms(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one replay of `work`, by device events; fewer replays where they are long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    first = _replay_ms(graph)
    repeats = max(5, min(repeats, int(_ENOUGH / max(first, 1e-3))))
    for _ in range(min(warmup, repeats)):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2]


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy by a kernel, those read and those written; of a CPU's memory on a CPU."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    if source.is_cuda:
        seconds = graph_ms(lambda: torch.neg(source, out=target), warmup=20) / 1e3
    else:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        seconds = min(times)
    return 2 * source.nbytes / seconds
