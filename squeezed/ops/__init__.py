"""The four operations: score centroids, select clusters, attend to what is selected, merge."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def backend(tensor: Tensor) -> ModuleType:
    """The implementation for the device that `tensor` is on: compiled loops on CPU, the plain reference elsewhere."""
    if tensor.device.type == "cpu":
        from squeezed.ops import cpu

        return cpu
    from squeezed.ops import reference

    return reference
