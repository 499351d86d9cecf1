"""Steps of a fixed shape generate what transformers' own loop generates, and leave the same cache behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.answer import Answer, Conversation, Decoding, ask
from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.decode import loop
from squeezed.decode.sampler import Sampler, Sampling, StepState, nucleus
from squeezed.decode.step import DecodeStep

TOKENIZER = tiny.tokenizer()
FAMILIES = ("llama", "qwen2-bias", "gemma3-sliding", "cohere2-sliding", "phi3-longrope", "mixtral")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, FixedContext]:
    model = tiny.model(request.param)
    return model, FixedContext.from_text(model, TOKENIZER, tiny.text(), tiny.BUILD)


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        assert ours.tokens == theirs.tokens
        assert ours.kept_fraction == pytest.approx(theirs.kept_fraction)
        assert ours.kv_budget == pytest.approx(theirs.kv_budget)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("questions", [tiny.QUESTIONS[:1], tiny.QUESTIONS], ids=["one", "batch"])
def test_steps_answer_as_transformers_does(
    family: tuple[PreTrainedModel, FixedContext], sparsity: float, questions: tuple[str, ...]
) -> None:
    model, context = family
    short = Decoding(20)
    expected = ask(model, TOKENIZER, context, questions, sparsity, decoding=short)
    found = ask(model, TOKENIZER, context, questions, sparsity, decoding=short, steps=loop.Steps())
    assert (expected[0].path, found[0].path) == ("transformers", "eager")
    assert_same(found, expected)


@pytest.mark.parametrize("levels", [2, 3])
def test_steps_count_what_every_level_reads(levels: int, llama: PreTrainedModel) -> None:
    config = tiny.BUILD.__class__(**{**tiny.BUILD.to_dict(), "levels": levels})
    context = FixedContext.from_text(llama, TOKENIZER, tiny.text(), config)
    expected = ask(llama, TOKENIZER, context, tiny.QUESTIONS, 0.7, decoding=Decoding(8))
    assert_same(ask(llama, TOKENIZER, context, tiny.QUESTIONS, 0.7, decoding=Decoding(8), steps=loop.Steps()), expected)


def test_a_step_is_used_again_for_the_same_context_only(
    llama: PreTrainedModel, context: FixedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DecodeStep] = []
    original = DecodeStep.__init__

    def counted(self: DecodeStep, *args: object, **kwargs: object) -> None:
        made.append(self)
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeStep, "__init__", counted)
    steps, short = loop.Steps(), Decoding(6)
    for question in tiny.QUESTIONS:
        (found,) = ask(llama, TOKENIZER, context, [question], 0.7, decoding=short, steps=steps)
        assert_same([found], ask(llama, TOKENIZER, context, [question], 0.7, decoding=short))
    assert len(made) == 1
    ask(llama, TOKENIZER, context, [tiny.QUESTIONS[0]], 0.5, decoding=short, steps=steps)
    other = FixedContext.from_text(llama, TOKENIZER, tiny.text(seed=1), tiny.BUILD)
    ask(llama, TOKENIZER, other, [tiny.QUESTIONS[0]], 0.5, decoding=short, steps=steps)
    ask(llama, TOKENIZER, other, tiny.QUESTIONS, 0.5, decoding=short, steps=steps)
    assert len(made) == 4


def test_follow_ups_read_the_own_tokens_that_steps_left(llama: PreTrainedModel, context: FixedContext) -> None:
    short = Decoding(7)
    plain = Conversation(llama, TOKENIZER, context, 0.7, decoding=short)
    stepped = Conversation(llama, TOKENIZER, context, 0.7, decoding=short, steps=loop.Steps())
    for question in (*tiny.QUESTIONS, tiny.QUESTIONS[0]):
        assert_same([stepped.ask(question)], [plain.ask(question)])
    assert stepped._own == plain._own


@pytest.mark.parametrize("questions", [tiny.QUESTIONS[1:2], tiny.QUESTIONS], ids=["one", "batch"])
def test_answers_end_at_a_stop_token(
    questions: tuple[str, ...], llama: PreTrainedModel, context: FixedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = loop.generate(llama, context.inputs(TOKENIZER, questions, 0.5), Sampling(), 12, loop.Steps())
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [long.tokens[0][4]])
    short = Decoding(12)
    expected = ask(llama, TOKENIZER, context, questions, 0.5, decoding=short)
    assert expected[0].tokens < 12
    assert_same(ask(llama, TOKENIZER, context, questions, 0.5, decoding=short, steps=loop.Steps()), expected)


def test_repetition_penalties_are_followed_and_other_settings_left_to_transformers(
    llama: PreTrainedModel, context: FixedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(steps: loop.Steps | None) -> list[Answer]:
        return ask(llama, TOKENIZER, context, tiny.QUESTIONS[1:2], 0.5, decoding=Decoding(20), steps=steps)

    plain = answers(loop.Steps())
    monkeypatch.setattr(llama.generation_config, "repetition_penalty", 1.5)
    penalised = answers(loop.Steps())
    assert penalised[0].text != plain[0].text
    assert penalised[0].path == "eager"
    assert_same(penalised, answers(None))
    monkeypatch.setattr(llama.generation_config, "no_repeat_ngram_size", 2)
    (left,) = answers(loop.Steps())
    assert left.path == "transformers, for the model's no_repeat_ngram_size"
    assert_same([left], answers(None))


def test_text_comes_in_pieces_that_make_up_the_answer(llama: PreTrainedModel, context: FixedContext) -> None:
    pieces: list[str] = []
    (answer,) = ask(
        llama, TOKENIZER, context, tiny.QUESTIONS[:1], 0.5, False, Decoding(48), pieces.append, loop.Steps()
    )
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.text


def test_samples_depend_on_the_seed_alone(llama: PreTrainedModel, context: FixedContext) -> None:
    def text(seed: int, steps: loop.Steps) -> str:
        decoding = Decoding(12, temperature=1.0, top_p=0.9, seed=seed)
        return ask(llama, TOKENIZER, context, tiny.QUESTIONS[:1], 0.5, decoding=decoding, steps=steps)[0].text

    steps = loop.Steps()
    first = text(1, steps)
    assert text(1, steps) == first == text(1, loop.Steps())
    assert text(2, steps) != first


def test_a_nucleus_holds_the_fewest_tokens_that_reach_top_p() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.15, 0.25]]).log()
    for top_p, expected in ((0.4, [0]), (0.5, [0]), (0.6, [0, 3]), (0.8, [0, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert nucleus(scores, top_p)[0].isfinite().nonzero().flatten().tolist() == expected


def test_padding_is_no_token_that_was_seen() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), 2, 12, torch.device("cpu"))
    sampler.begin(torch.tensor([[9, 9, 3], [9, 4, 5]]), [2, 0])
    logits = torch.zeros(2, 12)
    logits[:, 9], logits[:, 5] = 3.0, 2.0
    assert sampler.choose(logits)[:, 0].tolist() == [9, 9 if 3.0 / 2 > 2.0 / 2 else 5]
    assert sampler.seen is not None
    assert sampler.seen.nonzero().tolist() == [[0, 3], [0, 9], [1, 4], [1, 5], [1, 9]]


def test_a_greedy_step_takes_the_first_of_the_largest_and_counts() -> None:
    logits = torch.randint(9, (3, 87)).float()
    expected = logits.argmax(-1)
    state = StepState.start(3, 2, 4, torch.device("cpu"))
    state.begin([[5, 6, 7], [1, 1, 0]])
    sampler = Sampler(Sampling(stops=(int(expected[0]),), pad=80), 3, 87, torch.device("cpu"))
    sampler.advance(logits, state)
    assert state.history[0].tolist() == state.token[:, 0].tolist() == expected.tolist()
    assert state.lengths.tolist() == [[6, 7, 8], [2, 2, 1]]
    ended = sampler.finished.clone()
    assert ended.tolist() == (expected == expected[0]).tolist()
    sampler.advance(logits, state)
    assert state.history[1].tolist() == expected.masked_fill(ended, 80).tolist()
    assert state.running.item() == int(not ended.all())
    assert state.count.item() == 2


def test_samples_follow_the_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    for temperature in (0.5, 2.0):
        sampler = Sampler(Sampling(temperature), 4000, 3, torch.device("cpu"))
        share = torch.bincount(sampler.choose(logits.expand(4000, -1)).flatten(), minlength=3) / 4000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_prefilled_question_is_as_transformers_feeds_it(
    llama: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast, whole: bool
) -> None:
    inputs = context.inputs(tokenizer, tiny.QUESTIONS, 0.5, whole=whole)
    with torch.inference_mode():
        logits = loop.prefill(llama, inputs)
        with attached(llama):
            _, expected = tiny.generate(llama, 1, **context.inputs(tokenizer, tiny.QUESTIONS, 0.5, whole=whole))
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
