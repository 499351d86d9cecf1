"""Loops that are ready before they are needed, and a compiler that leaves no memory behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from squeezed import ops
from squeezed.clustering import cluster_layer
from squeezed.config import PRESETS
from squeezed.ops.cpu import attend, score
from squeezed.warm_up import warm_up

LOOPS = (
    attend.merge_runs,
    attend.run_positions,
    attend.plan_items,
    attend.stream_items,
    attend.merge_items,
    score.score_rows,
    score.score_rows_on_one_core,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_after_warming_up_a_question_compiles_nothing(preset: str, levels: int, dtype: torch.dtype) -> None:
    config = replace(PRESETS[preset], levels=levels)
    warm_up(dtype, config)
    ready = [len(loop.signatures) for loop in LOOPS]
    rows = torch.randn(2, 1200, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = cluster_layer(rows, rows, config)
    for questions, queries in ((1, 1), (200, 1), (1, 50)):
        query = torch.randn(questions, 6, queries, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        for thresholds in (None, (-7.0,) * levels):
            ops.attend_fixed(query, index, thresholds, index.tokens, 32**-0.5)
    assert [len(loop.signatures) for loop in LOOPS] == ready


_RESIDENT = """
import re, torch
from squeezed.config import BuildConfig
from squeezed.warm_up import warm_up

def resident():
    pages = open("/proc/self/smaps").read()
    return sum(map(int, re.findall(r" r-xp .*libllvmlite.*\\n(?:\\w+:.*\\n)*?Rss: +(\\d+)", pages)))

from squeezed.ops import cpu
print(resident())
warm_up(torch.float32, BuildConfig())
print(resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_the_compilers_code_does_not_stay_in_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=True)
    loaded, left = map(int, done.stdout.split())
    assert loaded > 10_000  # kB
    assert left < 0.1 * loaded
