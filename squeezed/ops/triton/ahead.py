"""Asking the L2 cache for the next launch's weights, in the time in which nothing else is read from memory.

A decode step reads without pause but for attention: while clusters are selected and while parts are joined, memory
waits for a few programs. Others, with nothing else to do, then ask for the weights of the product that follows: the
first of them during selection, to be kept while attention's keys pass through the cache, and those after them during
the joining. More than memory has time for in these microseconds holds up the reads that are waited for
(docs/results/kernel-notes.md).
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.triton import device as dev

_LINE = tl.constexpr(128)  # bytes of a request
_LINES = tl.constexpr(1024)  # requests of a program
SHARE = _LINES.value * _LINE.value


def part(wanted: Tensor | None, first: int, size: int) -> Tensor | None:
    """Bytes [first, first + size) of `wanted`, as kernels take them; None where a device can't be asked."""
    if wanted is None or not dev.has_dependent_launch(wanted.device):
        return None
    found = wanted.view(-1).view(torch.uint8)[first : first + size]
    return found if found.numel() >= SHARE else None


def shares_of(asked: Tensor | None) -> int:
    """Programs that it takes to ask for it."""
    return 0 if asked is None else asked.numel() // SHARE


@triton.jit
def ask_ahead(asked, program, shares, KEEP: tl.constexpr):
    """Ask for this program's share, if there is one; KEEP: to stay in the cache when other things pass through."""
    if program < shares:
        line = asked + (program.to(tl.int64) * _LINES + tl.arange(0, _LINES)) * _LINE
        if KEEP:
            tl.inline_asm_elementwise(
                "prefetch.global.L2::evict_last [$1]; mov.u32 $0, 0;", "=r,l", [line], tl.int32, is_pure=False, pack=1
            )
        else:
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], tl.int32, is_pure=False, pack=1
            )
