"""Asking the L2 cache for what a later launch reads, in the time in which nothing else is read from memory."""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev

_AT_ONCE = 128  # requests of a program, one of each of its threads
SHARE = tl.constexpr(_AT_ONCE * 1024)  # bytes that a program asks for


def programs(wanted: Tensor | None, most: int) -> int:
    """How many programs ask for the first `most` bytes of a tensor; 0 where the device can't be asked."""
    if wanted is None or not dev.has_dependent_launch(wanted.device):
        return 0
    return min(wanted.nbytes, most) // SHARE.value


def as_bytes(wanted: Tensor | None, count: int) -> Tensor | None:
    """The tensor as kernels take it, None if no program asks for it."""
    return wanted.view(-1).view(torch.uint8) if wanted is not None and count else None


@triton.jit
def ask_ahead(wanted, program):
    """Ask for this program's share of `wanted`, in requests of 1 KB that each thread makes for itself."""
    place = wanted + program.to(tl.int64) * SHARE + tl.arange(0, SHARE // 1024) * 1024
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0;",
        "=r,l",
        [place],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
