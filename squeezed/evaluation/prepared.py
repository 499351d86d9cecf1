"""A context prepared once for all methods: prefilled once, and each method's own structures built on it once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from squeezed import copying, template
from squeezed.answer import _stop_tokens
from squeezed.cache import FixedLayer
from squeezed.config import BuildConfig
from squeezed.context import FixedContext, room_behind
from squeezed.errors import InputError
from squeezed.evaluation.methods.base import LayerContext, Method
from squeezed.evaluation.methods.squeezed import Squeezed, sparsity_for
from squeezed.evaluation.place import Place
from squeezed.evaluation.rows import Group, Row, RowsLayer, ScoredLayer, SlidingRowsLayer, padded
from squeezed.models import attention_modules, model_identity, tokenizer_identity
from squeezed.prefill import PrefilledLayer, prefill
from squeezed.preparation import scale_of

SINKS, WINDOW = BuildConfig().sinks, BuildConfig().window
_CHUNK = {"cpu": 512, "cuda": 2048}


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and what is worked out about it once."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    identity: tuple[dict[str, str], str]
    stops: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Subject:
        chat = bool(getattr(tokenizer, "chat_template", None))
        identity = (model_identity(model), tokenizer_identity(tokenizer))
        return cls(model, tokenizer, chat, identity, tuple(_stop_tokens(model, tokenizer)))

    @property
    def device(self) -> torch.device:
        return self.model.device


class Prepared:
    """One fixed context, for every method.

    Attributes:
        prefix: the context in tokens.
        layers: those with full attention, in order.
    """

    def __init__(
        self,
        subject: Subject,
        text: str,
        on_stage: Callable[[str], None] = lambda stage: None,
        chat: bool | None = None,
    ) -> None:
        self.subject = subject
        chat = subject.chat if chat is None else chat
        self.prefix, _ = template.encode_prefix(subject.tokenizer, text, chat)
        needed = SINKS + WINDOW + 20
        if len(self.prefix.ids) < needed:
            raise InputError(f"a context is {len(self.prefix.ids)} tokens long: expected at least {needed}")
        self._on_stage = on_stage
        on_stage("prefill")
        chunk = _CHUNK[subject.device.type]
        self._prefilled: list[PrefilledLayer] = list(prefill(subject.model, self.prefix.ids, WINDOW, chunk))
        self.layers: list[LayerContext] = []
        for layer, module in zip(self._prefilled, attention_modules(subject.model), strict=True):
            if layer.queries is not None:
                number, scale = len(self.layers), scale_of(module)
                context = LayerContext(layer.keys, layer.values, layer.queries, scale, number, SINKS, WINDOW)
                self.layers.append(context)
        self._states: dict[tuple[Method, Hashable], list[Any]] = {}
        self._contexts: dict[BuildConfig, FixedContext] = {}
        self._sparsities: dict[tuple[BuildConfig, float, bool], float] = {}

    @property
    def tokens(self) -> int:
        return len(self.prefix.ids)

    def state(self, method: Method, settings: Hashable) -> list[Any]:
        """What a method builds, per layer; built on first use."""
        key = (method, settings)
        if key not in self._states:
            self._on_stage(f"building {method.title}")
            self._states[key] = method.prepare(self.layers, settings)
        return self._states[key]

    def context(self, config: BuildConfig) -> FixedContext:
        """Our own FixedContext; built on first use from the common prefill.

        Raises:
            InputError: an observation window other than the one that every method has here.
        """
        if config.window != WINDOW:
            raise InputError(f"window is {config.window}: methods are compared with a window of {WINDOW} tokens")
        if config not in self._contexts:
            # What is recalled or copied does not change what is built.
            alike = next(
                (c for c in self._contexts if replace(c, recall=config.recall, copying=config.copying) == config), None
            )
            if alike is not None:
                self._contexts[config] = replace(self._contexts[alike], config=config)
                return self._contexts[config]
            self._on_stage("building Squeezed")
            subject = self.subject
            self._contexts[config] = FixedContext.from_prefilled(
                subject.model, subject.tokenizer, self.prefix, self._prefilled, config, identity=subject.identity
            )
        return self._contexts[config]

    def sparsity(self, row: Row, recalls: bool) -> float:
        """The sparsity with which a row of ours meets its budget; `recalls`: what questions recall is part of it."""
        assert isinstance(row.method, Squeezed)
        assert row.budget is not None
        key = (row.method.settings(row.budget), row.budget, recalls)
        if key not in self._sparsities:
            self._sparsities[key] = sparsity_for(self.context(key[0]), row.budget, recalls)
        return self._sparsities[key]

    def encode(self, question: str, answer_prefix: str = "") -> tuple[int, list[int]]:
        """Fixed tokens given up, and the tokens of the question up to where the answer begins.

        Raises:
            InputError: the question changes more tokens of the context than its window has.
        """
        tokenizer, seam = self.subject.tokenizer, self.prefix.seam
        rest = template.continuation(tokenizer, seam, [{"role": "user", "content": question}]) + answer_prefix
        given_up, ids = template.encode_continuation(tokenizer, seam, rest)
        if given_up >= WINDOW:
            raise InputError(f"a question changes the last {given_up} tokens of its context, more than {WINDOW}")
        return given_up, ids

    def room(self) -> int | None:
        """Tokens that fit behind the context."""
        return room_behind(self.subject.model, self.tokens)

    def rows(self, rows: Sequence[Row], given_up: int, capacity: int, recalls: bool = False) -> RowsCache:
        """An empty cache for one question under these rows; rows of a method must be neighbours.

        Args:
            recalls: the question will be read whole, and what it reads closely be recalled by methods that do.
        """
        return RowsCache(self, rows, given_up, capacity, recalls)

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        """Rows of choosing methods that share what is built."""
        groups: list[Group] = []
        spans: list[tuple[Method, Hashable, int, int]] = []
        for at, row in enumerate(rows):
            if isinstance(row.method, Squeezed):
                continue
            settings = row.method.settings(1.0 if row.budget is None else row.budget)
            if spans and spans[-1][:2] == (row.method, settings) and spans[-1][3] == at:
                spans[-1] = (*spans[-1][:3], at + 1)
            else:
                spans.append((row.method, settings, at, at + 1))
        for method, settings, first, end in spans:
            groups.append(Group(slice(first, end), method, self.state(method, settings)))
        return groups


class RowsCache(Cache):
    """The cache of one question under several rows.

    Attributes:
        all_rows: methods and budgets, in the order of the batch.
        place: where each row stands.
        fixed_tokens: those in use.
    """

    layers: list[RowsLayer]

    def __init__(self, prepared: Prepared, rows: Sequence[Row], given_up: int, capacity: int, recalls: bool) -> None:
        self.all_rows = list(rows)
        self.place = Place(len(rows), prepared.subject.device)
        self.fixed_tokens = prepared.tokens - given_up
        ours: dict[int, list[FixedLayer]] = {}
        for at, row in enumerate(rows):
            if isinstance(row.method, Squeezed):
                context = prepared.context(row.method.settings(row.budget or 1.0))
                recall = None if recalls else 0
                ours[at] = context.cache(prepared.sparsity(row, recalls), given_up=given_up, recall=recall).fixed_layers
        assert sorted(ours) == list(range(len(rows) - len(ours), len(rows))), "rows of choosing methods come first"
        groups = prepared.groups(rows)
        budgets = [1.0 if row.budget is None else row.budget for row in rows]
        layers: list[RowsLayer] = []
        scored = iter(prepared.layers)
        number = 0
        for layer in prepared._prefilled:
            if layer.queries is None:
                assert layer.sliding_window is not None
                window = layer.sliding_window
                layers.append(
                    SlidingRowsLayer(self.place, len(rows), capacity, layer.keys, layer.values, given_up, window)
                )
                continue
            own = {at: fixed[number] for at, fixed in ours.items()}
            layers.append(
                ScoredLayer(self.place, len(rows), capacity, next(scored), groups, own, self.fixed_tokens, budgets)
            )
            number += 1
        super().__init__(layers=layers)

    @property
    def scored_layers(self) -> list[ScoredLayer]:
        return [layer for layer in self.layers if isinstance(layer, ScoredLayer)]

    def follow(self, fed: Tensor) -> None:
        """Take note of tokens [A, width] that the model is about to read: each looks up for itself what it copies."""
        place, ours = self.place, self.scored_layers[0].ours
        for at, row in enumerate(place.rows):
            recall = ours[row].recall if row in ours else None
            if recall is not None and recall.copies:
                read = torch.cat([place.recent[row], fed[at].to(place.device)])
                recall.look_up(padded(read.unfold(0, copying.LONGEST, 1)[1:]))

    @property
    def full_bytes(self) -> int:
        """Bytes of the full KV of the fixed tokens in use, all squeezed layers."""
        return sum(
            2 * layer.context.kv_heads * layer.context.row_bytes * self.fixed_tokens for layer in self.scored_layers
        )


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows as a batch wants them: choosing methods first, those of one method and settings together."""
    specs = list(dict.fromkeys(row.spec for row in rows))
    return sorted(rows, key=lambda row: (isinstance(row.method, Squeezed), specs.index(row.spec), row.budget or 0.0))
