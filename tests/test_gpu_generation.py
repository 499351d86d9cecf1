"""The GPU kernels inside generation: the same tokens as dense and as the CPU path, in captured steps."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from squeezed.answer import Conversation, Decoding, ask
from squeezed.attention import attached, attend_own
from squeezed.cache import FixedLayer, Selection
from squeezed.context import FixedContext
from squeezed.decode import loop
from squeezed.decode.sampler import Sampling
from squeezed.decode.step import DecodeStep
from squeezed.ops import dense, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = 64
FAMILIES = {
    "llama": "fused graph",
    "qwen2-bias": "fused graph",
    "qwen3-norm-128": "fused graph",
    "gemma3-sliding": "graph",
    "cohere2-sliding": "graph",
    "granite": "graph",
    "phi3-longrope": "eager: longrope rotation depends on the length",
}


@pytest.fixture(scope="module")
def on_gpu(llama: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(llama).to("cuda")


def copies(context: FixedContext, copying: bool = True) -> FixedContext:
    return replace(context, config=replace(context.config, copying=copying))


@pytest.fixture(scope="module", params=[False, True], ids=["", "copying"])
def fixed(request: pytest.FixtureRequest, context: FixedContext) -> FixedContext:
    return copies(context, request.param)


def by_transformers(
    model: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerBase, sparsity: float
) -> list:
    """64 greedy tokens of transformers' own loop over our cache."""
    inputs = context.inputs(tokenizer, [tiny.QUESTIONS[1]], sparsity, device=model.device)
    with attached(model):
        out = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def by_steps(
    model: PreTrainedModel,
    context: FixedContext,
    tokenizer: PreTrainedTokenizerBase,
    sparsity: float,
    question: str = tiny.QUESTIONS[1],
    path: str = "fused graph",
) -> list:
    """64 greedy tokens of our own steps."""
    inputs = context.inputs(tokenizer, [question], sparsity, device=model.device)
    made = loop.generate(model, inputs, Sampling(), TOKENS, loop.Steps())
    assert made.path == path
    return made.tokens[0]


def dense_tokens(
    model: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerBase, question: str
) -> list:
    """64 greedy tokens of transformers alone, over the whole text."""
    given_up, (ids,) = context.encode(tokenizer, [[{"role": "user", "content": question}]])
    whole = torch.tensor([context.ids[: context.tokens - given_up].tolist() + ids], device=model.device)
    out = model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    return out[0, whole.shape[1] :].tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_gpu_tokens_equal_the_cpu_path(
    sparsity: float,
    llama: PreTrainedModel,
    on_gpu: PreTrainedModel,
    fixed: FixedContext,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = by_transformers(llama, fixed, tokenizer, sparsity)
    assert by_transformers(on_gpu, fixed.to("cuda"), tokenizer, sparsity) == expected
    assert by_steps(on_gpu, fixed.to("cuda"), tokenizer, sparsity) == expected


def test_sparsity_zero_equals_the_models_own_generation(
    on_gpu: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = dense_tokens(on_gpu, context, tokenizer, tiny.QUESTIONS[1])
    assert by_steps(on_gpu, context.to("cuda"), tokenizer, 0.0) == expected


@pytest.mark.model
def test_smollm2_on_a_gpu_writes_what_it_writes_on_a_cpu() -> None:
    from squeezed.demo import manual_path, questions
    from squeezed.demo.fetch import FOLDER, cache_root
    from squeezed.models import load_model

    if not (cache_root() / FOLDER).is_dir():
        pytest.skip("the demo's model is not here; python -m squeezed.demo.fetch gets it")
    model, tokenizer = load_model("demo")
    model.generation_config.eos_token_id = None  # the answer is shorter than what is compared
    threads = torch.get_num_threads()
    torch.set_num_threads(min(8, os.cpu_count() or 1))  # more get in each other's way on a host that others share
    text = manual_path().read_text(encoding="utf-8")
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    context = FixedContext.from_text(model, tokenizer, text[: spans[2048][0]])
    asked = [question.question for question in questions()][:1]
    expected = {}
    for sparsity in (0.0, 0.9):
        for question in asked:
            inputs = context.inputs(tokenizer, [question], sparsity)
            expected[sparsity, question] = loop.generate(model, inputs, Sampling(), TOKENS, loop.Steps()).tokens[0]
    torch.set_num_threads(threads)
    model, context = model.to("cuda"), context.to("cuda")
    for (sparsity, question), tokens in expected.items():
        assert by_steps(model, context, tokenizer, sparsity, question) == tokens
    assert dense_tokens(model, context, tokenizer, asked[0]) == expected[0.0, asked[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("questions", [tiny.QUESTIONS[1:2], tiny.QUESTIONS], ids=["one", "batch"])
@pytest.mark.parametrize(("adaptive", "copying"), [(False, False), (False, True), (True, False), (True, True)])
def test_every_family_writes_on_a_gpu_what_it_writes_on_a_cpu(
    family: str, questions: tuple[str, ...], adaptive: bool, copying: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`adaptive` reads questions whole; the cost model would have generated tokens do so too in contexts so short."""
    monkeypatch.setattr("squeezed.ops.triton.cost.dense_microseconds", lambda shape: float("inf"))
    tokenizer, model = tiny.tokenizer(), tiny.model(family)
    context = FixedContext.from_text(model, tokenizer, tiny.text(), tiny.BUILD)
    context = copies(context, copying)
    expected = ask(model, tokenizer, context, questions, 0.7, decoding=Decoding(16), adaptive=adaptive)
    model, context = model.to("cuda"), context.to("cuda")
    found = ask(model, tokenizer, context, questions, 0.7, decoding=Decoding(16), adaptive=adaptive)
    if not adaptive:
        path = FAMILIES[family]
        assert found[0].path == ("graph" if len(questions) > 1 and path.endswith("graph") else path)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        assert ours.kept_fraction == pytest.approx(theirs.kept_fraction, rel=1e-3)
        assert ours.kv_budget == pytest.approx(theirs.kv_budget, rel=1e-3)
        assert ours.prefill.kv_budget == pytest.approx(theirs.prefill.kv_budget, rel=1e-3)
        assert (ours.prefill.kv_budget == 1) == adaptive


def test_a_context_built_on_the_gpu_answers_batches_and_follow_ups(
    on_gpu: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    built = copies(FixedContext.from_text(on_gpu, tokenizer, tiny.text(), tiny.BUILD))
    steps, short = loop.Steps(), Decoding(16)
    together = ask(on_gpu, tokenizer, built, tiny.QUESTIONS, 0.7, decoding=short, adaptive=False)
    for question, answer in zip(tiny.QUESTIONS, together, strict=True):
        alone = ask(on_gpu, tokenizer, built, [question], 0.7, False, short, None, steps, adaptive=False)[0]
        assert answer.text == alone.text
        assert 0 < alone.kept_fraction < 0.6
    talk = Conversation(on_gpu, tokenizer, built, 0.7, decoding=Decoding(8), adaptive=False)
    plain = Conversation(
        copy.deepcopy(on_gpu).cpu(), tokenizer, built.to("cpu"), 0.7, decoding=Decoding(8), adaptive=False
    )
    for question in tiny.QUESTIONS:
        assert talk.ask(question).text == plain.ask(question).text


def test_samples_depend_on_the_seed_alone(
    on_gpu: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    fixed, steps = context.to("cuda"), loop.Steps()

    def text(seed: int) -> str:
        decoding = Decoding(12, temperature=1.0, top_p=0.9, seed=seed)
        return ask(on_gpu, tokenizer, fixed, tiny.QUESTIONS[:1], 0.5, decoding=decoding, steps=steps)[0].text

    assert text(1) == text(1) != text(2)


def test_a_step_says_nothing_to_the_host(
    on_gpu: PreTrainedModel, fixed: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = fixed.to("cuda").inputs(tokenizer, [tiny.QUESTIONS[1]], 0.7, device="cuda")
    cache, ids = inputs["past_key_values"], inputs["input_ids"]
    sampling = Sampling(0.7, 0.9, 1.1, (2,))
    with torch.inference_mode():
        logits = loop.prefill(on_gpu, inputs)
        step = DecodeStep(on_gpu, cache, 1, 256, sampling, capture=False)
        step.begin(cache, ids, [0])
        step.first(logits)
        step.run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_short_contexts_are_read_whole_and_say_so(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.model("llama").to("cuda", torch.bfloat16)
    context = FixedContext.from_text(model, tokenizer, tiny.text(), tiny.BUILD)
    (chosen,) = ask(model, tokenizer, context, tiny.QUESTIONS[:1], 0.7, decoding=Decoding(8))
    assert chosen.kept_fraction == chosen.kv_budget == 1
    (asked,) = ask(model, tokenizer, context, tiny.QUESTIONS[:1], 0.7, decoding=Decoding(8), adaptive=False)
    assert asked.kept_fraction < 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 7, 200])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(8, 8, 64), (8, 2, 128), (6, 2, 64), (4, 1, 256)])
def test_dense_kernels_give_output_and_log_sum_exp(
    q_heads: int, kv_heads: int, dim: int, queries: int, dtype: torch.dtype
) -> None:
    keys, values = (torch.randn(kv_heads, 1100, dim, device="cuda").to(dtype) for _ in range(2))
    query = torch.randn(2, q_heads, queries, dim, device="cuda").to(dtype)
    keys[:, 1000:] = torch.nan
    assert dense.serves(query, keys)
    found, lse = dense.attend_dense(query, keys, values, 1000, 0.1)
    exact = _exact(query, keys, values, 1000, 0.1)
    assert tiny.relative_error(found, exact[0]) < 1e-2
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
def test_a_questions_own_tokens_by_the_vendors_kernel(
    q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.randn(1, q_heads, 37, dim, device="cuda").to(dtype)
    key, value = (torch.randn(1, kv_heads, 37, dim, device="cuda").to(dtype) for _ in range(2))
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool, device="cuda").tril()
    found = attend_own(query, key, value, mask, 0.1)
    monkeypatch.setattr(dense, "serves", lambda *_: False)
    exact = attend_own(query.double(), key, value, mask, 0.1)
    assert tiny.relative_error(found[0], exact[0]) < 1e-2
    torch.testing.assert_close(found[1], exact[1], rtol=1e-3, atol=2e-3)


def _exact(query: Tensor, keys: Tensor, values: Tensor, end: int, scale: float) -> tuple[Tensor, Tensor]:
    offsets = torch.zeros(keys.shape[0], 1, dtype=torch.int32, device="cuda")
    wide = [part.double() for part in (query, keys[:, :end], values[:, :end])]
    output, lse = reference.attend_selected(*wide, offsets, None, (0, end), scale)
    return output.double(), lse.double()


def test_an_adaptive_layer_follows_the_cost_model() -> None:
    from squeezed.attention import takes_everything
    from squeezed.bench.planted import Planted, planted_context
    from squeezed.calibration import ThresholdCurves

    curves = ThresholdCurves.keep_everything(1)
    for tokens, queries, expected in ((1500, 8, True), (1500, 1, False), (200_000, 1, False)):
        index = planted_context(Planted(tokens, 8, 2, 128), "cuda")
        query = torch.randn(1, 8, queries, 128, device="cuda", dtype=torch.bfloat16)
        assert takes_everything(query, FixedLayer(index, Selection(curves, 0.9, adaptive=True), tokens)) is expected
        assert not takes_everything(query, FixedLayer(index, Selection(curves, 0.9), tokens))
