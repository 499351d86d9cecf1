"""Time whole answers: dense and squeezed, time to first token and tokens per second, in one run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from squeezed.answer import timed_generate
from squeezed.attention import takes_everything
from squeezed.bench.device_generate import Way, time_ways
from squeezed.bench.shapes import PlantedContext, random_model
from squeezed.cache import FixedLayer, SqueezedCache, Usage
from squeezed.config import BuildConfig
from squeezed.context import FixedContext, pad_left


def time_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    questions: Sequence[str],
    sparsity: float,
    new_tokens: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """One row: the model's own generation over its own cache, and ours, over the same tokens of the same questions.

    `transformers` is the model's unchanged `generate` with scaled dot product attention on a prefilled DynamicCache,
    `dense` our own loops over every key; all produce exactly `new_tokens`. Medians over the questions after a warm-up,
    and the speed-up over the faster of the dense two.
    """
    given_up, questions_ids = context.encode(tokenizer, [[{"role": "user", "content": q}] for q in questions])
    fixed = context.tokens - given_up
    on_stage("dense prefill")
    prefilled = _prefill_dense(model, context.ids[:fixed])
    times: dict[str, list[tuple[float, float]]] = {"transformers": [], "dense": [], "squeezed": []}
    usages: list[Usage] = []
    for turn, ids in enumerate([questions_ids[0], *questions_ids]):
        on_stage(f"question {turn} of {len(questions)}")
        inputs = pad_left([ids], fixed, tokenizer, model.device)
        cache = context.cache(sparsity, given_up=given_up)
        every = context.cache(dense=True, given_up=given_up)
        own_cache = copy.deepcopy(prefilled)
        found = {
            "squeezed": timed_generate(model, tokenizer, {**inputs, "past_key_values": cache}, new_tokens),
            "dense": timed_generate(model, tokenizer, {**inputs, "past_key_values": every}, new_tokens),
            "transformers": timed_generate(
                model, tokenizer, {**inputs, "past_key_values": own_cache}, new_tokens, plug_in=False
            ),
        }
        if turn > 0:  # the first one warmed up
            for name, pair in found.items():
                times[name].append(pair)
            usages.append(cache.decode_usage)
    row: dict[str, Any] = {
        "context": context.tokens,
        "sparsity": sparsity,
        "levels": context.config.levels,
        "dtype": context.model["dtype"],
        "new_tokens": new_tokens,
        "questions": len(questions),
        "kv_budget": statistics.mean(usage.kv_budget for usage in usages),
        "kept_fraction": statistics.mean(usage.kept_fraction for usage in usages),
    }
    for name, pairs in times.items():
        row[name] = {
            "first_token_seconds": statistics.median(first for first, _ in pairs),
            "tokens_per_second": (new_tokens - 1) / statistics.median(rest for _, rest in pairs),
        }
    row["chosen"] = chosen(model, context.cache(sparsity, adaptive=True))
    fastest = max(row[name]["tokens_per_second"] for name in ("transformers", "dense"))
    row["speedup"] = row["squeezed"]["tokens_per_second"] / fastest
    return row


def time_generation_on_device(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    questions: Sequence[str],
    sparsity: float,
    new_tokens: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """One row on a GPU: see `squeezed.bench.device_generate`; the model's own `generate` is there for comparison."""
    given_up, questions_ids = context.encode(tokenizer, [[{"role": "user", "content": q}] for q in questions])
    fixed = context.tokens - given_up
    inputs = [pad_left([ids], fixed, tokenizer, model.device) for ids in questions_ids]
    ways = (
        Way("dense", lambda: context.cache(dense=True, given_up=given_up)),
        Way("squeezed", lambda: context.cache(sparsity, given_up=given_up)),
    )
    row: dict[str, Any] = {
        "context": context.tokens,
        "sparsity": sparsity,
        "levels": context.config.levels,
        "dtype": context.model["dtype"],
        **time_ways(model, ways, inputs, new_tokens, on_stage),
        "chosen": chosen(model, context.cache(sparsity, adaptive=True)),
    }
    on_stage("the model's own generation")
    prefilled = _prefill_dense(model, context.ids[:fixed])
    for turn in range(2):  # the first one warms up
        own_cache = copy.deepcopy(prefilled)
        first, rest = timed_generate(
            model, tokenizer, {**inputs[turn % len(inputs)], "past_key_values": own_cache}, new_tokens, plug_in=False
        )
    row["transformers"] = {"first_token_seconds": first, "tokens_per_second": (new_tokens - 1) / rest}
    return row


def time_shape(
    shape: str,
    contexts: Sequence[int],
    sparsity: float,
    config: BuildConfig,
    question_tokens: int,
    new_tokens: int,
    device: str,
    dtype: torch.dtype,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[dict[str, Any]]:
    """A row for each context length: a model of that shape with random weights, over planted keys."""
    on_stage(f"making {shape}")
    model = random_model(shape, device, dtype)
    generator = torch.Generator().manual_seed(1)
    asked = torch.randint(model.config.vocab_size, (3, question_tokens), generator=generator).tolist()
    about = {"shape": shape, "weights": "random", "fixed_context": "planted keys, not prefilled"}
    rows = []
    for tokens in contexts:
        planted = PlantedContext(model, tokens, config, on_stage)
        rows.append({**about, **_time_planted(model, planted, asked, sparsity, new_tokens, on_stage)})
        del planted
    return rows


def _time_planted(
    model: PreTrainedModel,
    planted: PlantedContext,
    questions: list[list[int]],
    sparsity: float,
    new_tokens: int,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    ways = (
        Way("dense", lambda: planted.cache(sparsity, dense=True)),
        Way("squeezed", lambda: planted.cache(sparsity)),
    )
    inputs = [planted.inputs(ids, model.device) for ids in questions]
    return {
        "context": planted.tokens,
        "question_tokens": len(questions[0]),
        "sparsity": sparsity,
        "levels": len(planted.layers[0].levels),
        "dtype": str(model.dtype).removeprefix("torch."),
        **time_ways(model, ways, inputs, new_tokens, on_stage),
        "chosen": chosen(model, planted.cache(sparsity, adaptive=True)),
    }


def chosen(model: PreTrainedModel, cache: SqueezedCache) -> str:
    """What answering takes by itself for a generated token: squeezed, dense, or some layers each."""
    heads = model.config.get_text_config().num_attention_heads
    layers = [layer for layer in cache.layers if isinstance(layer, FixedLayer)]
    dense = 0
    for layer in layers:
        dim = layer.index.keys.shape[2]
        dense += takes_everything(torch.empty(1, heads, 1, dim, dtype=model.dtype, device=model.device), layer)
    return {0: "squeezed", len(layers): "dense"}.get(dense, f"dense in {dense} of {len(layers)} layers")


def _prefill_dense(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in ids.to(model.device)[None].split(512, dim=1):
            model.get_decoder()(input_ids=chunk, past_key_values=cache, use_cache=True)
    return cache
