"""What an answer copies stays in view: found by its tokens, attended whatever is selected, on every way to generate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.answer import Conversation, Decoding, ask
from squeezed.attention import attached
from squeezed.config import BuildConfig
from squeezed.context import FixedContext
from squeezed.copying import LONGEST, WIDTH, copied, followed
from squeezed.decode.loop import Steps

QUESTIONS = ("What did the keeper write down?", "Why?", "And what is the name of the station that was built there?")


def expected_places(text: list[int], recent: list[int]) -> set[int]:
    """By hand: the longest run of last tokens, where it stands, and the places around."""
    for count in range(LONGEST, 1, -1):
        if min(recent[-count:]) < 0:
            continue
        ends = [end for end in range(count - 1, len(text)) if text[end - count + 1 : end + 1] == recent[-count:]]
        if ends:
            chosen = ends[-4:] if len(ends) <= 8 else []
            return {place for end in chosen for place in range(end - 7, end + 9) if 0 <= place < len(text)}
    return set()


@pytest.mark.parametrize("words", [3, 6, 12, 40])
@pytest.mark.parametrize("tokens", [1, 5, 120])
def test_passages_are_those_around_the_longest_run(words: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(words + tokens)
    text = torch.randint(words, (tokens,), generator=generator)
    recent = torch.randint(words, (40, LONGEST), generator=generator)
    recent[20:, :3] = -1
    recent[30:] = -1
    found = copied(text, recent)
    assert found.shape == (40, min(4, tokens) * WIDTH // 4)
    for row, last in zip(found.tolist(), recent.tolist(), strict=True):
        assert {place for place in row if place >= 0} == expected_places(text.tolist(), last)


def test_the_last_tokens_are_those_that_came_last() -> None:
    recent = torch.arange(LONGEST)[None]
    assert followed(recent, torch.tensor([[9]])).tolist() == [[*range(1, LONGEST), 9]]
    assert followed(recent, torch.arange(20)[None]).tolist() == [list(range(20 - LONGEST, 20))]


def build(family: str = "llama", **options: object) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, FixedContext]:
    lm, tokenizer = tiny.model(family), tiny.tokenizer()
    config = BuildConfig(recall=10, copying=True, window=20, clusters=0.1, **options)  # type: ignore[arg-type]
    return lm, tokenizer, FixedContext.from_text(lm, tokenizer, tiny.text(900), config)


def nothing_selected(context: FixedContext) -> FixedContext:
    return replace(context, curves=replace(context.curves, log_thresholds=context.curves.log_thresholds + 1000))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("key_bits", [8, 16])
def test_a_token_attends_to_what_it_copies_in_every_layer_and_head(levels: int, key_bits: int) -> None:
    lm, tokenizer, context = build(levels=levels, key_bits=key_bits)
    inputs = nothing_selected(context).inputs(tokenizer, QUESTIONS[:1], sparsity=0.5)
    cache = inputs["past_key_values"]
    quoted = context.ids[300:306]
    with torch.inference_mode(), attached(lm):
        lm(**inputs, use_cache=True)
        recalled = set(cache.recall.places[0].tolist())
        for token in quoted:
            lm(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
    around = set(copied(context.ids, quoted[None])[0].tolist())
    assert set(range(298, 314)) <= around
    for layer in cache.fixed_layers:
        index = layer.index
        for head, slots in enumerate(cache.recall.within(index).slots[0].tolist()):
            places = {int(index.positions[head, slot]) for slot in slots if slot >= 0}
            assert places == {place for place in recalled | around if place in set(index.positions[head].tolist())}
            assert layer.reads[-1].kept[0, 0, head] == len(places)


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
def test_steps_of_fixed_shape_copy_as_transformers_own_generation_does(family: str) -> None:
    lm, tokenizer, context = build(family)
    steps = Steps()
    for batch in (QUESTIONS[:1], QUESTIONS, QUESTIONS[::-1]):
        plain = ask(lm, tokenizer, context, batch, 0.95, decoding=Decoding(12))
        stepped = ask(lm, tokenizer, context, batch, 0.95, decoding=Decoding(12), steps=steps)
        assert [a.text for a in stepped] == [a.text for a in plain]
        assert [a.kept_fraction for a in stepped] == pytest.approx([a.kept_fraction for a in plain])


def test_a_conversation_goes_on_copying() -> None:
    lm, tokenizer, context = build()
    plain = Conversation(lm, tokenizer, context, 0.95, decoding=Decoding(7))
    stepped = Conversation(lm, tokenizer, context, 0.95, decoding=Decoding(7), steps=Steps())
    for question in (*QUESTIONS, QUESTIONS[0]):
        ours, theirs = stepped.ask(question), plain.ask(question)
        assert ours.text == theirs.text
        assert ours.kept_fraction == pytest.approx(theirs.kept_fraction)


def test_a_question_copies_alike_alone_and_in_a_batch() -> None:
    lm, tokenizer, context = build()
    together = ask(lm, tokenizer, context, QUESTIONS, 0.95, decoding=Decoding(12))
    for question, found in zip(QUESTIONS, together, strict=True):
        alone = ask(lm, tokenizer, context, [question], 0.95, decoding=Decoding(12))[0]
        assert (found.text, found.kept_fraction) == (alone.text, pytest.approx(alone.kept_fraction))


def test_who_recalls_nothing_copies_nothing() -> None:
    _, _, context = build()
    assert context.cache(0.9).recall.copies
    assert context.cache(0.9, recall=0).recall is None
    assert not replace(context, config=replace(context.config, copying=False)).cache(0.9).recall.copies
