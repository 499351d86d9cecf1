"""SmolLM2 and the demo's manual: dense where it should be, as sparse as asked, and never prefilled again."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed.answer import Decoding, ask
from squeezed.attention import attached
from squeezed.cache import FixedLayer
from squeezed.context import FixedContext
from squeezed.decode.loop import Steps
from squeezed.demo import manual_path, more_questions, questions
from squeezed.models import load_model
from squeezed.ops import chain, reference

pytestmark = pytest.mark.model
QUESTIONS = [question.question for question in questions()]
TOKENS = 4096


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("demo")


@pytest.fixture(scope="module")
def manual(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> FixedContext:
    """The beginning of the demo's manual, 4K tokens of it."""
    _, tokenizer = smollm2
    text = manual_path().read_text(encoding="utf-8")
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return FixedContext.from_text(*smollm2, text[: spans[TOKENS][0]])


@pytest.fixture(scope="module")
def saved(manual: FixedContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts") / "manual"
    replace(manual, model={**manual.model, "source": "demo"}).save(folder)
    return folder


def test_sparsity_0_is_the_models_own_generation_at_4k(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    model, tokenizer = smollm2
    assert manual.tokens >= 4096
    inputs = manual.inputs(tokenizer, QUESTIONS[:1], sparsity=0.0)
    whole = torch.cat([manual.ids[: inputs["past_key_values"].fixed_tokens], inputs["input_ids"][0]])[None]
    with torch.inference_mode():
        expected, dense_logits = tiny.generate(model, 64, input_ids=whole, attention_mask=torch.ones_like(whole))
        with attached(model):
            found, logits = tiny.generate(model, 64, **inputs)
    assert found.tolist() == expected.tolist()
    for ours, theirs in zip(logits, dense_logits, strict=True):
        assert tiny.relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9, 0.95])
def test_realised_sparsity_is_within_3_points_of_the_asked(
    sparsity: float, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    asked = [*QUESTIONS, *(question.question for question in more_questions())]
    short = Decoding(max_new_tokens=6)
    answers = [ask(*smollm2, manual, [one], sparsity, decoding=short, adaptive=False) for one in asked]
    prefill = sum(answer.prefill.kept_fraction for (answer,) in answers) / len(answers)
    decode = sum(answer.decode.kept_fraction for (answer,) in answers) / len(answers)
    print(f"asked {sparsity}: prefill {1 - prefill:.3f}, decode {1 - decode:.3f}")
    assert abs((1 - prefill) - sparsity) < 0.03
    assert abs((1 - decode) - sparsity) < 0.03


def test_questions_never_prefill_the_fixed_context_again(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    model, tokenizer = smollm2
    fed: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(args[0].numel()))
    answers = [
        ask(model, tokenizer, manual, [question], decoding=Decoding(max_new_tokens=4))[0] for question in QUESTIONS
    ]
    hook.remove()
    expected = 0
    for question, answer in zip(QUESTIONS, answers, strict=True):
        expected += manual.inputs(tokenizer, [question])["input_ids"].numel() + answer.tokens - 1
    assert sum(fed) == expected
    assert max(fed) < 64


def test_the_fixed_part_is_shared_by_every_question(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    model, tokenizer = smollm2
    inputs = manual.inputs(tokenizer, QUESTIONS)
    cache = inputs["past_key_values"]
    with torch.inference_mode(), attached(model):
        tiny.generate(model, 3, **inputs)
    for layer, mine in zip(manual.squeezed_layers, cache.layers, strict=True):
        assert isinstance(mine, FixedLayer)
        assert mine.index.keys.data_ptr() == layer.keys.data_ptr()
        assert mine.index.values.data_ptr() == layer.values.data_ptr()
        # Its own part holds the questions and two generated tokens of each, and nothing of the fixed context.
        assert mine.keys.shape[2] == inputs["input_ids"].shape[1] + 2


def test_answers_do_not_depend_on_what_was_asked_before(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    short = Decoding(max_new_tokens=8)
    first = [ask(*smollm2, manual, [question], decoding=short)[0].text for question in QUESTIONS[:3]]
    again = [ask(*smollm2, manual, [question], decoding=short)[0].text for question in reversed(QUESTIONS[:3])]
    assert first == again[::-1]


def test_a_batch_of_questions_is_answered_as_one_by_one(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    short = Decoding(max_new_tokens=12)
    together = ask(*smollm2, manual, QUESTIONS, decoding=short)
    alone = [ask(*smollm2, manual, [question], decoding=short)[0] for question in QUESTIONS]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.prefill.kept_fraction == pytest.approx(theirs.prefill.kept_fraction, abs=1e-3)


@pytest.mark.parametrize("asked", [QUESTIONS[:1], QUESTIONS[:3]], ids=["one", "batch"])
def test_steps_of_fixed_shape_write_what_transformers_loop_writes(
    asked: list[str], smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    short = Decoding(max_new_tokens=24)
    expected = ask(*smollm2, manual, asked, decoding=short)
    found = ask(*smollm2, manual, asked, decoding=short, steps=Steps())
    assert [answer.path for answer in found] == ["eager"] * len(asked)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        assert ours.kv_budget == pytest.approx(theirs.kv_budget, rel=1e-3)


def test_squeezed_answers_are_right_where_dense_ones_are_but_for_one(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    short = Decoding(max_new_tokens=16)
    lost = []
    for question in questions():
        (dense,) = ask(*smollm2, manual, [question.question], dense=True, decoding=short)
        (squeezed,) = ask(*smollm2, manual, [question.question], 0.9, decoding=short)
        if question.is_answered_by(dense.text) and not question.is_answered_by(squeezed.text):
            lost.append((question.question, squeezed.text))
    assert len(lost) <= 1, lost


def test_no_token_of_a_right_answer_goes_astray(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    model, tokenizer = smollm2
    worst = []
    # The motto's words are looked up by one head of one layer: in clusters of 5 keys "row" was 14 nats away.
    for question, answer in (
        ("What is the motto of the station?", 'The motto of the station is "Measure twice, row once."'),
        ("Who is the captain of the supply ship?", "The captain of the supply ship is Josef Lindqvist."),
        ("How deep is the seismic vault?", "The seismic vault is 22 metres deep."),
    ):
        told = tokenizer(answer, add_special_tokens=False)["input_ids"]
        found = []
        for sparsity in (0.0, 0.9):
            inputs = manual.inputs(tokenizer, [question], sparsity, whole=False)  # each of the tokens selects
            ids = torch.cat([inputs["input_ids"], torch.tensor([told])], dim=1)
            mask = torch.ones(1, inputs["attention_mask"].shape[1] + len(told), dtype=torch.int64)
            with torch.no_grad(), attached(model):
                output = model(input_ids=ids, attention_mask=mask, past_key_values=inputs["past_key_values"])
            found.append(output.logits[0, -len(told) - 1 : -1].log_softmax(-1))
        dense, squeezed = found
        worst.append(float((dense.exp() * (dense - squeezed)).sum(-1).max()))
    assert max(worst) < 1, worst


def test_the_command_reports_what_other_programs_rely_on(
    manual: FixedContext, saved: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from squeezed.cli import main

    arguments = ["squeeze", "ask", saved, *QUESTIONS[:2], "--json", "--sparsity", 0.9, "--max-new-tokens", 8]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    out, _ = capfd.readouterr()
    assert leaving.value.code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    centroids = sum(int((layer.levels[0].sizes > 0).sum()) * layer.centroid_bytes for layer in manual.squeezed_layers)
    full = sum(layer.tokens * layer.keys.shape[0] * layer.full_bytes for layer in manual.squeezed_layers)
    always = centroids / full + 0.05  # besides the kept keys: all centroids, and the window
    assert [row["question"] for row in rows] == QUESTIONS[:2]
    for row in rows:
        assert isinstance(row["answer"], str)
        assert 1 <= row["tokens"] <= 8
        assert math.isclose(row["kept_fraction"], 0.1, abs_tol=0.06)
        assert row["kept_fraction"] < row["kv_budget"] < row["kept_fraction"] + always
        assert set(row["seconds"]) == {"first_token", "generate", "total"}
        assert 0 < row["seconds"]["first_token"] <= row["seconds"]["total"]


@pytest.mark.parametrize("wanted", [0.03, 0.08])
def test_an_error_that_is_asked_for_is_met_within_a_quarter_on_unseen_questions(
    wanted: float, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], manual: FixedContext
) -> None:
    model, tokenizer = smollm2
    thresholds = manual.curves.at(manual.curves.sparsity_for(wanted), 1)
    total = []
    for question in (*QUESTIONS, *(question.question for question in more_questions())):
        inputs = manual.inputs(tokenizer, [question], dense=True)
        layers = inputs["past_key_values"].fixed_layers
        for layer in layers:
            layer.observed = []
        with torch.no_grad(), attached(model):
            model.get_decoder()(**inputs, use_cache=True)
        for layer in layers:
            assert layer.observed is not None
            query = layer.observed[0][0, :, -8:].transpose(0, 1).unsqueeze(2).contiguous()
            scale = query.shape[-1] ** -0.5
            dense = reference_chain(query, layer, None, scale)
            found = reference_chain(query, layer, thresholds, scale)
            total.append(((found - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
    realised = float(torch.stack(total).mean())
    print(f"asked {wanted}, realised {realised:.4f}")
    assert abs(realised / wanted - 1) < 0.25


def reference_chain(
    query: torch.Tensor, layer: FixedLayer, thresholds: tuple[float, ...] | None, scale: float
) -> torch.Tensor:
    return chain.attend_fixed(reference, query, layer.index, thresholds, layer.window_end, scale)[0]
