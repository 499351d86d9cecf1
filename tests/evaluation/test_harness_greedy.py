"""Answers that are checked are those that would have been generated, and those of the product."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from squeezed.answer import Decoding, ask
from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.evaluation import greedy
from squeezed.evaluation.greedy import Guesses, answer_rows, dense_answer
from squeezed.evaluation.methods import METHODS, find_method
from squeezed.evaluation.prepared import Prepared, Subject, in_order
from squeezed.evaluation.rows import Row

QUESTION = "what is the second word of the text, and why?"
SPECS = [name for name in METHODS if name != "full"]


def subject(lm: PreTrainedModel) -> Subject:
    return Subject.of(lm, tiny.tokenizer())


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(subject(tiny.model("llama")), tiny.text(1000))


def rows(*specs: str, budgets: tuple[float, ...] = (0.2, 0.4)) -> list[Row]:
    return in_order([Row(spec, find_method(spec), budget) for spec in specs for budget in budgets])


FULL = Row("full", find_method("full"), None)


def without_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_GUESSED", 0)
    monkeypatch.setattr(greedy, "_CHECKED", 0)


@pytest.mark.parametrize("whole", [True, False])
def test_checked_answers_are_the_generated_ones(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    question = prepared.encode(QUESTION)
    some = in_order([*rows(*SPECS), *rows("oracle", "squeezed", budgets=(0.9,))])
    dense = dense_answer(prepared, FULL, question, 20, whole)
    guesses = Guesses()
    guesses.add(dense)
    checked = answer_rows(prepared, some, question, 20, dense, guesses, whole=whole)
    without_guesses(monkeypatch)
    assert dense_answer(prepared, FULL, question, 20, whole) == dense
    generated = answer_rows(prepared, some, question, 20, whole=whole)
    for row, found, expected in zip(some, checked, generated, strict=True):
        assert found.tokens == expected.tokens, row.key
        assert found.kv_budget == pytest.approx(expected.kv_budget), row.key
    differing = sum(answer.tokens != dense for answer in checked)
    assert 0 < differing < len(some)  # both ways of getting an answer were taken


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("width", [4, 24, 200])
def test_passes_of_a_fixed_width_answer_the_same(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, width: int, whole: bool
) -> None:
    question, some = prepared.encode(QUESTION), rows("quest", "tokenselect", "recycled", "squeezed", "squeezed-paper")
    dense = dense_answer(prepared, FULL, question, 16, whole)
    expected = answer_rows(prepared, some, question, 16, dense, whole=whole)
    monkeypatch.setattr(greedy, "_can_record", lambda device: True)
    monkeypatch.setattr(greedy, "_Recorded", greedy._Launched)
    monkeypatch.setattr(greedy, "_WIDTH", width)
    assert dense_answer(prepared, FULL, question, 16, whole) == dense
    again = answer_rows(prepared, some, question, 16, dense, whole=whole)
    for row, found, answer in zip(some, again, expected, strict=True):
        assert found.tokens == answer.tokens, row.key
        assert found.kv_budget == pytest.approx(answer.kv_budget), row.key


def test_a_row_answers_the_same_alone_and_among_others(prepared: Prepared) -> None:
    question, some = prepared.encode(QUESTION), rows("quest", "multipole", "recycled", "squeezed")
    together = answer_rows(prepared, some, question, 12)
    for row, answer in zip(some, together, strict=True):
        (alone,) = answer_rows(prepared, [row], question, 12)
        assert alone.tokens == answer.tokens
        assert alone.kv_budget == pytest.approx(answer.kv_budget)


def test_few_rows_at_a_time_change_nothing(prepared: Prepared) -> None:
    question, some = prepared.encode(QUESTION), rows("quest", "random", "squeezed-paper")
    found = answer_rows(prepared, some, question, 8, together=2)
    assert [a.tokens for a in found] == [a.tokens for a in answer_rows(prepared, some, question, 8)]


def test_full_attention_answers_like_the_model_itself(prepared: Prepared) -> None:
    given_up, ids = prepared.encode(QUESTION)
    whole = torch.tensor([prepared.prefix.ids[: prepared.tokens - given_up] + ids])
    with torch.inference_mode():
        out = prepared.subject.model.generate(
            whole, max_new_tokens=20, do_sample=False, eos_token_id=list(prepared.subject.stops), pad_token_id=0
        )
    assert dense_answer(prepared, FULL, (given_up, ids), 20) == out[0, whole.shape[1] :].tolist()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("spec", ["squeezed", "squeezed-2", "squeezed:copying=false", "squeezed-paper"])
def test_the_harness_answers_like_squeeze_ask(family: str, spec: str, tmp_path: Path, whole: bool) -> None:
    """Built, saved, loaded and asked by the product: the same text, at the same budget."""
    lm, tokenizer = tiny.model(family), tiny.tokenizer()
    prepared = Prepared(subject(lm), tiny.text(900))
    some = rows(spec, budgets=(0.25, 0.5))
    question = prepared.encode(QUESTION)
    for row, found in zip(some, answer_rows(prepared, some, question, 16, whole=whole), strict=True):
        context = prepared.context(row.method.settings(row.budget))
        folder = tmp_path / f"{row.budget}"
        context.save(folder)
        loaded = FixedContext.load(folder, lm, tokenizer)
        sparsity = prepared.sparsity(row, recalls=whole)
        (answer,) = ask(lm, tokenizer, loaded, [QUESTION], sparsity, decoding=Decoding(16), adaptive=whole)
        assert tokenizer.decode(found.tokens, skip_special_tokens=True).strip() == answer.text
        assert len(found.tokens) == answer.tokens
        if len(found.tokens) < 16:
            read = answer.decode if whole else answer.prefill + answer.decode
            assert found.kv_budget == pytest.approx(read.kv_budget, rel=1e-3)


def test_a_question_read_whole_begins_every_answer_as_full_attention_does(prepared: Prepared) -> None:
    question, some = prepared.encode(QUESTION), rows(*SPECS, budgets=(0.2,))
    dense = dense_answer(prepared, FULL, question, 3)
    one, three = (answer_rows(prepared, some, question, most) for most in (1, 3))
    for row, first, answer in zip(some, one, three, strict=True):
        assert first.tokens == answer.tokens[:1] == dense[:1], row.key
        assert first.kv_budget == 1
        assert answer.kv_budget < 0.5, row.key
    chosen = answer_rows(prepared, some, question, 1, whole=False)
    assert any(answer.tokens != dense[:1] for answer in chosen)


def test_what_the_product_reads_is_near_the_budget_asked_for(prepared: Prepared) -> None:
    some = rows("squeezed", "squeezed-2", "squeezed-paper", budgets=(0.2, 0.35))
    for row, answer in zip(some, answer_rows(prepared, some, prepared.encode(QUESTION), 16), strict=True):
        assert answer.kv_budget == pytest.approx(row.budget, rel=0.25), row.key


def test_the_answer_prefix_stands_behind_the_generation_prompt(prepared: Prepared) -> None:
    given_up, plain = prepared.encode(QUESTION)
    again, prefixed = prepared.encode(QUESTION, " the net")
    assert again == given_up
    tokenizer = prepared.subject.tokenizer
    assert tokenizer.decode(prefixed) == tokenizer.decode(plain) + " the net"


def test_another_window_than_everybody_has_is_refused(prepared: Prepared) -> None:
    with pytest.raises(InputError, match="window of 100"):
        answer_rows(prepared, rows("squeezed:window=50"), prepared.encode(QUESTION), 4)


def test_continuations_are_looked_up_by_the_longest_match() -> None:
    guesses = Guesses()
    guesses.add([1, 2, 3, 4, 5])
    guesses.add([9, 3, 7, 7])
    assert guesses.propose([1, 2, 3], 2) == [4, 5]
    assert guesses.propose([8, 3], 2) == [7, 7]  # the later text, on one token
    assert guesses.propose([6], 2) == []
    assert guesses.propose([1, 2, 3], 0) == []


def test_the_model_is_left_as_it_was(prepared: Prepared) -> None:
    lm = prepared.subject.model
    answer_rows(prepared, rows("quest"), prepared.encode(QUESTION), 4)
    assert lm.config._attn_implementation == "sdpa"
    with attached(lm):
        pass
    assert not any(module._forward_pre_hooks for module in lm.modules())
