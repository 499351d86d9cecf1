"""Time device work as it runs in generation: captured once in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graph_ms(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one replay of `work`, by device events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(warmup):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2]
