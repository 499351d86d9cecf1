"""Where the fixed context and a question meet: the tokens fed are those of the whole string, whatever merges."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.answer import Conversation, Decoding, ask
from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.template import encode_prefix

# What a question may begin with, for a text that ends in "net?": how many of its last tokens merge with it.
RAW_TEXT = tiny.text() + " Which net?"
RAW_QUESTIONS = {"!": 1, "!?! it is": 1, " the stone": 0, "\n\nNo": 0}
TOKENIZERS = {
    "characters": tiny.tokenizer,
    "characters with <s>": lambda: tiny.tokenizer(bos=True),
    "prefix space": tiny.prefix_space_tokenizer,
    "prefix space with <s>": lambda: tiny.prefix_space_tokenizer(bos=True),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


@cache
def context(name: str, chat: bool, text: str) -> FixedContext:
    return FixedContext.from_text(tiny.model("llama"), tokenizer(name), text, replace(tiny.BUILD, iterations=1), chat)


def fed(fixed: FixedContext, given_up: int, ids: list[int]) -> list[int]:
    """All tokens that the model sees: the fixed ones in use, and the question's."""
    return fixed.ids[: fixed.tokens - given_up].tolist() + ids


def whole(name: str, text: str, turns: list[dict[str, str]], chat: bool) -> list[int]:
    """Tokens of the conversation, tokenised at one go."""
    if not chat:
        return tokenizer(name)(text + "\n\n".join(turn["content"] for turn in turns)).input_ids
    first = {"role": "user", "content": f"{text}\n\n{turns[0]['content']}"}
    prompt = tokenizer(name).apply_chat_template([first, *turns[1:]], tokenize=False, add_generation_prompt=True)
    return tokenizer(name)(prompt, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("question", RAW_QUESTIONS)
def test_plain_text_goes_on_with_the_tokens_of_the_whole(name: str, question: str) -> None:
    fixed = context(name, False, RAW_TEXT)
    turns = [{"role": "user", "content": question}]
    given_up, (ids,) = fixed.encode(tokenizer(name), [turns])
    assert fed(fixed, given_up, ids) == whole(name, RAW_TEXT, turns, chat=False)
    assert given_up == RAW_QUESTIONS[question]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [tiny.text(), RAW_TEXT], ids=["full stop merges with line breaks", "nothing merges"])
@pytest.mark.parametrize("question", ["Who?", "\n\nthe net", "!"])
def test_a_chat_goes_on_with_the_tokens_of_the_whole(name: str, text: str, question: str) -> None:
    fixed = context(name, True, text)
    turns = [{"role": "user", "content": question}]
    given_up, (ids,) = fixed.encode(tokenizer(name), [turns])
    assert fed(fixed, given_up, ids) == whole(name, text, turns, chat=True)
    assert given_up == (text == tiny.text())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_later_turns_go_on_with_the_tokens_of_the_whole(name: str) -> None:
    fixed = context(name, True, tiny.text())
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "the stone."},
        {"role": "user", "content": "and then?!"},
    ]
    given_up, (ids,) = fixed.encode(tokenizer(name), [turns])
    assert fed(fixed, given_up, ids) == whole(name, tiny.text(), turns, chat=True)


@pytest.mark.parametrize(("name", "needs_all"), [("characters", False), ("prefix space", True)])
def test_a_question_needs_the_whole_text_only_where_no_tail_tokenises_alike(name: str, needs_all: bool) -> None:
    assert context(name, True, tiny.text()).seam.whole is needs_all


def test_plain_text_starts_with_the_tokenizers_own_special_token() -> None:
    assert context("characters with <s>", False, RAW_TEXT).ids[0] == 1
    assert context("characters", False, RAW_TEXT).ids[0] != 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_questions_that_give_up_different_numbers_of_tokens_share_a_batch(name: str) -> None:
    fixed, lm = context(name, False, RAW_TEXT), tiny.model("llama")
    questions = list(RAW_QUESTIONS)
    inputs = fixed.inputs(tokenizer(name), questions, sparsity=0.0)
    with torch.inference_mode(), attached(lm):
        together, logits = tiny.generate(lm, 8, **inputs)
    for row, question in enumerate(questions):
        ids = torch.tensor([whole(name, RAW_TEXT, [{"role": "user", "content": question}], chat=False)])
        with torch.inference_mode():
            alone, dense_logits = tiny.generate(lm, 8, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert together[row].tolist() == alone[0].tolist(), question
        assert tiny.relative_error(logits[0][row], dense_logits[0][0]) < 1e-3


def test_questions_that_give_up_different_numbers_of_tokens_are_answered_as_if_alone() -> None:
    fixed, lm = context("characters", False, RAW_TEXT), tiny.model("llama")
    short = Decoding(max_new_tokens=8)
    together = ask(lm, tokenizer("characters"), fixed, list(RAW_QUESTIONS), 0.7, decoding=short)
    for question, answer in zip(RAW_QUESTIONS, together, strict=True):
        (alone,) = ask(lm, tokenizer("characters"), fixed, [question], 0.7, decoding=short)
        assert (answer.question, answer.text) == (question, alone.text)
        assert answer.prefill.kept_fraction == pytest.approx(alone.prefill.kept_fraction)


def test_a_question_that_changes_more_tokens_than_the_window_has_is_refused() -> None:
    fixed = context("characters", False, tiny.text() + " the??")
    assert fixed.encode(tokenizer("characters"), [[{"role": "user", "content": "!"}]])[0] == 1
    narrow = replace(fixed, config=replace(fixed.config, window=1))
    with pytest.raises(InputError, match="--window"):
        narrow.encode(tokenizer("characters"), [[{"role": "user", "content": "!"}]])


def _turns(lm: PreTrainedModel, name: str, fixed: FixedContext, sparsity: float, dense: bool) -> Conversation:
    return Conversation(lm, tokenizer(name), fixed, sparsity, dense, Decoding(max_new_tokens=6))


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize(("sparsity", "dense"), [(0.9, True), (0.0, False)])
@pytest.mark.parametrize("name", ["characters", "prefix space"])
def test_follow_up_turns_equal_the_whole_conversation_asked_afresh(
    family: str, sparsity: float, dense: bool, name: str
) -> None:
    lm = tiny.model(family)
    fixed = FixedContext.from_text(lm, tokenizer(name), tiny.text(), replace(tiny.BUILD, iterations=1))
    conversation = _turns(lm, name, fixed, sparsity, dense)
    turns: list[dict[str, str]] = []
    for question in ("Who?", "?! and the net", "list three."):
        turns.append({"role": "user", "content": question})
        answer = conversation.ask(question)
        ids = torch.tensor([whole(name, tiny.text(), turns, chat=True)])
        with torch.inference_mode():
            out = lm.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = out[0, ids.shape[1] :]
        assert answer.text == tokenizer(name).decode(expected, skip_special_tokens=True).strip()
        assert answer.tokens == len(expected)
        turns.append({"role": "assistant", "content": answer.text})


def test_a_follow_up_turn_feeds_only_what_is_new() -> None:
    lm, fixed = tiny.model("llama"), context("characters", True, tiny.text())
    conversation = _turns(lm, "characters", fixed, 0.5, False)
    conversation.ask("what is the second word of the text, and why?")
    fed_tokens: list[int] = []
    hook = lm.get_input_embeddings().register_forward_hook(lambda _, args, __: fed_tokens.append(args[0].shape[1]))
    conversation.ask("Who?")
    hook.remove()
    assert fed_tokens[0] < len("<|end|>") + 6 + len("Who?") + 8


def test_a_failed_turn_leaves_the_conversation_as_it_was() -> None:
    lm, fixed = tiny.model("llama"), context("characters", True, tiny.text())
    conversation, other = (_turns(lm, "characters", fixed, 0.0, False) for _ in range(2))
    conversation.ask("Who?")
    other.ask("Who?")
    with pytest.raises(InputError, match="positions"):
        conversation.ask("the net " * 2000)
    with pytest.raises(InputError, match="empty"):
        conversation.ask("  ")
    assert conversation.ask("and then?").text == other.ask("and then?").text


def test_an_interrupted_turn_leaves_the_conversation_as_it_was() -> None:
    lm, fixed = tiny.model("llama"), context("characters", True, tiny.text())
    conversation, other = (_turns(lm, "characters", fixed, 0.0, False) for _ in range(2))
    conversation.ask("Who?")
    other.ask("Who?")

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("list the net.\n\n", on_text=interrupt)
    assert conversation.ask("and then?").text == other.ask("and then?").text


def test_a_conversation_answers_its_first_turn_like_a_single_question() -> None:
    lm, fixed = tiny.model("llama"), context("characters", True, tiny.text())
    alone = ask(lm, tokenizer("characters"), fixed, ["Who?"], 0.7, decoding=Decoding(max_new_tokens=6))[0]
    assert _turns(lm, "characters", fixed, 0.7, False).ask("Who?").text == alone.text


def test_streamed_pieces_join_to_the_answer() -> None:
    lm, fixed = tiny.model("llama"), context("characters", True, tiny.text())
    pieces: list[str] = []
    decoding = Decoding(max_new_tokens=60)
    answer = ask(lm, tokenizer("characters"), fixed, ["Who?"], 0.7, decoding=decoding, on_text=pieces.append)[0]
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [(None, "no chat template"), ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "does not keep")],
)
def test_a_template_that_does_not_keep_the_text_is_refused(template: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encode_prefix(tiny.tokenizer(template), tiny.text(), chat=True)
    encode_prefix(tiny.tokenizer(template), tiny.text(), chat=False)
