"""The Triton operations compute what the reference operations define.

Without a CUDA device they run through Triton's interpreter (TRITON_INTERPRET=1); with one, `pytest -m gpu` runs the
same matrix and shapes too large for an interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from squeezed.ops import chain, cpu, reference
from squeezed.ops.layout import ClusteredKeys
from squeezed.ops.triton import attend, attend_fixed, merge_attention, peak_weights
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.chain import select_keys
from squeezed.ops.triton.score import score_few_rows
from squeezed.ops.triton.score_many import score_many_rows
from tests.ops.cases import (
    Case,
    decided,
    judge,
    judge_whole,
    list_to_mask,
    make_layer,
    make_query,
    make_recalled,
    quantile_thresholds,
    reference_selection,
    relative_error,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Scaled queries for rows in 8 bits are float16 unless the queries are float32.
STORED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
# Of log-sum-exps: a logit of 13 in bfloat16 is known to 0.03.
LSE_TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 6e-2}

SMALL = [
    Case(),
    Case(batch=3, q_heads=4, kv_heads=1, levels=2, seed=1),
    Case(batch=2, q_heads=6, kv_heads=2, levels=3, clusters=61, seed=2),
    Case(queries=5, q_heads=4, seed=3),
    Case(queries=50, q_heads=4, levels=2, clusters=70, seed=4),
    Case(batch=2, queries=33, levels=3, clusters=65, seed=5),
    Case(clusters=1, window=1, seed=6),
    Case(clusters=50, largest=3, window=0, seed=7),
    Case(head_dim=128, dtype=torch.float16, q_heads=8, seed=8),
    Case(head_dim=256, dtype=torch.float16, queries=40, seed=9),
    Case(q_heads=4, levels=2, seed=18, second_order=True),
    Case(q_heads=4, queries=30, levels=2, seed=19, second_order=True),
    Case(clusters=1100, largest=6, kv_heads=1, q_heads=1, seed=10),
]
LARGE = [
    *(Case(dtype=dtype, head_dim=dim, q_heads=q_heads, queries=queries, batch=batch, levels=levels, clusters=clusters)
      for dtype in (torch.float32, torch.float16, torch.bfloat16)
      for dim in (64, 128, 256)
      for q_heads, queries, batch, levels, clusters in ((2, 1, 3, 1, 3000), (8, 1, 1, 2, 5000), (4, 300, 1, 2, 2000))),
    Case(q_heads=32, kv_heads=32, clusters=1000, batch=2, dtype=torch.bfloat16, head_dim=128),
    Case(q_heads=64, kv_heads=1, clusters=20000, dtype=torch.bfloat16, head_dim=128),
    Case(queries=256, batch=2, clusters=2000, dtype=torch.bfloat16, head_dim=128),
    Case(q_heads=8, queries=512, clusters=600, dtype=torch.float16, head_dim=128, seed=1),
]  # fmt: skip


def needs_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(function))


def on_device(function):
    """In the interpreter, or on a CUDA device."""
    return function if INTERPRETED else needs_gpu(function)


def matrix(function):
    return on_device(pytest.mark.parametrize("case", SMALL, ids=range(len(SMALL)))(function))


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Memory that an operation allocates starts as NaN, or as a huge integer."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)


def setup(case: Case, keep: float = 0.3) -> tuple[Tensor, ClusteredKeys, Tensor, float]:
    device = "cpu" if INTERPRETED else "cuda"
    layer, query, scale = make_layer(case, device), make_query(case, device), case.head_dim**-0.5
    return query, layer, quantile_thresholds(query, layer, scale, keep), scale


def assert_matches(case: Case, query: Tensor, layer: ClusteredKeys, thresholds: Tensor, scale: float) -> None:
    output, lse, kept = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    selected = reference_selection(query, layer, thresholds, scale)
    expected, expected_lse = judge(query, layer, selected, layer.tokens, scale)
    assert torch.equal(kept[0].long(), reference.kept_keys(selected, layer.levels[0].sizes).long())
    assert relative_error(output, expected) < TOLERANCE[case.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)


@matrix
def test_the_chain_equals_float64_attention_to_what_the_reference_selects(case: Case) -> None:
    assert_matches(case, *setup(case))


@needs_gpu
@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
def test_the_chain_on_shapes_too_large_for_an_interpreter(case: Case) -> None:
    assert_matches(case, *setup(case))


@matrix
def test_minus_infinity_keeps_every_key(case: Case) -> None:
    query, layer, thresholds, scale = setup(case)
    thresholds = torch.full_like(thresholds, float("-inf"))
    assert_matches(case, query, layer, thresholds, scale)
    kept = attend_fixed(query, layer, thresholds, layer.tokens, scale)[2]
    assert (kept[0] == layer.clustered).all()
    for coarse, level in zip(kept[1:], layer.levels[:-1], strict=True):
        assert torch.equal(coarse, (level.sizes > 0).sum(-1).int().expand_as(coarse))


@matrix
def test_infinity_keeps_only_the_window_and_an_empty_list_gives_zero(case: Case) -> None:
    query, layer, thresholds, scale = setup(case)
    thresholds = torch.full_like(thresholds, float("inf"))
    if case.window:
        assert_matches(case, query, layer, thresholds, scale)
    output, lse, kept = attend_fixed(query, layer, thresholds, layer.clustered, scale)
    assert (output == 0).all()
    assert (lse == float("-inf")).all()
    assert (kept == 0).all()


@matrix
def test_the_work_list_names_each_kept_key_once(case: Case) -> None:
    query, layer, thresholds, scale = setup(case)
    rows = case.q_heads // case.kv_heads * case.queries
    grouped = query.reshape(case.batch, case.kv_heads, rows, case.head_dim)
    config = attend.attend_config(case.head_dim, rows, case.dtype, 1)
    parts = [[getattr(level, name) for level in layer.levels] for name in ("centroids", "sizes", "offsets")]
    window = (layer.clustered, layer.tokens)
    for width in (1, 8):
        narrow = replace(config, width=width)
        spreads = [level.spread for level in layer.levels] if case.second_order else None
        work, _ = select_keys(grouped, *parts, layer.clustered, thresholds, window, scale, narrow, spreads=spreads)
        times = list_to_mask(work.entries.cpu(), work.counts.cpu(), width, layer.tokens)
        selected = reference_selection(query, layer, thresholds, scale)
        expected = reference.expand_to_children(selected, layer.levels[0].offsets, layer.tokens).long().cpu()
        expected[..., layer.clustered :] = 1
        assert torch.equal(times.reshape(expected.shape), expected)


@on_device
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("score", [score_few_rows, score_many_rows])
def test_scores_equal_the_reference(score, queries: int) -> None:
    if score is score_few_rows and queries > dev.FEW_ROWS:
        pytest.skip("few rows only")
    case = Case(queries=queries, q_heads=2, kv_heads=2, clusters=90, seed=11)
    query, layer, _, scale = setup(case)
    level = layer.levels[0]
    scores = score(query.reshape(1, 2, queries, 64), level.centroids, level.sizes, scale, 8)
    logits = scores.logits
    assert (scores.sync == 0).all()
    if scores.part_max is not None:
        top = scores.part_max.amax(-1)
        total = (scores.part_sum * (scores.part_max - top[..., None]).exp()).sum(-1)
        logits = (logits - (top + total.log())[..., None]).logsumexp(1, keepdim=True) - torch.tensor(queries).log()
    expected = reference.score_centroids(query, level.centroids, level.sizes, scale)[0]
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-5, atol=1e-5)


@on_device
def test_scores_far_below_float32_range_still_select() -> None:
    case = Case(queries=1, seed=12)
    query, layer, _, _ = setup(case)
    assert_matches(case, query, layer, torch.tensor([-300.0], device=query.device), 10.0)


@on_device
def test_a_question_is_answered_alike_alone_and_in_a_batch() -> None:
    case = Case(batch=3, q_heads=4, levels=2, seed=13)
    query, layer, thresholds, scale = setup(case)
    together = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    for index in range(3):
        alone = attend_fixed(query[index : index + 1], layer, thresholds, layer.tokens, scale)
        torch.testing.assert_close(together[0][index : index + 1], alone[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(together[2][:, index : index + 1], alone[2])


VOTED = [
    (Case(queries=50, q_heads=4, levels=2, clusters=70, seed=31), 7),
    (Case(batch=3, queries=33, levels=3, clusters=65, seed=32), 16),
    (Case(batch=2, queries=40, q_heads=4, kv_heads=1, dtype=torch.float16, second_order=True, seed=33), 39),
    (Case(queries=6, q_heads=4, levels=2, seed=34), 4),
    (Case(queries=6, q_heads=4, compensate=True, centroid_bits=8, second_order=True, seed=35), 1),
    (Case(batch=2, queries=40, q_heads=4, levels=2, compensate=True, centroid_bits=8, second_order=True, seed=36), 5),
]


@on_device
@pytest.mark.parametrize(("case", "most"), VOTED, ids=range(len(VOTED)))
def test_a_few_queries_select_for_all(case: Case, most: int) -> None:
    query, layer, _, scale = setup(case)
    step = -(-case.queries // most)
    asking = query[:, :, step // 2 :: step]
    assert 1 <= asking.shape[2] <= most
    thresholds = quantile_thresholds(asking, layer, scale, 0.3)
    output, lse, kept = attend_fixed(query, layer, thresholds, layer.tokens, scale, most)
    selected = reference_selection(asking, layer, thresholds, scale)
    assert torch.equal(kept[0].long(), reference.kept_keys(selected, layer.levels[0].sizes).long())
    assert 0 < kept[0].sum() < case.batch * case.kv_heads * layer.clustered
    expected, expected_lse = judge_whole(query, layer, thresholds, layer.tokens, scale, asking)
    assert relative_error(output, expected) < STORED_TOLERANCE[case.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-2)
    for ops in (reference, cpu):
        if INTERPRETED:
            same = chain.attend_fixed(ops, query, layer, tuple(thresholds.tolist()), layer.tokens, scale, most)
            assert relative_error(same[0], expected) < STORED_TOLERANCE[case.dtype]
            assert torch.equal(same[2][0], kept[0].long())


@on_device
@pytest.mark.parametrize("voters", [None, 8])
@pytest.mark.parametrize("levels", [1, 2])
def test_blocks_of_a_question_are_attended_alike_in_one_call_and_one_by_one(levels: int, voters: int | None) -> None:
    case = Case(batch=3, q_heads=4, queries=20, levels=levels, clusters=60, compensate=True, centroid_bits=8, seed=37)
    query, layer, thresholds, scale = setup(case)
    together = attend_fixed(query, layer, thresholds, layer.tokens, scale, voters)
    for index in range(3):
        alone = attend_fixed(query[index : index + 1], layer, thresholds, layer.tokens, scale, voters)
        torch.testing.assert_close(together[0][index : index + 1], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][index : index + 1], alone[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(together[2][:, index : index + 1], alone[2])


@on_device
def test_repeated_calls_give_the_same_bits() -> None:
    case = Case(batch=2, q_heads=4, clusters=300, seed=14)
    query, layer, thresholds, scale = setup(case)
    first = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    again = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


STORED = [
    replace(case, compensate=compensate, centroid_bits=8 if bits == 8 else centroid_bits, key_bits=bits)
    for case in (
        Case(seed=21),
        Case(dtype=torch.float16, seed=22, levels=2, batch=2, second_order=True),
        Case(q_heads=8, head_dim=128, dtype=torch.float16, seed=23),
        Case(queries=40, q_heads=4, levels=2, clusters=60, second_order=True, seed=24),
        Case(queries=40, q_heads=1, kv_heads=1, dtype=torch.float16, seed=25),
        Case(batch=2, q_heads=4, kv_heads=1, levels=3, clusters=61, seed=26),
    )
    for compensate, centroid_bits, bits in ((True, 16, 16), (True, 8, 16), (True, 8, 8), (False, 8, 8))
]
STORED.append(replace(STORED[2], sinks=0))
# Every token of a question as a question of its own: few rows each, many together.
STORED.append(
    Case(batch=10, q_heads=14, clusters=20, largest=12, window=5, second_order=True, compensate=True, centroid_bits=8)
)
STORED_LARGE = [
    Case(dtype=dtype, head_dim=dim, q_heads=q_heads, queries=queries, levels=levels, clusters=clusters, batch=batch,
         second_order=True, compensate=True, centroid_bits=8, key_bits=bits)
    for dtype, dim in ((torch.float32, 64), (torch.float16, 128), (torch.bfloat16, 128), (torch.bfloat16, 256))
    for bits in (16, 8)
    for q_heads, queries, levels, batch, clusters in (
        (2, 1, 1, 2, 3000), (8, 1, 2, 1, 3000), (4, 300, 2, 1, 3000), (14, 1, 2, 150, 200)
    )
]  # fmt: skip


def assert_matches_whole(case: Case, keep: float | None = None, short: int = 3) -> None:
    query, layer, thresholds, scale = setup(case)
    if keep is not None:
        thresholds.fill_(float("-inf") if keep else float("inf"))
    end = layer.tokens - short
    output, lse, _ = attend_fixed(query, layer, thresholds, end, scale)
    expected, expected_lse = judge_whole(query, layer, thresholds, end, scale)
    if case.batch > 64 and keep is None:
        # Among many questions there is always one whose selection hangs on a rounding.
        sure = decided(query, layer, thresholds, scale).repeat_interleave(case.q_heads // case.kv_heads, 1)
        assert sure.float().mean() > 0.5
        output, lse, expected, expected_lse = (x[sure] for x in (output, lse, expected, expected_lse))
    assert relative_error(output, expected) < STORED_TOLERANCE[case.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=LSE_TOLERANCE[case.dtype])


@on_device
@pytest.mark.parametrize("case", STORED, ids=range(len(STORED)))
def test_stand_ins_and_eight_bits_equal_float64_over_the_same_rows(case: Case) -> None:
    for keep in (None, 0.0, 1.0):
        assert_matches_whole(case, keep)


@needs_gpu
@pytest.mark.parametrize("case", STORED_LARGE, ids=range(len(STORED_LARGE)))
def test_stand_ins_and_eight_bits_on_shapes_too_large_for_an_interpreter(case: Case) -> None:
    for keep in (None, 0.0, 1.0):
        assert_matches_whole(case, keep)


RECALLED = [
    Case(seed=41),
    Case(batch=3, q_heads=4, levels=2, clusters=300, seed=42),
    Case(q_heads=4, dtype=torch.float16, head_dim=128, compensate=True, centroid_bits=8, second_order=True, seed=43),
    Case(batch=2, q_heads=14, levels=3, clusters=90, compensate=True, centroid_bits=8, key_bits=8, seed=44),
    Case(batch=2, kv_heads=1, levels=2, clusters=61, largest=3, compensate=True, centroid_bits=8, key_bits=8, seed=45),
    # More rows than keep their logits.
    Case(batch=2, q_heads=80, levels=2, clusters=61, compensate=True, centroid_bits=8, seed=46),
]


@on_device
@pytest.mark.parametrize(
    ("case", "shared"), [(case, shared) for case in RECALLED for shared in (False, True)[: case.batch]]
)
def test_recalled_keys_are_attended_once_whatever_is_selected(case: Case, shared: bool) -> None:
    query, layer, thresholds, scale = setup(case)
    recalled = make_recalled(case, layer, shared=shared)
    for keep in (None, 0.0, 1.0):
        if keep is not None:
            thresholds.fill_(float("-inf") if keep else float("inf"))
        end = layer.tokens - 3
        output, lse, kept = attend_fixed(query, layer, thresholds, end, scale, None, recalled)
        expected, expected_lse = judge_whole(query, layer, thresholds, end, scale, recalled=recalled)
        assert relative_error(output, expected) < STORED_TOLERANCE[case.dtype]
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=LSE_TOLERANCE[case.dtype])
        selected = reference_selection(query, layer, thresholds, scale)
        assert torch.equal(kept[0].long(), reference.kept_keys(selected, layer.levels[0].sizes, recalled).long())
        if keep == 0.0:
            present = (recalled.slots >= 0).sum(-1).expand(case.batch, -1)
            assert torch.equal(kept[0].long(), present)
        for ops in (reference, cpu):
            if INTERPRETED:
                same = chain.attend_fixed(ops, query, layer, tuple(thresholds.tolist()), end, scale, recalled=recalled)
                assert relative_error(same[0], expected) < STORED_TOLERANCE[case.dtype]
                assert torch.equal(same[2][0], kept[0].long())


@on_device
def test_merging_equals_attention_over_the_union() -> None:
    case = Case(q_heads=4, queries=3, seed=16)
    query, layer, thresholds, scale = setup(case)
    parts = [attend_fixed(query, layer, thresholds * sign, layer.clustered, scale)[:2] for sign in (1, -float("inf"))]
    empty = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], float("-inf")))
    for chosen in (parts, [parts[0], empty], [empty, empty]):
        output, lse = merge_attention(chosen)
        expected, expected_lse = reference.merge_attention(chosen)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_an_unsupported_head_dim_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="head_dim 80"):
        dev.check_head_dim(80)


@needs_gpu
def test_a_cuda_graph_follows_thresholds_that_change_between_replays() -> None:
    case = Case(batch=2, q_heads=8, clusters=2000, head_dim=128, dtype=torch.bfloat16)
    query, layer, thresholds, scale = setup(case)
    attend_fixed(query, layer, thresholds, layer.tokens, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse, kept = attend_fixed(query, layer, thresholds, layer.tokens, scale)
    for keep in (0.1, 0.6):
        thresholds.copy_(quantile_thresholds(query, layer, scale, keep))
        graph.replay()
        expected = attend_fixed(query, layer, thresholds, layer.tokens, scale)
        assert all(torch.equal(a, b) for a, b in zip((output, lse, kept), expected, strict=True))


@needs_gpu
def test_compiled_without_a_graph_break() -> None:
    case = Case(batch=2, q_heads=8, clusters=500, head_dim=128, dtype=torch.bfloat16)
    query, layer, thresholds, scale = setup(case)
    compiled = torch.compile(lambda q: attend_fixed(q * 1, layer, thresholds, layer.tokens, scale)[0], fullgraph=True)
    expected = attend_fixed(query, layer, thresholds, layer.tokens, scale)[0]
    torch.testing.assert_close(compiled(query), expected, rtol=1e-3, atol=1e-3)


@on_device
def test_the_operator_is_registered_with_a_matching_fake() -> None:
    case = Case(seed=17)
    query, layer, thresholds, scale = setup(case)
    level = layer.levels[0]
    arguments = (query, layer.keys, layer.values, [level.centroids], [level.sizes], [level.offsets])
    rest = (layer.clustered, thresholds, layer.tokens, scale, [], [], [], [], None, [])
    torch.library.opcheck(
        torch.ops.squeezed.attend_fixed.default, (*arguments, *rest), test_utils=("test_schema", "test_faketensor")
    )


def assert_peaks_match(case: Case) -> None:
    """Against float64, over a part of the keys; some queries do not count."""
    query, layer, _, scale = setup(case)
    keys = layer.keys[:, : layer.clustered]
    wide = reference.from_eight_bits(keys, *layer.scales[:2]) if case.key_bits == 8 else keys
    grouped = query.double().reshape(case.batch, case.kv_heads, -1, case.head_dim)
    logits = scale * grouped @ wide.double().transpose(1, 2)
    lse = logits.logsumexp(-1)
    if lse.shape[2] > 1:
        lse[-1, :, ::3] = float("inf")
    expected = (logits - lse[..., None]).amax(2).exp()
    scales = layer.scales if case.key_bits == 8 else None
    found = peak_weights(query, keys, lse.float().reshape(query.shape[:3]), scale, scales)
    assert found.shape == (case.batch, case.kv_heads, layer.clustered)
    # Scaled queries in float16 leave a logit of 20 known to 0.01.
    tolerance = 3e-2 if case.key_bits == 8 and case.dtype != torch.float32 else 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-7)


@matrix
def test_peak_weights_equal_float64(case: Case) -> None:
    assert_peaks_match(case)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_peak_weights_of_eight_bits_equal_float64(dtype: torch.dtype) -> None:
    assert_peaks_match(Case(2, 4, queries=9, dtype=dtype, key_bits=8, centroid_bits=8, compensate=True))


@needs_gpu
@pytest.mark.parametrize("case", LARGE, ids=range(len(LARGE)))
def test_peak_weights_of_many_keys_equal_float64(case: Case) -> None:
    assert_peaks_match(case)
