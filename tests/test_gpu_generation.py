"""The GPU kernels inside generation: the same tokens as dense and as the CPU path."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.answer import Conversation, Decoding, ask
from squeezed.attention import attached
from squeezed.context import FixedContext

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = 64


@pytest.fixture(scope="module")
def on_gpu(llama: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(llama).to("cuda")


def generate(
    model: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast, sparsity: float
) -> list:
    inputs = context.inputs(tokenizer, [tiny.QUESTIONS[1]], sparsity, device=model.device)
    with attached(model):
        out = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_gpu_tokens_equal_the_cpu_path(
    sparsity: float,
    llama: PreTrainedModel,
    on_gpu: PreTrainedModel,
    context: FixedContext,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = generate(llama, context, tokenizer, sparsity)
    assert generate(on_gpu, context.to("cuda"), tokenizer, sparsity) == expected


def test_sparsity_zero_equals_the_models_own_generation(
    on_gpu: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    given_up, (ids,) = context.encode(tokenizer, [[{"role": "user", "content": tiny.QUESTIONS[1]}]])
    whole = torch.tensor([context.ids[: context.tokens - given_up].tolist() + ids], device="cuda")
    dense = on_gpu.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    ours = generate(on_gpu, context.to("cuda"), tokenizer, 0.0)
    assert ours[len(ids) :] == dense[0, whole.shape[1] :].tolist()


def test_a_context_built_on_the_gpu_answers_batches_and_follow_ups(
    on_gpu: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    built = FixedContext.from_text(on_gpu, tokenizer, tiny.text(), tiny.BUILD)
    together = ask(on_gpu, tokenizer, built, tiny.QUESTIONS, 0.7, decoding=Decoding(16))
    for question, answer in zip(tiny.QUESTIONS, together, strict=True):
        alone = ask(on_gpu, tokenizer, built, [question], 0.7, decoding=Decoding(16))[0]
        assert answer.text == alone.text
        assert 0 < alone.kept_fraction < 0.6
    talk = Conversation(on_gpu, tokenizer, built, 0.7, decoding=Decoding(8))
    assert [talk.ask(question).tokens > 0 for question in tiny.QUESTIONS] == [True] * len(tiny.QUESTIONS)
