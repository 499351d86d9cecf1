"""The compiled CPU operations and the plain reference agree, and both agree with dense attention in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from squeezed.ops import chain, cpu, reference
from squeezed.ops.cpu.intrinsics import exp_in_place
from squeezed.ops.layout import ClusterLevel
from squeezed.storage import add_centroid_values, to_eight_bits
from tests.ops.cases import Case, judge_whole, make_layer, make_query, quantile_thresholds

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MATRIX = [
    *(
        Case(dtype=dtype, head_dim=dim, q_heads=q_heads, kv_heads=kv_heads, queries=queries, batch=batch, seed=dim)
        for dtype in TOLERANCE
        for dim in (64, 128, 256)
        for q_heads, kv_heads, queries, batch in ((1, 1, 1, 1), (4, 4, 3, 2), (6, 2, 1, 3), (8, 1, 50, 1))
    ),
    Case(clusters=63, largest=3, seed=1),
    Case(clusters=500, largest=2, window=1, q_heads=14, kv_heads=2, seed=2),
    Case(clusters=1, window=0, seed=3),
    Case(clusters=37, levels=3, batch=2, seed=4),
]
THRESHOLDS = (float("-inf"), -6.0, -4.5, float("inf"))
SCALE = 0.11


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", MATRIX, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_attention_to_a_selection_equals_float64(case: Case, threshold: float, ops: object) -> None:
    layer, query = make_layer(case), make_query(case)
    level, window = layer.levels[0], (layer.clustered, layer.tokens)
    # A tail that nothing may read.
    poison = torch.full((case.kv_heads, 5, case.head_dim), float("nan"), dtype=case.dtype)
    keys, values = torch.cat([layer.keys, poison], 1), torch.cat([layer.values, poison], 1)
    scores = reference.score_centroids(query, level.centroids, level.sizes, SCALE)
    selected = reference.select_clusters(scores, threshold)
    if ops is reference:
        keys, values = layer.keys, layer.values
    output, lse = ops.attend_selected(query, keys, values, level.offsets, selected, window, SCALE)  # type: ignore[attr-defined]
    kept = reference.expand_to_children(selected, level.offsets, layer.tokens)
    kept[..., layer.clustered :] = True
    group = case.q_heads // case.kv_heads
    grouped = query.double().reshape(case.batch, case.kv_heads, group * case.queries, case.head_dim)
    logits = (SCALE * grouped @ layer.keys.double().transpose(-1, -2)).masked_fill(~kept.unsqueeze(2), float("-inf"))
    exact_lse = logits.logsumexp(-1)
    exact = torch.softmax(logits, -1).nan_to_num(0.0) @ layer.values.double()
    assert relative(output, exact.reshape(output.shape)) < TOLERANCE[case.dtype]
    torch.testing.assert_close(lse.double(), exact_lse.reshape(lse.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", MATRIX, ids=str)
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("allowed", ["all", "some", "none"])
def test_cpu_scores_equal_the_reference(case: Case, spread: bool, allowed: str) -> None:
    layer, query = make_layer(case), make_query(case)
    level = layer.levels[0]
    generator = torch.Generator().manual_seed(7)
    extra = torch.rand(level.sizes.shape, generator=generator) if spread else None
    inside = None
    if allowed != "all":
        inside = torch.rand(case.batch, *level.sizes.shape, generator=generator) < (0.6 if allowed == "some" else 0.0)
    expected = reference.score_centroids(query, level.centroids, level.sizes, SCALE, inside, extra)
    found = cpu.score_centroids(query, level.centroids, level.sizes, SCALE, inside, extra)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_are_weights_that_sum_to_one_over_keys() -> None:
    case = Case(batch=2, q_heads=4)
    layer, query = make_layer(case), make_query(case)
    level = layer.levels[0]
    scores = reference.score_centroids(query, level.centroids, level.sizes, SCALE)
    torch.testing.assert_close((scores.exp() * level.sizes).sum(-1), torch.ones(2, case.kv_heads))


@pytest.mark.parametrize("queries", [1, 40])
def test_the_whole_chain_equals_the_reference_on_every_level(queries: int) -> None:
    case = Case(levels=3, batch=2, q_heads=4, clusters=80, queries=queries)
    layer, query = make_layer(case), make_query(case)
    thresholds = (-5.0, -5.5, -5.8)
    found = chain.attend_fixed(cpu, query, layer, thresholds, layer.tokens, SCALE)
    expected = chain.attend_fixed(reference, query, layer, thresholds, layer.tokens, SCALE)
    assert relative(found[0], expected[0]) < 1e-5
    assert torch.equal(found[2], expected[2])
    assert 0 < int(found[2][0].sum()) < case.batch * case.kv_heads * layer.clustered


STORED = [
    replace(case, compensate=compensate, centroid_bits=min(8, bits) if bits == 8 else centroid_bits, key_bits=bits)
    for case in (
        *(Case(dtype=dtype, head_dim=64, q_heads=6, kv_heads=2, queries=3, seed=5) for dtype in TOLERANCE),
        Case(head_dim=128, levels=2, batch=2, clusters=70, second_order=True, seed=6),
        Case(levels=3, clusters=90, queries=40, q_heads=4, seed=7),
        Case(clusters=63, largest=3, seed=8),
    )
    for compensate, centroid_bits, bits in ((True, 16, 16), (True, 8, 16), (False, 8, 16), (True, 8, 8), (False, 8, 8))
]
STORED.append(replace(STORED[3], sinks=0))


@pytest.mark.parametrize("case", STORED, ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_stand_ins_and_eight_bits_equal_float64_over_the_same_rows(
    case: Case, keep: float | None, ops: ModuleType
) -> None:
    """`keep` None attends to everything without looking at centroids."""
    layer, query = make_layer(case), make_query(case)
    thresholds = [math.inf if keep == 0 else -math.inf] * case.levels
    if keep == 0.3:
        thresholds = quantile_thresholds(query, layer, SCALE, keep).tolist()
    end = layer.tokens - 3
    output, lse, _ = chain.attend_fixed(ops, query, layer, None if keep is None else tuple(thresholds), end, SCALE)
    expected, expected_lse = judge_whole(query, layer, thresholds, end, SCALE)
    assert relative(output, expected) < TOLERANCE[case.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


def test_with_one_key_per_cluster_stand_ins_make_any_selection_dense() -> None:
    case = Case(clusters=50, largest=3, compensate=True, q_heads=4)
    layer, query = make_layer(case), make_query(case)
    singles = torch.ones(case.kv_heads, layer.clustered, dtype=torch.int32)
    each = torch.arange(layer.clustered + 1, dtype=torch.int32).expand(case.kv_heads, -1).contiguous()
    level = ClusterLevel(layer.keys[:, : layer.clustered], singles, each)
    layer = add_centroid_values(replace(layer, levels=(level,)))
    dense, dense_lse, _ = chain.attend_fixed(cpu, query, layer, None, layer.tokens, SCALE)
    for keep in (0.1, 0.7):
        threshold = quantile_thresholds(query, layer, SCALE, keep).tolist()
        output, lse, kept = chain.attend_fixed(cpu, query, layer, tuple(threshold), layer.tokens, SCALE)
        assert 0 < int(kept[0].sum()) < layer.clustered * case.kv_heads
        assert relative(output, dense) < 1e-5
        torch.testing.assert_close(lse, dense_lse)


def reference_means(keys: Tensor, level: ClusterLevel) -> Tensor:
    """Mean key of each cluster of one level, zeros for padding."""
    means = torch.zeros(level.shape)
    for head, cluster in (level.sizes > 0).nonzero().tolist():
        means[head, cluster] = keys[head, level.offsets[head, cluster] : level.offsets[head, cluster + 1]].mean(0)
    return means


def test_eight_bits_keep_attention_where_channels_have_large_constants_and_sinks_lie_far_off() -> None:
    case = Case(clusters=80, q_heads=4, head_dim=64, seed=9)
    layer, query = make_layer(case), make_query(case)
    generator = torch.Generator().manual_seed(1)
    keys = layer.keys + 40 * torch.randn(case.kv_heads, 1, case.head_dim, generator=generator)
    keys[:, layer.clustered : layer.clustered + 4] *= -5
    centroids = reference_means(keys, layer.levels[0])
    plain = add_centroid_values(replace(layer, keys=keys, levels=(replace(layer.levels[0], centroids=centroids),)))
    scale, centre = to_eight_bits(plain, keys_too=False).scales[:2]  # type: ignore[index]
    # Heads differ in their number of clusters; padding must not widen the range that 8 bits have to hold.
    valid = plain.levels[0].sizes[1] > 0
    low, high = centroids[1, valid].amin(0), centroids[1, valid].amax(0)
    torch.testing.assert_close(scale[1] * 254, high - low)
    torch.testing.assert_close(centre[1], (high + low) / 2)
    packed = to_eight_bits(plain, keys_too=True, sinks=4)
    assert packed.keys.dtype == torch.int8
    dense = chain.attend_fixed(reference, query, plain, None, layer.tokens, SCALE)[0]
    found = chain.attend_fixed(reference, query, packed, None, layer.tokens, SCALE)[0]
    assert relative(found, dense) < 0.02


def test_merging_parts_equals_attending_to_their_union() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    values = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    parts = [
        (torch.softmax(logits[:, s], -1) @ values[s], logits[:, s].logsumexp(-1))
        for s in (slice(0, 3), slice(3, 20), slice(20, 30))
    ]
    nothing = (torch.zeros(5, 8, dtype=torch.float64), torch.full((5,), float("-inf"), dtype=torch.float64))
    output, lse = reference.merge_attention([*parts, nothing])
    torch.testing.assert_close(output, torch.softmax(logits, -1) @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    assert torch.equal(reference.merge_attention([nothing, nothing])[0], nothing[0])


def test_the_vectorised_exponential_is_exact_to_float32() -> None:
    x = -np.concatenate([np.linspace(0, 86, 20001), [87.5, 100.0, 1e30, np.inf]]).astype(np.float32)
    found = x.copy()
    exp_in_place(found, len(found))
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(found[:-4] / expected[:-4] - 1)) < 3e-7
    assert np.all(found[-4:] == 0)
