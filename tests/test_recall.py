"""What a question reads closely stays in view of its answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from squeezed import ops
from squeezed import recall as module
from squeezed.answer import Decoding, ask
from squeezed.attention import attached, attend_fixed
from squeezed.cache import FixedLayer, Selection
from squeezed.calibration import ThresholdCurves
from squeezed.config import BuildConfig
from squeezed.context import FixedContext
from squeezed.decode.loop import Steps
from squeezed.errors import InputError
from squeezed.ops import reference
from squeezed.ops.layout import recalled_at
from squeezed.recall import Recall, clustered_weights, observes, passages, peak_weights, tokens_to_recall
from tests import tiny
from tests.ops.cases import Case, make_layer, make_query

QUESTION = "What did the keeper write down?"


def build(recall: int, family: str = "llama", **options: object) -> tuple:
    lm, tokenizer = tiny.model(family), tiny.tokenizer()
    config = BuildConfig(recall=recall, window=20, clusters=0.1, **options)  # type: ignore[arg-type]
    return lm, tokenizer, FixedContext.from_text(lm, tokenizer, tiny.text(900), config)


def test_peak_weights_are_the_highest_of_a_softmax_taken_in_float64() -> None:
    case = Case(batch=2, q_heads=6, kv_heads=2, queries=5)
    query, layer = make_query(case), make_layer(case)
    grouped = query.double().reshape(2, 2, -1, 64)
    logits = 0.1 * grouped @ layer.keys.double().transpose(1, 2)
    lse = logits.logsumexp(-1).view(2, 6, 5)
    expected = logits.softmax(-1).amax(2)
    for found in (
        reference.peak_weights(query, layer.keys, lse.float(), 0.1),
        ops.peak_weights(query, layer.keys, lse.float(), 0.1),
        peak_weights(query, layer.keys, lse.float(), 0.1),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    lse[0, :, :3] = float("inf")  # padding
    found = ops.peak_weights(query, layer.keys, lse.float(), 0.1)
    counting = logits.softmax(-1)[0].view(2, 3, 5, -1)[:, :, 3:]
    torch.testing.assert_close(found[0].double(), counting.amax((1, 2)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("logits_at_once", [2**22, 500])
def test_peak_weights_of_eight_bits_are_those_of_what_they_stand_for(
    logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops._LOGITS, "cpu", logits_at_once)
    case = Case(q_heads=4, queries=3, key_bits=8, centroid_bits=8, compensate=True)
    query, layer = make_query(case), make_layer(case)
    lse = torch.zeros(1, 4, 3)
    wide = reference.from_eight_bits(layer.keys, *layer.scales[:2])
    found = ops.peak_weights(query, layer.keys, lse, 0.1, layer.scales)
    torch.testing.assert_close(found, reference.peak_weights(query, wide, lse, 0.1), rtol=1e-4, atol=1e-6)


def test_a_strong_weight_brings_what_follows_it_and_a_little_before() -> None:
    weights = torch.zeros(1, 400)
    weights[0, 100], weights[0, 300] = 1.0, 0.3
    recall = Recall(8)
    recall.observe(weights, 0)
    assert sorted(recall.places[0].tolist()) == list(range(100, 108))
    nearby = passages(weights)[0]
    assert nearby[100:160].diff().le(0).all()
    assert nearby[90] == 0
    assert nearby[124] == pytest.approx(0.5, rel=0.02)
    assert nearby[300] == pytest.approx(0.3)


def test_ties_and_keys_that_are_always_attended() -> None:
    weights = torch.full((2, 960), float("-inf"))
    weights[:, 4:900] = 0.0
    recall = Recall(18)
    recall.observe(weights, 0)
    assert recall.places.tolist() == [list(range(4, 4 + 18))] * 2


def test_a_question_of_which_nothing_counts_recalls_nothing() -> None:
    """A single token selects for itself, in a batch as alone."""
    case = Case(batch=2, q_heads=4, queries=6, clusters=120)
    query, layer = make_query(case), make_layer(case)
    selection = Selection(ThresholdCurves.keep_everything(1), 0.5, whole=None)
    fixed = FixedLayer(layer, selection, layer.tokens, recall=Recall(7), observes=True)
    attend_fixed(query, fixed, [slice(5, 6), slice(0, 6)], 0.1)
    assert (fixed.recall.places[0] == -1).all()
    assert (fixed.recall.places[1] >= 0).all()
    found = fixed.recalled(2)
    assert (found.slots[0] == -1).all()
    assert torch.equal(found.sizes[0][0], layer.levels[0].sizes)


def test_few_are_recalled_beside_what_is_selected() -> None:
    assert tokens_to_recall(256, 28_000, 0.9) == 256
    assert tokens_to_recall(256, 28_000, 0.97) == 105
    assert tokens_to_recall(256, 4_000, 0.97) == 15
    assert tokens_to_recall(256, 4_000, 1.0) == 0


def test_a_new_question_forgets_the_one_before() -> None:
    recall = Recall(10)
    assert recall.places is None
    for place in (50, 700):
        weights = torch.zeros(1, 960)
        weights[0, place] = 1.0
        recall.observe(weights, 0)
        recall.observe(weights, 1)
        assert place in recall.places[0].tolist()
        assert (recall.places >= place - 4).all()


def test_a_question_answered_by_one_token_is_forgotten_too() -> None:
    """Nobody has asked for its places when the next one comes."""
    recall = Recall(3)
    for place in (20, 250):
        weights = torch.zeros(1, 400)
        weights[0, place] = 1.0
        for layer in range(2):
            recall.observe(weights, layer)
    assert sorted(recall.places[0].tolist()) == [250, 251, 252]


def test_a_short_question_recalls_beside_one_too_long_to_be_read_whole_and_that_one_does_not() -> None:
    case = Case(batch=2, q_heads=4, queries=6, clusters=120)
    query, layer = make_query(case), make_layer(case)
    selection = Selection(ThresholdCurves.keep_everything(1), 0.5, whole=4 * layer.clustered)
    together, alone = (FixedLayer(layer, selection, layer.tokens, recall=Recall(9), observes=True) for _ in range(2))
    attend_fixed(query, together, [slice(2, 6), slice(0, 6)], 0.1)
    attend_fixed(query[:1, :, 2:], alone, None, 0.1)
    assert torch.equal(together.recall.places[:1], alone.recall.places)
    assert (together.recall.places[1] == -1).all()
    attend_fixed(query[1:], alone, None, 0.1)
    assert alone.recalled(1) is None


def test_places_in_the_text_become_places_among_the_clusters() -> None:
    case = Case(kv_heads=3, q_heads=3, clusters=40, levels=3, seed=5)
    layer = make_layer(case)
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(layer.clustered, generator=generator) for _ in range(3)])
    layer = replace(layer, positions=(order + 7).int())
    weights = torch.full((2, layer.clustered + 30), float("-inf"))
    weights[:, 7 : layer.clustered + 7] = torch.rand(2, layer.clustered, generator=generator)
    recall = Recall(9)
    recall.observe(weights, 0)
    found = recall.within(layer)
    for question in range(2):
        for head in range(3):
            slots = found.slots[question, head].long()
            assert slots.tolist() == sorted(slots.tolist())
            assert set((order[head, slots] + 7).tolist()) == set(recall.places[question].tolist())
            offsets = layer.levels[0].offsets[head]
            held = found.clusters[question, head].long()
            assert ((offsets[held] <= slots) & (slots < offsets[held + 1])).all()
    for level, sizes in zip(layer.levels, found.sizes, strict=True):
        assert torch.equal((level.sizes - sizes).sum(-1), torch.full((2, 3), recall.places.shape[1]))
        assert (sizes >= 0).all()


def test_layers_of_one_shape_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kv_heads=2, q_heads=2, clusters=40, levels=2)
    layers = [make_layer(replace(case, seed=seed)) for seed in range(3)]
    other = make_layer(replace(case, clusters=30))
    weights = torch.rand(2, layers[0].tokens, generator=torch.Generator().manual_seed(2))
    together, alone = Recall(11, [*layers, other]), Recall(11)
    calls = []
    monkeypatch.setattr(module, "recalled_at", lambda *given: calls.append(given[1:]) or recalled_at(*given))
    for question in (weights, weights.flip(1)):
        for recall in (together, alone):
            recall.observe(question, 0)
            assert recall.places is not None
        for index in (*layers, other):
            for part, expected in zip(together.within(index).tensors, alone.within(index).tensors, strict=True):
                assert part.is_contiguous()
                assert torch.equal(part, expected)
        assert list(map(len, calls)) == [3, 1, 1, 1, 1, 1]
        calls.clear()
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", 2 * layers[0].positions.numel())
    together = Recall(11, layers)
    together.observe(weights, 0)
    for index in layers:
        together.within(index)
    assert list(map(len, calls)) == [2, 1]


def test_padding_is_attended_by_nobody() -> None:
    case = Case(compensate=True, levels=2)
    query, layer = make_query(case), make_layer(case)
    nothing = recalled_at(torch.full((1, 2, 6), -1), layer.levels)[0]
    plain = ops.attend_fixed(query, layer, (-3.0, -3.0), layer.tokens, 0.1)
    padded = ops.attend_fixed(query, layer, (-3.0, -3.0), layer.tokens, 0.1, None, nothing)
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))


def test_the_middle_half_of_the_layers_says_what_is_recalled() -> None:
    assert [observes(i, 8) for i in range(8)] == [False] * 2 + [True] * 4 + [False] * 2
    assert all(observes(i, 3) for i in range(3))


def test_a_question_that_is_read_whole_is_remembered_and_its_padding_is_not() -> None:
    """Through the attention function: each row of a padded batch recalls what it would alone."""
    case = Case(batch=2, q_heads=4, queries=6, clusters=120)
    query, layer = make_query(case), make_layer(case)
    curves = ThresholdCurves.keep_everything(1)
    fixed, alone = (
        FixedLayer(layer, Selection(curves, 0.5, whole=None), layer.tokens, recall=Recall(33), observes=True)
        for _ in range(2)
    )
    attend_fixed(query, fixed, [slice(2, 6), slice(0, 6)], 0.1)
    attend_fixed(query[:1, :, 2:], alone, None, 0.1)
    assert torch.equal(fixed.recall.places[:1], alone.recall.places)
    _, lse = reference.attend_selected(
        query[1:], layer.keys, layer.values, layer.levels[0].offsets, None, (0, layer.tokens), 0.1
    )
    recall = Recall(33)
    recall.observe(clustered_weights(query[1:], lse, layer, layer.tokens, 0.1), 0)
    assert torch.equal(fixed.recall.places[1:], recall.places)
    # A generated token attends to them whatever it selects; so does each of two answers to a question.
    token = make_query(replace(case, queries=1, seed=9))
    hard = FixedLayer(layer, Selection(curves, 1.0), layer.tokens, recall=fixed.recall)
    attend_fixed(token, hard, None, 0.1)
    assert hard.reads[-1].kept.sum(-1).tolist() == [[2 * fixed.recall.places.shape[1]] * 2]
    assert hard.recalled(4).slots.shape[0] == 4


@pytest.mark.parametrize("levels", [1, 2])
def test_tokens_that_select_nothing_still_attend_to_what_the_question_has_read(levels: int) -> None:
    lm, tokenizer, context = build(recall=10, levels=levels)
    context = replace(context, curves=replace(context.curves, log_thresholds=context.curves.log_thresholds + 1000))
    inputs = context.inputs(tokenizer, [QUESTION], sparsity=0.5)
    with torch.inference_mode(), attached(lm):
        lm.generate(**inputs, max_new_tokens=4, do_sample=False)
    cache = inputs["past_key_values"]
    recalled = cache.fixed_layers[0].recall.places.shape[1]
    assert recalled == 10
    for layer in cache.fixed_layers:
        for read in layer.reads:
            if read.decode:
                assert read.kept[0].tolist() == [[recalled] * layer.index.keys.shape[0]]
    assert context.cache(0.5, recall=0).fixed_layers[0].recall is None
    assert context.cache(1.0).fixed_layers[0].recall is None
    assert context.cache(0.0).fixed_layers[0].recall is None


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
def test_steps_of_fixed_shape_recall_as_transformers_own_generation_does(family: str) -> None:
    lm, tokenizer, context = build(recall=10, family=family)
    questions = [QUESTION, "Why?", "And what is the name of the station that was built there?"]
    steps = Steps()
    for batch in ([QUESTION], questions, questions[::-1]):
        plain = ask(lm, tokenizer, context, batch, 0.95, decoding=Decoding(12))
        stepped = ask(lm, tokenizer, context, batch, 0.95, decoding=Decoding(12), steps=steps)
        assert [a.text for a in stepped] == [a.text for a in plain]
        assert [a.kept_fraction for a in stepped] == pytest.approx([a.kept_fraction for a in plain])


def test_a_question_recalls_alike_alone_and_in_a_batch() -> None:
    lm, tokenizer, context = build(recall=10)
    questions = [QUESTION, "Why?"]
    together = context.inputs(tokenizer, questions, sparsity=0.9)
    with torch.inference_mode(), attached(lm):
        lm.generate(**together, max_new_tokens=2, do_sample=False)
        places: list[Tensor] = []
        for question in questions:
            inputs = context.inputs(tokenizer, [question], sparsity=0.9)
            lm.generate(**inputs, max_new_tokens=2, do_sample=False)
            places.append(inputs["past_key_values"].fixed_layers[0].recall.places)
    found = together["past_key_values"].fixed_layers[0].recall.places
    assert [set(row.tolist()) for row in found] == [set(row[0].tolist()) for row in places]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InputError, match="recall is -1: expected 0 or more"):
        BuildConfig(recall=-1)
    _, _, context = build(recall=10)
    with pytest.raises(InputError, match="recall is -1: expected 0 or more"):
        context.cache(recall=-1)


def test_everything_is_taken_only_where_a_dense_kernel_reads_these_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, attention selects whatever the cost model says, and a step has to know."""
    from squeezed.attention import takes_everything
    from squeezed.ops import dense

    monkeypatch.setattr(ops, "uses_triton", lambda tensor: True)
    monkeypatch.setattr("squeezed.ops.triton.cost.dense_microseconds", lambda shape: 0.0)
    query, layer = make_query(Case()), make_layer(Case())
    fixed = FixedLayer(layer, Selection(ThresholdCurves.keep_everything(1), 0.5, adaptive=True), layer.tokens)
    for served in (True, False):
        monkeypatch.setattr(dense, "serves", lambda *_, served=served: served)
        assert takes_everything(query, fixed) is served
