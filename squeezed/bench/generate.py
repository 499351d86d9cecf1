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
from squeezed.cache import Usage
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

    Dense is the model's unchanged `generate` with scaled dot product attention on a prefilled DynamicCache; both
    produce exactly `new_tokens`. Medians over the questions after a warm-up.
    """
    given_up, questions_ids = context.encode(tokenizer, [[{"role": "user", "content": q}] for q in questions])
    fixed = context.tokens - given_up
    on_stage("dense prefill")
    prefilled = _prefill_dense(model, context.ids[:fixed])
    times: dict[str, list[tuple[float, float]]] = {"dense": [], "squeezed": []}
    usages: list[Usage] = []
    for turn, ids in enumerate([questions_ids[0], *questions_ids]):
        on_stage(f"question {turn} of {len(questions)}")
        inputs = pad_left([ids], fixed, tokenizer, model.device)
        cache = context.cache(sparsity, given_up=given_up)
        squeezed = timed_generate(model, tokenizer, {**inputs, "past_key_values": cache}, new_tokens)
        own_cache = copy.deepcopy(prefilled)
        dense = timed_generate(model, tokenizer, {**inputs, "past_key_values": own_cache}, new_tokens, plug_in=False)
        if turn > 0:  # the first one warmed up
            times["squeezed"].append(squeezed)
            times["dense"].append(dense)
            usages.append(cache.prefill_usage + cache.decode_usage)
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
    row["speedup"] = row["squeezed"]["tokens_per_second"] / row["dense"]["tokens_per_second"]
    return row


def _prefill_dense(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in ids.to(model.device)[None].split(512, dim=1):
            model.get_decoder()(input_ids=chunk, past_key_values=cache, use_cache=True)
    return cache
