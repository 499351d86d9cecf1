"""What the kernels ask of the device they run on, and the sizes they choose from it."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton

# Rows of queries (group heads x queries) up to which logits are stored once instead of being computed twice.
FEW_ROWS = 32

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; a small number under the interpreter, where every program costs host time."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched before its predecessor ends (compute capability 9.0 and up)."""
    return device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Launch keywords that let a kernel's launch overlap the end of the one before it; PDL tells the kernel so."""
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch(device) else {"PDL": False}


def padded_rows(rows: int) -> int:
    """Rows of a query tile: matrix units take 16 at least; 128 is the widest tile that still leaves room for keys."""
    return min(128, max(16, triton.next_power_of_2(rows)))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied exactly; for 16-bit inputs the setting has no effect."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_head_dim(head_dim: int) -> None:
    if head_dim not in (16, 32, 64, 128, 256):
        raise ValueError(f"head_dim {head_dim}: the GPU kernels take 16, 32, 64, 128 or 256; use the reference ops")
