"""Independent work on a GPU at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_MOST_STREAMS = 12
Result = TypeVar("Result")
_streams: list[torch.cuda.Stream] = []


def side_by_side(calls: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """Results of calls that don't depend on each other. On a GPU their many small kernels run at the same time.

    What the calls read was made before, and what they made is read afterwards, in the stream that this is called in.
    """
    if device.type != "cuda" or len(calls) < 2:
        return [call() for call in calls]
    while len(_streams) < min(len(calls), _MOST_STREAMS):
        _streams.append(torch.cuda.Stream(device))
    main, used = torch.cuda.current_stream(device), _streams[: len(calls)]
    for stream in used:
        stream.wait_stream(main)
    results = []
    for number, call in enumerate(calls):
        with torch.cuda.stream(used[number % len(used)]):
            results.append(call())
    for stream in used:
        main.wait_stream(stream)
    return results
