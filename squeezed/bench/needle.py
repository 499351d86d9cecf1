"""Needle in a haystack: a fact hidden at many depths of a text, asked for dense and squeezed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed.answer import Decoding, ask
from squeezed.config import BuildConfig
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.prefill import prefill
from squeezed.template import encode_prefix
from squeezed.text import fit_to_tokens

_TEMPLATE_ROOM = 160  # tokens left for the chat template, the needle, the question and the answer
_CITIES = ("Barcelona", "Lisbon", "Toronto", "Helsinki", "Nairobi", "Kyoto", "Denver", "Cairo", "Oslo", "Lima")


@dataclass(frozen=True)
class NeedleCase:
    """Where to hide and how to ask. `context` is in tokens, template, question and answer included."""

    context: int = 4096
    depths: int = 10
    sparsities: tuple[float, ...] = (0.7, 0.9, 0.95)
    levels: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.context < 512:
            raise InputError(f"context is {self.context}: expected at least 512 tokens")
        if not 2 <= self.depths <= len(_CITIES):
            raise InputError(f"depths is {self.depths}: expected 2 to {len(_CITIES)}")


def find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    case: NeedleCase,
    config: BuildConfig,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[dict[str, Any]]:
    """One row per way of asking: which depths were found, mean kept fraction and KV budget."""
    numbers = random.Random(0)
    text = " ".join(fit_to_tokens(tokenizer, haystack, case.context - _TEMPLATE_ROOM).split())
    sentences = text.split(". ")
    found: dict[tuple[int, float | None], list[tuple[bool, float, float]]] = {}
    for depth in range(case.depths):
        city, number = _CITIES[depth], str(numbers.randint(1_000_000, 9_999_999))
        place = round(depth / (case.depths - 1) * len(sentences))
        needle = f"The special magic number for {city} is: {number}"
        hidden = ". ".join([*sentences[:place], needle, *sentences[place:]])
        on_stage(f"depth {depth + 1} of {case.depths}: prefilling")
        prefix, _ = encode_prefix(tokenizer, hidden, chat=True)
        prefilled = list(prefill(model, prefix.ids, config.window, config.chunk))
        for levels in case.levels:
            on_stage(f"depth {depth + 1} of {case.depths}, levels {levels}: clustering and calibrating")
            context = FixedContext.from_prefilled(model, tokenizer, prefix, prefilled, replace(config, levels=levels))
            ways: Sequence[float | None] = (
                case.sparsities
                if found and levels != case.levels[0]
                else (
                    None,
                    *case.sparsities,
                )
            )
            for sparsity in ways:
                on_stage(f"depth {depth + 1} of {case.depths}, levels {levels}: sparsity {sparsity}")
                answer = ask(
                    model,
                    tokenizer,
                    context,
                    [f"What is the special magic number for {city} mentioned in the text above?"],
                    sparsity or 0.0,
                    dense=sparsity is None,
                    decoding=Decoding(max_new_tokens=32),
                    adaptive=False,  # a short context would be attended to densely
                )[0]
                key = (0 if sparsity is None else levels, sparsity)
                found.setdefault(key, []).append((number in answer.text, answer.kept_fraction, answer.kv_budget))
    rows = []
    for (levels, sparsity), results in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0.0)):
        rows.append(
            {
                "context": case.context,
                "method": "dense" if sparsity is None else f"squeezed, {levels} level{'s' * (levels > 1)}",
                "sparsity": sparsity,
                "found": sum(hit for hit, _, _ in results),
                "of": len(results),
                "by_depth": "".join("x" if hit else "." for hit, _, _ in results),
                "kept_fraction": sum(kept for _, kept, _ in results) / len(results),
                "kv_budget": sum(budget for _, _, budget in results) / len(results),
            }
        )
    return rows
