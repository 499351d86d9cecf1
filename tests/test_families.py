"""Every family of decoders: dense when nothing is left out, each question as if alone, any prefill chunk."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.answer import Decoding, ask
from squeezed.attention import attached
from squeezed.context import FixedContext, pad_left
from squeezed.errors import InputError
from squeezed.models import plan_layers

TOKENIZER = tiny.tokenizer()
FEW = ("llama", "qwen2-bias", "gemma3-sliding", "phi3-longrope")


@cache
def model(family: str) -> PreTrainedModel:
    return tiny.model(family)


@cache
def context(family: str, levels: int = 1) -> FixedContext:
    return FixedContext.from_text(model(family), TOKENIZER, tiny.text(), replace(tiny.BUILD, levels=levels))


def answer(
    family: str, questions: tuple[str, ...], sparsity: float, levels: int = 1, tokens: int = 8, whole: bool = False
) -> tuple[Tensor, list[Tensor]]:
    inputs = context(family, levels).inputs(TOKENIZER, questions, sparsity=sparsity, whole=whole)
    with torch.inference_mode(), attached(model(family)):
        return tiny.generate(model(family), tokens, **inputs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sparsity_0_is_the_models_own_dense_generation(family: str) -> None:
    question = tiny.QUESTIONS[1]
    fixed = context(family)
    inputs = fixed.inputs(TOKENIZER, [question])
    whole = torch.cat([fixed.ids[: inputs["past_key_values"].fixed_tokens], inputs["input_ids"][0]])[None]
    with torch.inference_mode():
        expected, dense_logits = tiny.generate(
            model(family), 64, input_ids=whole, attention_mask=torch.ones_like(whole)
        )
    found, logits = answer(family, (question,), 0.0, tokens=64)
    assert found.tolist() == expected.tolist()
    assert tiny.relative_error(logits[0], dense_logits[0]) < 1e-3
    assert tiny.relative_error(logits[-1], dense_logits[-1]) < 1e-3


@pytest.mark.parametrize(
    ("sparsity", "levels", "whole"), [(0.0, 1, True), (0.7, 1, False), (0.7, 2, False), (0.7, 1, True)]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_question_of_a_batch_is_answered_as_if_alone(
    family: str, sparsity: float, levels: int, whole: bool
) -> None:
    together, logits = answer(family, tiny.QUESTIONS, sparsity, levels, whole=whole)
    for row, question in enumerate(tiny.QUESTIONS):
        alone, alone_logits = answer(family, (question,), sparsity, levels, whole=whole)
        assert together[row].tolist() == alone[0].tolist(), question
        assert tiny.relative_error(logits[0][row], alone_logits[0][0]) < 1e-4, question


@pytest.mark.parametrize("family", FEW)
def test_leaving_keys_out_changes_the_logits(family: str) -> None:
    _, dense = answer(family, (tiny.QUESTIONS[1],), 0.0, tokens=1)
    _, squeezed = answer(family, (tiny.QUESTIONS[1],), 0.9, tokens=1)
    assert tiny.relative_error(squeezed[0], dense[0]) > 1e-4
    _, whole = answer(family, (tiny.QUESTIONS[1],), 0.9, tokens=2, whole=True)
    _, dense = answer(family, (tiny.QUESTIONS[1],), 0.0, tokens=2)
    assert tiny.relative_error(whole[0], dense[0]) < 1e-4
    assert tiny.relative_error(whole[1], dense[1]) > 1e-4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_prefill_chunk_does_not_matter(family: str) -> None:
    whole, chunked = (
        FixedContext.from_text(model(family), TOKENIZER, tiny.text(), replace(tiny.BUILD, chunk=chunk, iterations=1))
        for chunk in (10_000, 7)
    )
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        # Rounding may move a key to another cluster, so the sums over the store are compared.
        assert tiny.relative_error(b.keys.double().sum(1), a.keys.double().sum(1)) < 1e-4
        assert tiny.relative_error(b.values.double().square().sum(1), a.values.double().square().sum(1)) < 1e-4


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("ways", [{"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3}])
def test_sampling_and_beams_work_on_a_batch(family: str, ways: dict[str, object]) -> None:
    inputs = context(family).inputs(TOKENIZER, tiny.QUESTIONS, sparsity=0.7)
    torch.manual_seed(0)
    with torch.inference_mode(), attached(model(family)):
        out = model(family).generate(**inputs, max_new_tokens=5, pad_token_id=0, **ways)
    assert out.shape == (len(tiny.QUESTIONS), inputs["input_ids"].shape[1] + 5)


@pytest.mark.parametrize("family", FEW)
def test_beams_at_sparsity_0_are_the_models_own(family: str) -> None:
    fixed = context(family)
    inputs = fixed.inputs(TOKENIZER, [tiny.QUESTIONS[0]], sparsity=0.0)
    whole = torch.cat([fixed.ids[: inputs["past_key_values"].fixed_tokens], inputs["input_ids"][0]])[None]
    ways = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": 0, "do_sample": False}
    with torch.inference_mode():
        expected = model(family).generate(input_ids=whole, attention_mask=torch.ones_like(whole), **ways)
        with attached(model(family)):
            found = model(family).generate(**inputs, **ways)
    assert found[0, -10:].tolist() == expected[0, -10:].tolist()


def test_an_answer_ends_where_longrope_would_rotate_the_fixed_keys_otherwise() -> None:
    config = tiny.FAMILIES["phi3-longrope"]()
    fixed = context("llama")
    config.rope_parameters["original_max_position_embeddings"] = fixed.tokens + 40
    config.original_max_position_embeddings = fixed.tokens + 40
    lm = tiny.from_config(config)
    fixed = FixedContext.from_text(lm, TOKENIZER, tiny.text(), tiny.BUILD)
    used = fixed.tokens - 1 + fixed.inputs(TOKENIZER, ["Who?"])["input_ids"].shape[1]
    (found,) = ask(lm, TOKENIZER, fixed, ["Who?"], dense=True, decoding=Decoding(max_new_tokens=64))
    assert found.tokens == fixed.tokens + 40 - used
    with pytest.raises(InputError, match="more than fit"):
        ask(lm, TOKENIZER, fixed, ["Who? " * 20], dense=True)


def test_several_ways_to_answer_use_one_context_without_changing_it() -> None:
    before = [layer.keys.clone() for layer in context("gemma3-sliding").layers]
    first = answer("gemma3-sliding", tiny.QUESTIONS, 0.7)[0]
    answer("gemma3-sliding", tiny.QUESTIONS[:1], 0.0)
    assert answer("gemma3-sliding", tiny.QUESTIONS, 0.7)[0].tolist() == first.tolist()
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, context("gemma3-sliding").layers, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("given_up", [3, 15])
def test_fixed_tokens_can_be_given_up_and_fed_again(family: str, given_up: int) -> None:
    fixed = context(family)
    own = [*fixed.ids[-given_up:].tolist(), *TOKENIZER("the net").input_ids]
    whole = torch.tensor([[*fixed.ids.tolist(), *TOKENIZER("the net").input_ids]])
    inputs = pad_left([own], fixed.tokens - given_up, TOKENIZER, "cpu")
    with torch.inference_mode():
        expected, _ = tiny.generate(model(family), 24, input_ids=whole, attention_mask=torch.ones_like(whole))
        with attached(model(family)):
            found, _ = tiny.generate(model(family), 24, **inputs, past_key_values=fixed.cache(0.0, given_up=given_up))
    assert found.tolist() == expected.tolist()


def test_a_model_stays_usable_for_other_work_while_attached() -> None:
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model("gemma3-sliding")(ids).logits
        with attached(model("gemma3-sliding")):
            found = model("gemma3-sliding")(ids).logits
        after = model("gemma3-sliding")(ids).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if "sliding" in name or "mixed" in name])
def test_layers_with_a_sliding_window_stay_dense(family: str) -> None:
    plan = plan_layers(model(family))
    assert plan.squeezed == (1,)
    assert plan.sliding == {0: 20, 2: 20}
    assert [layer.is_sliding for layer in context(family).cache(0.9).layers] == [True, False, True]
