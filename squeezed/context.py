"""The fixed context: prepared once, then asked as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed import template
from squeezed.cache import Selection, SqueezedCache
from squeezed.calibration import ThresholdCurves, calibrate
from squeezed.config import BuildConfig, check_sparsity
from squeezed.decode.loop import Steps
from squeezed.errors import InputError
from squeezed.models import (
    attention_modules,
    check_identity,
    max_positions,
    model_identity,
    rope_switch,
    tokenizer_identity,
)
from squeezed.ops.layout import ClusteredKeys
from squeezed.prefill import PrefilledLayer, prefill
from squeezed.preparation import PROBES, Probes, SlidingTail, prepare_layer, question_layer, scale_of
from squeezed.quality import measure_errors
from squeezed.recall import Recall, observes
from squeezed.text import Part, locate_parts, read_files
from squeezed.warm_up import warm_up

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class FixedContext:
    """A text's keys and values, clustered and calibrated, for one model.

    Attributes:
        layers: one per decoder layer, in order.
        curves: thresholds for every sparsity.
        ids: [tokens] int64, the fixed context's token ids, template included.
        seam: how questions join on.
        parts: the files it was made of.
        text: the prefix as a string.
        config: how it was built.
        model, tokenizer: whose it is, see :func:`squeezed.models.model_identity`.
        extensions: tokens of each part at the end that was added by `extend` and is clustered by itself.
    """

    layers: tuple[ClusteredKeys | SlidingTail, ...]
    curves: ThresholdCurves
    ids: Tensor
    seam: template.Seam
    parts: tuple[Part, ...]
    text: str
    config: BuildConfig
    model: dict[str, str]
    tokenizer: str
    extensions: tuple[int, ...] = ()

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        files: Sequence[str | Path],
        config: BuildConfig | None = None,
        chat: bool = True,
        on_progress: Progress = lambda stage, done, total: None,
    ) -> FixedContext:
        """Prefill, cluster and calibrate the text of `files`, in that order.

        Args:
            files: text files, joined in the order given.
            config: None is the paper's.
            chat: wrap the text in the model's chat template, as the beginning of the user's message.
            on_progress: called with (stage, done, total) as work proceeds.

        Raises:
            InputError: unreadable files, a text too short or too long, a model that can't be squeezed.
        """
        text, parts = read_files(files)
        return cls.from_text(model, tokenizer, text, config, chat, on_progress, parts)

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        config: BuildConfig | None = None,
        chat: bool = True,
        on_progress: Progress = lambda stage, done, total: None,
        parts: Sequence[Part] = (),
    ) -> FixedContext:
        """Like :meth:`build`, for a text in memory."""
        context = cls.unprepared(model, tokenizer, text, config or BuildConfig(), chat, parts)
        done = 0

        def on_chunk(count: int) -> None:
            nonlocal done
            done += count
            on_progress("prefill", done, context.tokens)

        window, chunk = context.config.window, context.config.chunk
        return context._prepared(
            model, tokenizer, prefill(model, context.ids.tolist(), window, chunk, on_chunk), on_progress
        )

    @classmethod
    def unprepared(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        config: BuildConfig,
        chat: bool = True,
        parts: Sequence[Part] = (),
    ) -> FixedContext:
        """All that is known of a text's context before prefill; it has no layers yet.

        Raises:
            InputError: a text that is too short, or a chat template that does not keep it as it is.
        """
        prefix, head = template.encode_prefix(tokenizer, text, chat)
        _check_length(len(prefix.ids), config)
        located = locate_parts(parts, prefix.spans, head)
        return cls._without_layers(prefix, config, located, model_identity(model), tokenizer_identity(tokenizer))

    @classmethod
    def _without_layers(
        cls,
        prefix: template.EncodedPrefix,
        config: BuildConfig,
        parts: Sequence[Part],
        model: dict[str, str],
        tokenizer: str,
    ) -> FixedContext:
        return cls(
            layers=(),
            curves=ThresholdCurves.keep_everything(config.levels),
            ids=torch.tensor(prefix.ids),
            seam=prefix.seam,
            parts=tuple(parts),
            text=prefix.text,
            config=config,
            model=model,
            tokenizer=tokenizer,
        )

    @classmethod
    def from_prefilled(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefix: template.EncodedPrefix,
        prefilled: Iterable[PrefilledLayer],
        config: BuildConfig,
        on_progress: Progress = lambda stage, done, total: None,
        parts: Sequence[Part] = (),
        identity: tuple[dict[str, str], str] | None = None,
    ) -> FixedContext:
        """Cluster and calibrate a text that is prefilled already; the layers are only read.

        Args:
            identity: of model and tokenizer, for whoever builds many contexts with them; taken afresh if left out.
        """
        found = identity or (model_identity(model), tokenizer_identity(tokenizer))
        context = cls._without_layers(prefix, config, parts, *found)
        return context._prepared(model, tokenizer, prefilled, on_progress)

    def _prepared(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prefilled: Iterable[PrefilledLayer],
        on_progress: Progress,
    ) -> FixedContext:
        modules = attention_modules(model)
        probes = self.probes(model, tokenizer)
        layers: list[ClusteredKeys | SlidingTail] = []
        queries: list[list[Tensor]] = []
        for i, layer in enumerate(prefilled):
            made = prepare_layer(layer, modules[i], self.config)
            layers.append(made)
            on_progress("cluster", i + 1, len(modules))
            observed: list[Tensor] = []
            if probes is not None:
                observed = probes.observe(i, made)
                on_progress("questions", i + 1, len(modules))
            if layer.queries is not None:
                queries.append(observed or [layer.queries])
        return replace(self, layers=tuple(layers)).calibrated(model, queries, on_progress)

    def probes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Probes | None:
        """The questions whose queries calibrate this context; None where its own last queries do."""
        if not self.seam.chat or self.config.calibration != "questions":
            return None
        encoded = [self.encode(tokenizer, [[{"role": "user", "content": probe}]]) for probe in PROBES]
        return Probes(model, self.tokens, [given_up for given_up, _ in encoded], [ids[0] for _, ids in encoded])

    def calibrated(
        self,
        model: PreTrainedModel,
        queries: Sequence[Sequence[Tensor]],
        on_progress: Progress = lambda stage, done, total: None,
    ) -> FixedContext:
        """This context with thresholds and measured errors; its layers may be elsewhere than `queries`, on a disk even.

        Args:
            queries: per squeezed layer, segments of queries [q_heads, length, head_dim] after RoPE.
        """
        modules = attention_modules(model)
        scales = [
            scale_of(m) for m, layer in zip(modules, self.layers, strict=True) if isinstance(layer, ClusteredKeys)
        ]
        layers = self.squeezed_layers
        curves = calibrate(layers, queries, scales, lambda done, total: on_progress("calibrate", done, total))
        on_progress("measure", 0, 1)
        if model.device.type == "cpu":
            warm_up(model.dtype, self.config)  # compiles what questions will need, so that they find it on the disk
        errors = measure_errors((layer.to(model.device) for layer in layers), queries, scales, curves)
        on_progress("measure", 1, 1)
        return replace(self, curves=replace(curves, errors=errors))

    @property
    def tokens(self) -> int:
        """Number of tokens, template included."""
        return len(self.ids)

    @property
    def squeezed_layers(self) -> list[ClusteredKeys]:
        return [layer for layer in self.layers if isinstance(layer, ClusteredKeys)]

    @cached_property
    def steps(self) -> Steps:
        """Decode steps captured for this context on a GPU, kept for its next question."""
        return Steps()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the squeezed layers' keys and values."""
        return sum(layer.num_bytes for layer in self.squeezed_layers)

    def extend(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        on_progress: Progress = lambda stage, done, total: None,
    ) -> FixedContext:
        """This context with more text at its end; see :func:`squeezed.extension.extend`."""
        from squeezed.extension import extend

        return extend(self, model, tokenizer, texts, on_progress=on_progress)

    def save(self, folder: str | Path, replace_existing: bool = False) -> None:
        """Write to `folder`, whole or not at all. See :func:`squeezed.artifact.save`."""
        from squeezed.artifact import save

        save(self, Path(folder), replace_existing)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: bool = True,
    ) -> FixedContext:
        """Map a saved context into memory and check that it belongs to `model` and `tokenizer`.

        Raises:
            InputError: damaged, of another format, or made with another model or tokenizer; says which.
        """
        from squeezed.artifact import load, read_manifest

        if model is not None and model.device.type == "cpu":
            warm_up(model.dtype, read_manifest(Path(folder)).config)
        context = load(Path(folder), verify)
        if model is not None and tokenizer is not None:
            context.check_belongs_to(model, tokenizer)
            if model.device.type != "cpu":
                context = context.to(model.device)
        return context

    def to(self, device: torch.device | str) -> FixedContext:
        """The same context with its tensors on `device`."""
        return replace(self, layers=tuple(layer.to(device) for layer in self.layers))

    def check_belongs_to(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError, naming the difference, unless this context was built with `model` and `tokenizer`."""
        check_identity(self.model, model_identity(model))
        if tokenizer_identity(tokenizer) != self.tokenizer:
            raise InputError(
                "the context was built with another tokenizer; load the one it was built with, or build it again"
            )

    def cache(
        self,
        sparsity: float = 0.9,
        dense: bool = False,
        given_up: int = 0,
        adaptive: bool = False,
        whole: bool = True,
        recall: int | None = None,
    ) -> SqueezedCache:
        """A fresh cache for one question, or a batch of them, for the model's own `generate`.

        Args:
            sparsity: share of the clustered keys to leave out, 0 to 1.
            dense: attend to everything without looking at centroids.
            given_up: last fixed tokens not to use, see :meth:`inputs`.
            adaptive: attend to everything where selecting is expected to take longer than it saves; on a CPU only for
                generated tokens.
            whole: read everything for a question of ordinary length, see `squeezed.cache.Selection`.
            recall: most tokens to recall, see `BuildConfig.recall`; None: as the context was built.

        Raises:
            InputError: sparsity outside 0 to 1, or recall below 0.
        """
        config = self.config if recall is None else replace(self.config, recall=recall)
        curves = None if dense else self.curves
        longest = None if whole else 0
        selection = Selection(curves, check_sparsity(sparsity), voters=config.voters, adaptive=adaptive, whole=longest)
        shared = None if selection.is_dense else Recall.at(sparsity, config, self.squeezed_layers, self.ids)
        squeezed = [i for i, layer in enumerate(self.layers) if isinstance(layer, ClusteredKeys)]
        observing = {i for number, i in enumerate(squeezed) if observes(number, len(squeezed))}
        layers = [
            question_layer(layer, selection, self.tokens, given_up, shared, i in observing)
            for i, layer in enumerate(self.layers)
        ]
        return SqueezedCache(layers)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[template.Message]]
    ) -> tuple[int, list[list[int]]]:
        """Tokenise what follows the fixed context in each conversation.

        Returns:
            The number of last fixed tokens that are not common to all of them, and each one's tokens after those.

        Raises:
            InputError: the tokens differ so far back that they lie in the clusters.
        """
        encoded = [
            template.encode_continuation(tokenizer, self.seam, template.continuation(tokenizer, self.seam, turn))
            for turn in turns
        ]
        given_up = max(removed for removed, _ in encoded)
        if given_up >= self.config.window:
            raise InputError(
                f"the last {given_up} tokens of the fixed context change with the question, more than its window of "
                f"{self.config.window}; build it with a larger --window"
            )
        tail = self.ids[self.tokens - given_up :].tolist() if given_up else []
        return given_up, [tail[: given_up - removed] + ids for removed, ids in encoded]

    def inputs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str],
        sparsity: float = 0.9,
        dense: bool = False,
        device: torch.device | str = "cpu",
        adaptive: bool = False,
        whole: bool = True,
    ) -> dict[str, Any]:
        """Keyword arguments for `generate`: input_ids [B, L], attention_mask [B, fixed + L], past_key_values.

        Several questions make a left-padded batch over the one shared context. `adaptive` and `whole` as for
        :meth:`cache`.
        """
        check_questions(questions)
        given_up, ids = self.encode(tokenizer, [[{"role": "user", "content": q}] for q in questions])
        return {
            **pad_left(ids, self.tokens - given_up, tokenizer, device),
            "past_key_values": self.cache(sparsity, dense, given_up, adaptive, whole),
        }

    def room(self, model: PreTrainedModel) -> int | None:
        """Tokens that fit after the fixed context; None if the model sets no limit."""
        return room_behind(model, self.tokens)


def room_behind(model: PreTrainedModel, tokens: int) -> int | None:
    """Tokens that fit behind that many fixed ones; None if the model sets no limit."""
    limit, (_, switch) = max_positions(model), rope_switch(model)
    if switch is not None and tokens <= switch:
        limit = switch  # beyond it the fixed keys would have to be rotated otherwise
    return None if limit is None else limit - tokens


def check_questions(questions: Sequence[str]) -> None:
    """Refuse what can't be asked, before any work. Raises InputError: none at all, an empty one, one not UTF-8."""
    if isinstance(questions, str):
        raise InputError("questions is a text: expected a list of questions, [question] for one")
    if not questions or any(not question.strip() for question in questions):
        raise InputError("a question is empty; ask something")
    for question in questions:
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"question {shortened(question)!r} is not UTF-8; convert it to UTF-8") from error


def shortened(question: str) -> str:
    """Its beginning, to name it by."""
    return question[:60] + "..." * (len(question) > 60)


def pad_left(
    ids: Sequence[Sequence[int]], seen: int, tokenizer: PreTrainedTokenizerBase, device: torch.device | str
) -> dict[str, Tensor]:
    """input_ids [B, L] and an attention_mask [B, seen + L] that also covers the `seen` tokens already in the cache."""
    length = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    rows = torch.full((len(ids), length), pad)
    mask = torch.ones(len(ids), seen + length, dtype=torch.int64)
    for row, tokens in enumerate(ids):
        rows[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, seen : seen + length - len(tokens)] = 0
    return {"input_ids": rows.to(device), "attention_mask": mask.to(device)}


def _check_length(tokens: int, config: BuildConfig) -> None:
    needed = config.sinks + config.window + max(2, round(1 / (config.clusters or 0.05)))
    if tokens < needed:
        raise InputError(
            f"the text is {tokens} tokens long: expected at least {needed}, a window of {config.window} and "
            "one cluster; a text this short needs no squeezing"
        )
