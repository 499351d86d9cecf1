"""Every launch compiles for compute capability 9.0, without a GPU: the interpreter takes what the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_ROOT = Path(__file__).parents[2]
_SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction
from squeezed.clustering import triton as clustering
from squeezed.clustering.steps import Buckets, Centres
from squeezed import copying
from squeezed.decode import choose_triton, copy_triton, linear_triton, own, own_triton, qkv_triton
from squeezed.decode.sampler import Sampler, Sampling, StepState
from squeezed.ops.layout import Recalled
from squeezed.ops.triton import OwnKeys, Tally, attend_fixed, attend_with_own, device, merge_attention, peak_weights
from tests.ops.cases import Case, make_layer, make_query, make_recalled

compiled = set()

def kind(value):
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8"}
        return "*" + {**names, torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"

def run(self, *args, grid, warmup, **options):
    given = dict(zip(self.arg_names, args, strict=False))
    given |= {name: options.pop(name) for name in list(options) if name in self.arg_names}
    fixed = {p.name for p in self.params if p.is_constexpr} | {n for n, v in given.items() if v is None}
    signature = {n: "constexpr" if n in fixed else kind(given[n]) for n in self.arg_names}
    constants = {(self.arg_names.index(n),): given[n] for n in fixed}
    key = (self.fn.__name__, *signature.items(), *constants.items(), *sorted(options.items()))
    if str(key) not in compiled:
        compiled.add(str(key))
        source = ASTSource(self, signature, constants, {})
        compile(source, target=GPUTarget("cuda", 90, 32), options=options)

JITFunction.run = run
device.has_dependent_launch = lambda where: True  # as on that GPU
half = torch.bfloat16
for case in (
    Case(dtype=half, levels=2),
    Case(q_heads=8, dtype=half, compensate=True, centroid_bits=8, second_order=True),
    Case(dtype=half, levels=2, compensate=True, centroid_bits=8, key_bits=8),
    Case(q_heads=8, queries=40, dtype=half, levels=2, compensate=True, centroid_bits=8, second_order=True),
):
    layer, query = make_layer(case), make_query(case)
    thresholds = torch.zeros(case.levels)
    attend_fixed(query, layer, thresholds, layer.tokens, 0.1)
    peak_weights(query, layer.keys, torch.zeros(query.shape[:3]), 0.1, layer.scales)
    if case.queries > 1:
        attend_fixed(query.repeat(2, 1, 1, 1), layer, thresholds, layer.tokens, 0.1, 8)
    if case.queries == 1:
        held = torch.zeros(1, case.kv_heads, 70, case.head_dim, dtype=half)
        lengths, running = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        tally = Tally(torch.zeros(case.levels, 1, dtype=torch.int64), running)
        held_by = OwnKeys(held, held, lengths)
        attend_with_own(query, layer, thresholds, layer.tokens, 0.1, held_by, tally)
        recalled, ahead = make_recalled(case, layer), torch.zeros(2**24, dtype=half)
        attend_with_own(query, layer, thresholds, layer.tokens, 0.1, held_by, tally, recalled, ahead)
        attend_fixed(query, layer, thresholds, layer.tokens, 0.1, None, recalled)
x, rows = torch.zeros(128, dtype=half), lambda count: torch.zeros(count, 128, dtype=half)
norm, mine = linear_triton.Norm(x, 1e-5), own.OwnTokens(held, held, lengths)
weights = [rows(256), rows(128), rows(128)]
linear_triton.project(x, weights, None, norm)
linear_triton.project(x, weights[:1], residual=torch.zeros(256, dtype=half))
linear_triton.gated(x, weights[0], weights[0], norm)
rope = own.Rope(held[0, 0], held[0, 0])
query = qkv_triton.project_rotated(x, weights, None, norm, rope, mine)
mine.hold(held[:, :, :1], held[:, :, :1])
_, parts = own_triton.attend_own(query, mine, 0.1, rope)
out = (torch.zeros(1, query.shape[1], 1, case.head_dim), torch.zeros(1, query.shape[1], 1))
own_triton.join(parts, out, None, mine, query)
merge_attention([out, out])
for penalty in (1.0, 1.1):
    sampler = Sampler(Sampling(stops=(1, 2, 3), repetition_penalty=penalty), 2, 5000, x.device)
    choose_triton.choose_largest(torch.zeros(2, 5000, dtype=half), sampler, StepState.start(2, 1, 9, x.device))
finder, recent = copy_triton.Finder(torch.zeros(5000, dtype=torch.long), 2), torch.zeros(2, 6, dtype=torch.long)
found = torch.zeros(2, copying.WIDTH, dtype=torch.int32)
finder.follow(recent[:, :1], recent, found[:, :9], found)
for levels in (1, 2, 3):
    layer = make_layer(Case(levels=levels))
    held = Recalled(*(torch.zeros(1, 2, 2, 73, dtype=torch.int32) for _ in range(2)),
                    tuple(x.sizes.expand(1, 2, -1, -1) for x in layer.levels))
    copy_triton.bring(found, found, [x.offsets for x in layer.levels], held)
for dim in (128, 256):
    keys, squares, labels = torch.zeros(2, 300, dim, dtype=torch.half), torch.zeros(2, 300), torch.zeros(2, 300).int()
    centres = Centres(torch.zeros(2, 40, dim), torch.zeros(2, 40), torch.zeros(2, 40))
    order, starts = labels.clone(), torch.zeros(2, 6, dtype=torch.int32)
    for buckets in (None, Buckets(order, starts, None), Buckets(order, starts, torch.zeros(2, 5, 16).int())):
        for leave in (None, torch.ones(2, 40)):
            clustering.step(keys, squares, labels, centres, torch.ones(2, 40), leave, buckets, 0, 1)
    for given in (None, order):
        for weights in (None, squares):
            clustering.run_means(keys, given, starts, weights)
    clustering.run_spread(keys, starts, centres.rows)
    clustering.farthest(keys, squares, order, starts, centres)
print(len(compiled), "compiled")
"""


def test_every_launch_compiles_for_a_gpu_that_is_not_there() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(_ROOT)
    found = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, env=environment, cwd=_ROOT)
    assert found.returncode == 0, found.stderr[-3000:]
    assert int(found.stdout.split()[-2]) > 50
