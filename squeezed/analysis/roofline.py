"""From counts to seconds: the roofline with achievable peaks, regimes, where squeezing pays and what fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from squeezed.analysis.cost import Cost, Operation, Precision, decode, dense_operations
from squeezed.analysis.devices import Device
from squeezed.analysis.shape import ModelShape
from squeezed.analysis.sparse import Squeeze, squeezed_operations

Launch = Literal["graph", "eager"]

# The share of device memory that serving engines plan with by default (vLLM: gpu_memory_utilization = 0.9); the rest is
# workspace, activations and the CUDA context.
USABLE_MEMORY = 0.9
LONGEST = 2**27  # tokens; searches stop here


def seconds(operation: Operation, device: Device, launch: Launch = "graph") -> float:
    """Predicted seconds of all launches of one operation: the slower of compute and memory, plus the fixed cost."""
    reached = device.achievable
    share = reached.matmul if operation.kind == "linear" else reached.attention
    compute = operation.cost.flops / (device.flops * share)
    memory = operation.cost.bytes / (device.bandwidth * reached.bandwidth)
    return operation.count * (max(compute, memory) + operation.launches * getattr(reached, launch))


def floor_seconds(operation: Operation, device: Device) -> float:
    """Seconds that no implementation on this hardware can beat: datasheet peaks, no fixed cost."""
    return operation.count * max(operation.cost.flops / device.flops, operation.cost.bytes / device.bandwidth)


def total_seconds(operations: Iterable[Operation], device: Device, launch: Launch = "graph") -> float:
    """Predicted seconds of operations run one after the other."""
    return sum(seconds(operation, device, launch) for operation in operations)


def regime(cost: Cost, device: Device) -> str:
    """Which datasheet peak limits `cost`."""
    return "compute" if cost.intensity >= device.ridge else "memory"


def from_ridge(cost: Cost, device: Device) -> float:
    """Arithmetic intensity as a multiple of the ridge point: below 1 memory is the limit, above 1 compute."""
    return cost.intensity / device.ridge


def token_seconds(
    model: ModelShape,
    device: Device,
    precision: Precision,
    batch: int,
    context: int,
    squeeze: Squeeze | None = None,
    launch: Launch = "graph",
) -> float:
    """Predicted seconds of one decode step of the whole model, all sequences of the batch together."""
    step = decode(batch, context)
    if squeeze is None:
        return total_seconds(dense_operations(model, step, precision), device, launch)
    return total_seconds(squeezed_operations(model, step, precision, squeeze), device, launch)


def crossover(
    model: ModelShape,
    device: Device,
    precision: Precision,
    batch: int,
    squeeze: Squeeze,
    launch: Launch = "graph",
    speedup: float = 1.0,
) -> int | None:
    """Shortest context in tokens at which a squeezed decode step is `speedup` times as fast, None if there is none."""

    def pays(context: int) -> bool:
        dense = token_seconds(model, device, precision, batch, context, None, launch)
        return dense > speedup * token_seconds(model, device, precision, batch, context, squeeze, launch)

    return smallest(pays, squeeze.window + 1, LONGEST)


def memory_bytes(model: ModelShape, precision: Precision, batch: int, context: int, squeeze: Squeeze | None) -> float:
    """Bytes of weights, of the KV cache of every sequence and of its centroids."""
    cached = model.kv_elements(context)
    if squeeze is not None:
        clustered = max(0, context - squeeze.window)
        full = sum(layer.count * layer.kv_elements for layer in model.layers if layer.window is None)
        cached += round(squeeze.stored * clustered * full / 2)
    return model.parameters * precision.weights + batch * cached * precision.cache


def largest_context(
    model: ModelShape, device: Device, precision: Precision, batch: int, squeeze: Squeeze | None = None
) -> int | None:
    """Longest context in tokens, each sequence with its own, that fits next to the weights; 0 if the weights do not.

    None if memory sets no limit: sliding-window layers never hold more than their window.
    """
    room = device.memory * USABLE_MEMORY

    def overflows(context: int) -> bool:
        return memory_bytes(model, precision, batch, context, squeeze) > room

    first = smallest(overflows, 0, LONGEST)
    return None if first is None else max(0, first - 1)


def smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """Smallest integer in [low, high] for which `holds`, which must stay true once it is; None if it never is."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
