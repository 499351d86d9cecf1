"""Time whole answers on a GPU: dense and squeezed in one run, both in steps captured in a CUDA graph.

Dense differs in one thing only: its attention to the fixed part reads every key, with the fastest dense kernel there
is. What is left between a token and its floor, weights and KV budget at the speed of a copy, is launches, the other
kernels, and the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.bench.graphs import copy_bandwidth
from squeezed.cache import SqueezedCache, Usage
from squeezed.decode import loop
from squeezed.decode.sampler import Sampling

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        name: dense or squeezed.
        cache: makes a fresh cache for one question.
    """

    name: str
    cache: Callable[[], SqueezedCache]


def time_ways(
    model: PreTrainedModel,
    ways: Sequence[Way],
    questions: Sequence[Inputs],
    new_tokens: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Medians over the questions of each way, after one that warms up, and how far the others are from the first.

    Args:
        ways: the first one, dense, is what the others are held against.
        questions: input_ids and attention_mask of each.
        new_tokens: tokens of every answer, whatever it says.
    """
    row: dict[str, Any] = {"new_tokens": new_tokens, "questions": len(questions)}
    bandwidth = copy_bandwidth(model.device)
    row["copy_bandwidth"] = bandwidth
    weights = weight_bytes(model)
    answers: dict[str, list[list[int]]] = {}
    forced: dict[str, Tensor] = {}
    for way in ways:
        steps, made, usages = loop.Steps(), [], []
        for turn, question in enumerate([questions[0], *questions]):
            on_stage(f"{way.name}, question {turn} of {len(questions)}")
            cache = way.cache()
            found = loop.generate(model, {**question, "past_key_values": cache}, Sampling(), new_tokens, steps)
            made.append(found)
            usages.append(cache.decode_usage)
        generate = statistics.median(found.seconds["generate"] for found in made[1:])
        on_stage(f"{way.name}, its error")
        reference = answers[ways[0].name][0] if answers else made[1].tokens[0]
        answers[way.name] = [found.tokens[0] for found in made[1:]]
        forced[way.name] = forced_logits(
            model, {**questions[0], "past_key_values": way.cache()}, reference[:-1], steps, new_tokens
        )
        del steps
        read = statistics.mean(_bytes_per_step(usage, new_tokens - 1) for usage in usages[1:])
        floor = 1e3 * (weights + read) / bandwidth
        milliseconds = 1e3 * generate / (new_tokens - 1)
        row[way.name] = {
            "first_token_seconds": statistics.median(found.seconds["first_token"] for found in made[1:]),
            "tokens_per_second": 1e3 / milliseconds,
            "ms_per_token": milliseconds,
            "setup_seconds": made[0].seconds["setup"],
            "floor_ms": floor,
            "floor_share": floor / milliseconds,
            "kv_budget": statistics.mean(usage.kv_budget for usage in usages[1:]),
            "kept_fraction": statistics.mean(usage.kept_fraction for usage in usages[1:]),
            "path": made[-1].path,
        }
    base = ways[0].name
    for way in ways[1:]:
        ours = row[way.name]
        ours["speedup"] = ours["tokens_per_second"] / row[base]["tokens_per_second"]
        ours |= compare_answers(answers[way.name], answers[base], forced[way.name], forced[base])
    return row


def compare_answers(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], logits: Tensor, expected: Tensor
) -> dict[str, float]:
    """How much of the dense answers is left.

    Args:
        ours, theirs: tokens of each answer, generated freely.
        logits, expected: [n, vocabulary], both after the same, dense, tokens.

    Returns:
        `equal_tokens`: share of the answers up to their first difference. `same_top_token`: how often the likeliest
        token is the same. `logit_error`: mean relative error of the logits.
    """
    equal = []
    for one, other in zip(ours, theirs, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(other))
        equal.append(first / len(other))
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "equal_tokens": statistics.mean(equal),
        "same_top_token": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        "logit_error": float(error.mean()),
    }


def forced_logits(
    model: PreTrainedModel, inputs: Inputs, tokens: Sequence[int], steps: loop.Steps, new_tokens: int
) -> Tensor:
    """[n, vocabulary] float32 after each of n given tokens, through the same step that generates."""
    cache = inputs["past_key_values"]
    with torch.inference_mode():
        first = loop.prefill(model, inputs)
        needed = cache.fixed_layers[0].own_length + new_tokens
        step = steps.find(model, cache, 1, needed, Sampling())
        step.begin(cache, inputs["input_ids"], [0])
        step.first(first)
        step.prepare()
        found = []
        for token in tokens:
            step.state.token.fill_(token)
            step.run()
            found.append(step.logits[0].float())
        step.end(cache, len(tokens))
        return torch.stack(found)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one token reads: all but a look-up in the embedding, which a tied head reads after all."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if tied else total - embedding.nbytes


def _bytes_per_step(usage: Usage, steps: int) -> float:
    return float(torch.as_tensor(usage.bytes_read).sum()) / steps
