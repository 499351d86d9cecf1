"""Attention to a fixed context and the own tokens, judged by a float64 masked dense computation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor

from squeezed.attention import squeezed_attention
from squeezed.cache import FixedLayer, Selection
from squeezed.calibration import ThresholdCurves, calibrate
from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.ops import cpu, reference
from squeezed.ops.layout import ClusteredKeys, ClusterLevel
from squeezed.storage import to_eight_bits

Q_HEADS, KV_HEADS, TOKENS, DIM = 6, 2, 333, 32
# Without stand-ins, so that what is attended is what is selected; with them: tests/ops/test_cpu.py.
CONFIG = BuildConfig(clusters=0.1, window=20, sinks=3, iterations=5, compensate=False, centroid_bits=16)
SCALE = 0.3
MODULE = torch.nn.Module()
SPARSITIES = (0.0, 0.3, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Context:
    """A layer's keys and values in text order [kv_heads, tokens, dim], their index, and thresholds for it."""

    keys: Tensor
    values: Tensor
    index: ClusteredKeys
    curves: ThresholdCurves


@cache
def context(levels: int = 1, dtype: torch.dtype = torch.float32) -> Context:
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(KV_HEADS, 12, DIM, generator=generator)
    topic = torch.randint(12, (TOKENS,), generator=generator)
    keys = (topics[:, topic] + 0.5 * torch.randn(KV_HEADS, TOKENS, DIM, generator=generator)).to(dtype)
    values = torch.randn(KV_HEADS, TOKENS, DIM, generator=generator).to(dtype)
    index = cluster_layer(keys, values, replace(CONFIG, levels=levels))
    return Context(keys, values, index, calibrate([index], [[queries(1, 64, dtype, seed=9)[0]]], [SCALE]))


def queries(batch: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(batch, Q_HEADS, length, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_tokens(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(batch, KV_HEADS, length, DIM, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def causal(batch: int, queries: int, length: int, padding: list[int] | None = None) -> Tensor:
    """Boolean mask [batch, 1, queries, length] of the own tokens, the first `padding` of each row left out."""
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries).expand(batch, 1, -1, -1).clone()
    for row, count in enumerate(padding or []):
        mask[row, :, :, :count] = False
    return mask


def layer(
    made: Context,
    sparsity: float,
    window_end: int = TOKENS,
    block: int = 256,
    alone: int = 0,
    voters: int | None = None,
    whole: int = 0,
) -> FixedLayer:
    """By default the queries of a question share selections; `alone` is large where each selects for itself, `whole`
    where questions read everything."""
    return FixedLayer(made.index, Selection(made.curves, sparsity, block, voters, alone, whole=whole), window_end)


def attend(fixed: FixedLayer, query: Tensor, own: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """[batch, q_heads, queries, dim], as transformers would get it."""
    out, _ = squeezed_attention(MODULE, query, *own, mask, scaling=SCALE, squeezed_layer=fixed)
    return out.transpose(1, 2)


def selected_keys(made: Context, query: Tensor, sparsity: float) -> Tensor:
    """[batch, kv_heads, tokens] bool over the store: the keys that one selection for all of `query` attends."""
    index, ops = made.index, cpu
    always = torch.arange(TOKENS) >= index.clustered
    if sparsity == 0:
        return torch.ones(query.shape[0], KV_HEADS, TOKENS, dtype=torch.bool)
    thresholds, allowed = made.curves.at(sparsity, query.shape[2]), None
    for level in reversed(range(len(index.levels))):
        found = index.levels[level]
        scores = ops.score_centroids(query, found.centroids, found.sizes, SCALE, allowed, found.spread)
        children = index.levels[level - 1].shape[1] if level else TOKENS
        allowed = reference.expand_to_children(scores > thresholds[level], found.offsets, children)
    return allowed | always


def judged(made: Context, query: Tensor, own: tuple[Tensor, Tensor], mask: Tensor, kept: Tensor) -> Tensor:
    """Softmax attention in float64 over the kept keys of the store and the own tokens."""
    group = Q_HEADS // KV_HEADS
    batch, length = query.shape[0], query.shape[2]
    keys = torch.cat([made.index.keys.double().expand(batch, -1, -1, -1), own[0].double()], dim=2)
    values = torch.cat([made.index.values.double().expand(batch, -1, -1, -1), own[1].double()], dim=2)
    seen = torch.cat([kept.unsqueeze(2).expand(-1, -1, length, -1), mask.expand(-1, KV_HEADS, -1, -1)], dim=-1)
    repeat = lambda tensor: tensor.repeat_interleave(group, dim=1)  # noqa: E731
    logits = SCALE * query.double() @ repeat(keys).transpose(-1, -2)
    return logits.masked_fill(~repeat(seen), float("-inf")).softmax(-1) @ repeat(values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_output_equals_float64_attention_over_the_same_selection(
    sparsity: float, levels: int, length: int, dtype: torch.dtype, tolerance: float
) -> None:
    made, query, own = context(levels, dtype), queries(2, length, dtype), own_tokens(2, length + 5, dtype)
    mask = causal(2, length, length + 5)
    expected = judged(made, query, own, mask, selected_keys(made, query, sparsity))
    found = attend(layer(made, sparsity), query, own, mask)
    assert found.dtype == dtype
    assert tiny.relative_error(found, expected) < tolerance


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_higher_sparsity_keeps_fewer_keys(levels: int) -> None:
    made, kept = context(levels), []
    for sparsity in SPARSITIES:
        fixed = layer(made, sparsity)
        attend(fixed, queries(2, 1), own_tokens(2, 1), causal(2, 1, 1))
        kept.append(fixed.usage().kept_fraction)
    assert kept[0] == 1
    assert kept[-1] == 0
    assert kept == sorted(kept, reverse=True)
    assert 0 < kept[3] < kept[1] < 1


def test_the_window_and_the_sinks_are_attended_at_sparsity_1() -> None:
    made, query, own = context(), queries(1, 1), own_tokens(1, 1)
    always = torch.cat([torch.arange(3), torch.arange(TOKENS - 20, TOKENS)])
    keys, values = (
        torch.cat([tensor[:, always], mine[0]], dim=1).double().repeat_interleave(Q_HEADS // KV_HEADS, dim=0)
        for tensor, mine in zip((made.keys, made.values), own, strict=True)
    )
    expected = (SCALE * query[0].double() @ keys.transpose(-1, -2)).softmax(-1) @ values
    assert tiny.relative_error(attend(layer(made, 1.0), query, own, None)[0], expected) < 1e-5


@pytest.mark.parametrize("given_up", [1, 5])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_fixed_tokens_that_were_given_up_are_not_attended(sparsity: float, given_up: int) -> None:
    made, query, own, mask = context(), queries(1, 3), own_tokens(1, 3), causal(1, 3, 3)
    kept = selected_keys(made, query, sparsity)
    kept[..., TOKENS - given_up :] = False
    expected = judged(made, query, own, mask, kept)
    assert tiny.relative_error(attend(layer(made, sparsity, TOKENS - given_up), query, own, mask), expected) < 1e-5


@pytest.mark.parametrize("levels", [1, 2])
def test_selection_is_deterministic(levels: int) -> None:
    made, query, own = context(levels), queries(2, 9), own_tokens(2, 9)
    outputs = [attend(layer(made, 0.8), query, own, causal(2, 9, 9)) for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_building_twice_gives_the_same_index() -> None:
    made = context(2)
    again = cluster_layer(made.keys, made.values, replace(CONFIG, levels=2))
    assert torch.equal(again.keys, made.index.keys)
    assert torch.equal(again.positions, made.index.positions)
    curves = calibrate([again], [[queries(1, 64, seed=9)[0]]], [SCALE])
    assert torch.equal(curves.log_thresholds, made.curves.log_thresholds)


def _reordered(index: ClusteredKeys) -> ClusteredKeys:
    """The same clusters of one level laid out in another order, and the keys inside each cluster too."""
    found, parts = index.levels[0], []
    generator = torch.Generator().manual_seed(5)
    for head in range(KV_HEADS):
        order = [i for i in torch.randperm(found.shape[1], generator=generator).tolist() if found.sizes[head, i] > 0]
        padding = [i for i in range(found.shape[1]) if found.sizes[head, i] == 0]
        runs = [torch.arange(int(found.offsets[head, i]), int(found.offsets[head, i + 1])).flip(0) for i in order]
        tail = torch.arange(index.clustered, index.tokens)
        parts.append((torch.tensor(order + padding), torch.cat([*runs, tail])))
    clusters, keys = (torch.stack([part[i] for part in parts]) for i in range(2))
    sizes = found.sizes.gather(1, clusters)
    offsets = torch.nn.functional.pad(sizes.cumsum(1), (1, 0)).int()
    by_cluster = clusters.unsqueeze(-1).expand(-1, -1, DIM)
    level = replace(
        found,
        centroids=found.centroids.gather(1, by_cluster),
        sizes=sizes,
        offsets=offsets,
        spread=None if found.spread is None else found.spread.gather(1, clusters),
    )
    by_key = keys.unsqueeze(-1).expand(-1, -1, DIM)
    return replace(
        index,
        keys=index.keys.gather(1, by_key),
        values=index.values.gather(1, by_key),
        positions=index.positions.gather(1, keys[:, : index.clustered]),
        levels=(level,),
    )


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_order_of_clusters_and_keys_in_the_store_changes_nothing(sparsity: float, length: int) -> None:
    made = context()
    moved = replace(made, index=_reordered(made.index))
    assert not torch.equal(moved.index.keys, made.index.keys)
    query, own, mask = queries(2, length), own_tokens(2, length), causal(2, length, length)
    first, second = layer(made, sparsity), layer(moved, sparsity)
    found, expected = attend(second, query, own, mask), attend(first, query, own, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert second.usage(decode=False).kept_fraction == first.usage(decode=False).kept_fraction or length == 1


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_question_does_not_depend_on_its_batch_neighbours(levels: int, sparsity: float, length: int) -> None:
    made, query, own = context(levels), queries(3, length), own_tokens(3, length)
    padding = [0, length // 2, length - 1]
    together = attend(layer(made, sparsity), query, own, causal(3, length, length, padding))
    for row, first in enumerate(padding):
        mine = (own[0][row : row + 1, :, first:], own[1][row : row + 1, :, first:])
        mask = causal(1, length - first, length - first)
        alone = attend(layer(made, sparsity), query[row : row + 1, :, first:], mine, mask)
        torch.testing.assert_close(together[row, :, first:], alone[0], rtol=1e-5, atol=1e-5)


def test_each_question_of_a_batch_is_told_what_it_read_itself() -> None:
    made, query, own = context(), queries(2, 12), own_tokens(2, 12)
    together = layer(made, 0.7)
    attend(together, query, own, causal(2, 12, 12, [0, 4]))
    for row, first in enumerate([0, 4]):
        alone = layer(made, 0.7)
        mine = (own[0][row : row + 1, :, first:], own[1][row : row + 1, :, first:])
        attend(alone, query[row : row + 1, :, first:], mine, causal(1, 12 - first, 12 - first))
        expected = alone.usage(decode=False).kept_fraction
        assert together.usage(decode=False).question(row).kept_fraction == pytest.approx(expected)


@pytest.mark.parametrize("levels", [1, 2])
def test_queries_of_a_short_question_select_as_if_each_stood_alone(levels: int) -> None:
    made, query, own = context(levels), queries(2, 9), own_tokens(2, 9)
    padding, plenty = [0, 4], 2**20
    together = layer(made, 0.7, alone=plenty)
    found = attend(together, query, own, causal(2, 9, 9, padding))
    kept = 0.0
    for row, first in enumerate(padding):
        for place in range(first, 9):
            one = layer(made, 0.7)
            seen = (own[0][row : row + 1, :, first : place + 1], own[1][row : row + 1, :, first : place + 1])
            alone = attend(one, query[row : row + 1, :, place : place + 1], seen, None)
            torch.testing.assert_close(found[row, :, place], alone[0, :, 0], rtol=1e-5, atol=1e-5)
            kept += one.usage().kept_fraction
    assert together.usage(decode=False).kept_fraction == pytest.approx(kept / 14)
    assert together.usage(decode=True).offered == 0


def test_padding_does_not_become_nan() -> None:
    found = attend(layer(context(), 0.7), queries(2, 6), own_tokens(2, 6), causal(2, 6, 6, [0, 5]))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_nothing_behind_the_used_length_is_read(sparsity: float, length: int) -> None:
    made, query, own, mask = context(), queries(2, length), own_tokens(2, length), causal(2, length, length)
    given_up = 4
    poisoned = {
        name: torch.cat(
            [getattr(made.index, name)[:, : TOKENS - given_up], torch.full((KV_HEADS, 9, DIM), torch.nan)], 1
        )
        for name in ("keys", "values")
    }
    end = TOKENS - given_up
    found = attend(layer(replace(made, index=replace(made.index, **poisoned)), sparsity, end), query, own, mask)
    torch.testing.assert_close(found, attend(layer(made, sparsity, end), query, own, mask), rtol=0, atol=0)


def test_clusters_of_size_0_are_never_read() -> None:
    made, query, own, mask = context(), queries(2, 7), own_tokens(2, 7), causal(2, 7, 7)
    found = made.index.levels[0]
    last = found.offsets[:, -1:]
    padded = ClusterLevel(
        centroids=torch.cat([found.centroids, torch.full((KV_HEADS, 3, DIM), 1e4)], dim=1),
        sizes=torch.cat([found.sizes, torch.zeros(KV_HEADS, 3, dtype=torch.int32)], dim=1),
        offsets=torch.cat([found.offsets, last, last, last], dim=1),
        spread=None if found.spread is None else torch.cat([found.spread, torch.ones(KV_HEADS, 3)], dim=1),
    )
    other = replace(made, index=replace(made.index, levels=(padded,)))
    torch.testing.assert_close(
        attend(layer(other, 0.7), query, own, mask), attend(layer(made, 0.7), query, own, mask), rtol=0, atol=0
    )


def test_a_long_question_shares_a_selection_per_block() -> None:
    made, query, own, mask = context(), queries(1, 10), own_tokens(1, 10), causal(1, 10, 10)
    found = attend(layer(made, 0.8, block=4), query, own, mask)
    for first in (0, 4, 8):
        part = query[:, :, first : first + 4]
        expected = judged(made, part, own, mask[:, :, first : first + 4], selected_keys(made, part, 0.8))
        assert tiny.relative_error(found[:, :, first : first + 4], expected) < 1e-5


@pytest.mark.parametrize("levels", [1, 2])
def test_the_evenly_spaced_voters_of_a_block_select_for_all_of_it(levels: int) -> None:
    made, query, own, mask = context(levels), queries(1, 20), own_tokens(1, 20), causal(1, 20, 20)
    found = attend(layer(made, 0.8, block=12, voters=4), query, own, mask)
    for block, voting in ((slice(0, 12), (1, 4, 7, 10)), (slice(12, 20), (13, 15, 17, 19))):
        kept = selected_keys(made, query[:, :, voting], 0.8)
        assert not torch.equal(kept, selected_keys(made, query[:, :, block], 0.8))
        expected = judged(made, query[:, :, block], own, mask[:, :, block], kept)
        assert tiny.relative_error(found[:, :, block], expected) < 1e-5


@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_blocks_in_one_call_are_attended_as_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, query, own = context(), queries(2, 23), own_tokens(2, 23)
    mask = causal(2, 23, 23, [0, 6])
    one_by_one = layer(made, 0.8, block=4, voters=2)
    expected = attend(one_by_one, query, own, mask)
    monkeypatch.setattr("squeezed.attention._blocks_at_once", lambda *_: at_once)
    together = layer(made, 0.8, block=4, voters=2)
    torch.testing.assert_close(attend(together, query, own, mask), expected, rtol=1e-5, atol=1e-5)
    assert len(together.reads) < len(one_by_one.reads)
    for row in range(2):
        usages = (fixed.usage(decode=False).question(row) for fixed in (together, one_by_one))
        found, wanted = (vars(usage) for usage in usages)
        assert {name: float(value) for name, value in found.items()} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}
        )


def test_what_a_question_reads_counts_as_prefill_whatever_its_length() -> None:
    fixed = layer(context(), 0.7, block=4)
    attend(fixed, queries(1, 9), own_tokens(1, 9), causal(1, 9, 9))
    assert fixed.usage(decode=True).offered == 0
    assert fixed.usage(decode=True).bytes_full == 0
    assert fixed.usage(decode=False).offered == 3 * KV_HEADS * fixed.index.clustered


def test_logits_beyond_the_range_of_exp_stay_finite() -> None:
    made, own = context(), own_tokens(1, 1)
    query = 500 * queries(1, 1)
    found = attend(layer(made, 0.7), query, own, None)
    expected = judged(made, query, own, causal(1, 1, 1), selected_keys(made, query, 0.7))
    assert torch.isfinite(found).all()
    assert tiny.relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("key_bits", [16, 8])
def test_a_question_of_ordinary_length_reads_everything_whatever_its_neighbours(key_bits: int) -> None:
    made, query, own = context(), queries(2, 9), own_tokens(2, 9)
    if key_bits == 8:
        made = replace(made, index=to_eight_bits(made.index, keys_too=True, sinks=CONFIG.sinks))
    most = 5 * made.index.clustered
    padding = [0, 4]  # one question of nine tokens, which is too long, and one of five
    together = layer(made, 0.7, whole=most)
    found = attend(together, query, own, causal(2, 9, 9, padding))
    for row, first in enumerate(padding):
        mine = (own[0][row : row + 1, :, first:], own[1][row : row + 1, :, first:])
        mask = causal(1, 9 - first, 9 - first)
        expected = attend(layer(made, 0.7 if first == 0 else 0.0), query[row : row + 1, :, first:], mine, mask)
        torch.testing.assert_close(found[row, :, first:], expected[0], rtol=1e-5, atol=1e-5)
    read = together.usage(decode=False)
    assert read.question(0).kept_fraction < 0.6
    assert read.question(1).kept_fraction == 1
    # A generated token selects.
    one = layer(made, 0.7, whole=most)
    attend(one, query[:1, :, :1], (own[0][:1], own[1][:1]), None)
    assert one.usage().kept_fraction < 0.6
