"""Asking the L2 cache for what later launches read, in the time in which nothing else is read from memory.

A decode step reads without pause but for attention: while clusters are selected and while parts are joined, memory
waits for a few programs. Others, with nothing else to do, then ask for the weights of the product that follows: the
first of them during selection, to be kept while attention's keys pass through the cache, and those after them during
the joining. More than memory has time for in these microseconds holds up the reads that are waited for
(docs/results/kernel-notes.md).

Where no weights are asked for, it is values that stand in for clusters: nearly all of them are read while attention
reads keys, and what is there already attention need not share memory with.
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
_VALUES = 8 * 2**20  # bytes of them: as many as memory has time for


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
        _ask(asked + (program.to(tl.int64) * _LINES + tl.arange(0, _LINES)) * _LINE, KEEP)


@triton.jit
def _ask(line, KEEP: tl.constexpr):
    if KEEP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2::evict_last [$1]; mov.u32 $0, 0;", "=r,l", [line], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line], tl.int32, is_pure=False, pack=1
        )


def bytes_to_ask(values: Tensor | None, programs: int, rows: int) -> tuple[Tensor | None, int]:
    """What `ask_rows` takes: `values` [Hk, K, D] as bytes, and how many lines each of `programs` asks for.

    Together up to `_VALUES`, and each at most the program's `rows`; None and 0 where a device can't be asked.
    """
    if values is None or not dev.has_dependent_launch(values.device):
        return None, 0
    found = values.view(torch.uint8)
    line = _LINE.value
    lines = min(_VALUES // (programs * line), rows * found.shape[-1] // line)
    return (found, 1 << (lines.bit_length() - 1)) if lines else (None, 0)


@triton.jit
def ask_rows(values, head, first, rows, ROW_BYTES: tl.constexpr, LINES: tl.constexpr):
    """Ask for LINES lines of a head's `rows` from its row `first` on, to be kept until they are read."""
    byte = tl.minimum(first * ROW_BYTES + tl.arange(0, LINES) * _LINE, rows * ROW_BYTES - 1)
    _ask(values + head.to(tl.int64) * rows * ROW_BYTES + byte, True)
