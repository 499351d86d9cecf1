"""The loops of the CPU made ready before they are needed, and the memory of their compiler given back.

They are compiled by the first build and cached on disk, but loading them from there takes the compiler's linker: on
SmolLM2 half of what answering took besides the model and the context was machine code of LLVM that nothing calls again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

import torch

from squeezed import ops
from squeezed.config import BuildConfig
from squeezed.ops.layout import ChannelScales, ClusteredKeys, ClusterLevel

_HEADS, _CLUSTERS, _DIM = 2, 512, 64  # one head alone would lie in memory otherwise
_SHAPES = ((1, 1), (128, 1), (1, 64))  # (questions, queries): scored on one core, on several, and attended in products
_LIBRARY = "libllvmlite"


@cache
def warm_up(dtype: torch.dtype, config: BuildConfig) -> None:
    """Load, or compile, all that attention on the CPU needs for contexts built with `config` by a model of `dtype`.

    To be called before a context is mapped into memory: the compiler is then gone when the context comes. A second call
    does nothing.
    """
    index = _small_index(dtype, config)
    for questions, queries in _SHAPES:
        query = torch.zeros(questions, _HEADS, queries, _DIM, dtype=dtype)
        ops.attend_fixed(query, index, (0.0,), index.tokens, 1.0)
    _give_back(_LIBRARY)


def _small_index(dtype: torch.dtype, config: BuildConfig) -> ClusteredKeys:
    """Clusters of one key each, stored as `config` says."""

    def rows(count: int, bits: int) -> torch.Tensor:
        return torch.zeros(_HEADS, count, _DIM, dtype=torch.int8 if bits == 8 else dtype)

    one = torch.ones(_HEADS, _DIM)
    level = ClusterLevel(
        centroids=rows(_CLUSTERS, config.centroid_bits),
        sizes=torch.ones(_HEADS, _CLUSTERS, dtype=torch.int32),
        offsets=torch.arange(_CLUSTERS + 1, dtype=torch.int32).repeat(_HEADS, 1),
        spread=torch.zeros(_HEADS, _CLUSTERS) if config.second_order else None,
        values=rows(_CLUSTERS, config.centroid_bits) if config.compensate else None,
    )
    return ClusteredKeys(
        keys=rows(_CLUSTERS + 1, config.key_bits),
        values=rows(_CLUSTERS + 1, config.key_bits),
        positions=torch.arange(_CLUSTERS, dtype=torch.int32).repeat(_HEADS, 1),
        levels=(level,),
        clustered=_CLUSTERS,
        scales=ChannelScales(one, one, one, one) if config.centroid_bits == 8 else None,
        sinks=(rows(1, 16), rows(1, 16)) if config.key_bits == 8 and config.sinks else None,
    )


def _give_back(library: str) -> None:
    """Drop a library's machine code, and freed memory, from this process; what is called again comes from the file."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, mode, *_, name = line.split()
        if mode == "r-xp" and Path(name).name.startswith(library):  # never written to, so that nothing is lost
            first, last = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):  # of the GNU C library
        libc.malloc_trim(0)
