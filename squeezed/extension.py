"""Adding text to the end of a context without building it again.

The new text is prefilled behind the old one, dense. So is the old observation window once more: from now on it is like
any other part of the text, and tokens at its end may come out differently before what follows. New keys are clustered
by themselves, and their clusters lie behind the old ones, on every level. The old clusters stay what they are;
thresholds are set anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed import artifact, template
from squeezed.clustering.layout import assemble, find_clusters, join_runs, lay_out
from squeezed.config import BuildConfig
from squeezed.context import FixedContext, Progress
from squeezed.errors import InputError
from squeezed.models import attention_modules, rope_switch
from squeezed.ops.layout import ClusteredKeys, from_eight_bits
from squeezed.prefill import Past, PrefilledLayer, prefill
from squeezed.preparation import Layer, SlidingTail, clustering_space, scale_of
from squeezed.second_order import fit_spread
from squeezed.storage import store
from squeezed.streaming import needed_bytes
from squeezed.text import Part, append_parts, locate_parts

_log = logging.getLogger(__name__)
_MANY_CLUSTERS = 1.25  # times those of a fresh build
_JOIN = "\n\n"


def extend(
    context: FixedContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    parts: Sequence[Part] = (),
    on_progress: Progress = lambda stage, done, total: None,
) -> FixedContext:
    """`context` with `texts` at its end, in memory.

    Args:
        parts: the files that `texts` are, with their places in characters.
        on_progress: called with (stage, done, total) as work proceeds.

    Raises:
        InputError: another model's or tokenizer's context, no text, or more than the model has positions for.
    """
    longer = _Longer.of(context, model, tokenizer, texts, parts)
    layers: list[Layer] = []
    queries: list[list[Tensor]] = []
    for layer, observed in longer.layers(model, tokenizer, on_progress):
        layers.append(layer)
        if observed:
            queries.append(observed)
    return replace(longer.context, layers=tuple(layers)).calibrated(model, queries, on_progress)


def extend_into(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    parts: Sequence[Part] = (),
    verify: bool = True,
    on_progress: Progress = lambda stage, done, total: None,
) -> FixedContext:
    """Extend the context in `folder`, a layer at a time: the folder holds the old one until the new one is complete.

    Args:
        verify: compare the old context with its checksums first.

    Returns:
        The extended context, mapped from its files.

    Raises:
        InputError: as for :func:`extend`; a damaged context, or too little space on the disk.
    """
    target = Path(folder).absolute()
    context = artifact.load(target, verify)
    longer = _Longer.of(context, model, tokenizer, texts, parts)
    with artifact.prepare(target, replace_existing=True) as partial:
        # Hidden states stay in memory here, and so do queries; it asks for a little too much.
        artifact.check_space(target, needed_bytes(model, longer.context.tokens, context.config, 0))
        written: list[artifact.WrittenLayer] = []
        queries: list[list[Tensor]] = []
        for number, (layer, observed) in enumerate(longer.layers(model, tokenizer, on_progress)):
            written.append(artifact.write_layer(layer, partial, number))
            if observed:
                queries.append(observed)
            del layer
        layers = tuple(artifact.read_layer(entry, partial) for entry in written)
        found = replace(longer.context, layers=layers).calibrated(model, queries, on_progress)
        on_progress("save", 0, 1)
        artifact.finish(found, partial, written)
        on_progress("save", 1, 1)
    return found


def rebuild_advice(context: FixedContext) -> str | None:
    """Why building the context afresh from all its files would pay; None where it would not."""
    if not context.extensions:
        return None
    added = sum(context.extensions)
    fresh = context.config.clusters_of(context.squeezed_layers[0].clustered)
    counts = [int((layer.levels[0].sizes > 0).sum(-1).max()) for layer in context.squeezed_layers]
    clusters = max(counts)
    if clusters > _MANY_CLUSTERS * fresh:
        return (
            f"{len(context.extensions)} extensions have left {clusters:,} clusters per head, where a fresh build has "
            f"{fresh:,}: each question reads them all"
        )
    if added > context.tokens - added:
        return f"{added:,} of its {context.tokens:,} tokens were added since it was built"
    return None


@dataclass(frozen=True)
class _Longer:
    """An extension that is about to be prefilled.

    Attributes:
        old: the context that is extended.
        context: the longer one, without layers.
        kept: old tokens that stay where they are: all but the observation window.
    """

    old: FixedContext
    context: FixedContext
    kept: int

    @classmethod
    def of(
        cls,
        old: FixedContext,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        parts: Sequence[Part],
    ) -> _Longer:
        old.check_belongs_to(model, tokenizer)
        if not texts or not all(text.strip() for text in texts):
            raise InputError("there is no text to add, or one that is empty; give files with text in them")
        more = _JOIN.join(text.strip() for text in texts)
        head = template.before_text(tokenizer, old.seam.chat)
        text, all_parts = append_parts(old.text[len(head) :], old.parts, more, parts)
        prefix, before = template.encode_prefix(tokenizer, text, old.seam.chat)
        ids, kept = torch.tensor(prefix.ids), old.tokens - old.config.window
        if not torch.equal(ids[:kept], old.ids[:kept]):
            given_up = old.tokens - template.common_prefix(prefix.ids, old.ids.tolist())
            raise InputError(
                f"the last {given_up} tokens of the context change with the text that is added, more than its window "
                f"of {old.config.window}; build it again from all files"
            )
        _, switch = rope_switch(model)
        if switch is not None and old.tokens <= switch < len(ids):
            raise InputError(
                f"{model.config.model_type} rotates the keys of a text of more than {switch} tokens otherwise, and the "
                f"longer text has {len(ids)}; build the context again from all files"
            )
        if len(ids) <= old.tokens:
            raise InputError(f"the text that is added makes the context no longer than its {old.tokens} tokens")
        context = replace(
            old,
            layers=(),
            ids=ids,
            seam=prefix.seam,
            text=prefix.text,
            parts=tuple(locate_parts(all_parts, prefix.spans, before)),
            extensions=(*old.extensions, len(ids) - old.tokens),
        )
        return cls(old, context, kept)

    def layers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_progress: Progress
    ) -> Iterator[tuple[Layer, list[Tensor]]]:
        """The longer context's layers in order, and the queries that calibrate each, none for a sliding window."""
        modules, config = attention_modules(model), self.context.config
        probes = self.context.probes(model, tokenizer)
        ids = self.context.ids[self.kept :].tolist()
        prefilled = prefill(
            model,
            ids,
            config.window,
            config.chunk,
            _counted(len(ids), on_progress),
            past=lambda number: self._past(number, model),
            past_tokens=self.kept,
        )
        for number, new in enumerate(prefilled):
            layer = extend_layer(self.old.layers[number].to(model.device), new, config, modules[number])
            observed = probes.observe(number, layer) if probes is not None else []
            if new.queries is not None:
                observed = observed or [new.queries]
            yield layer, observed
            del layer, new
            on_progress("cluster", number + 1, len(modules))

    def _past(self, number: int, model: PreTrainedModel) -> Past:
        layer = self.old.layers[number].to(model.device)
        if isinstance(layer, ClusteredKeys):
            return Past(*(part.to(model.dtype) for part in _unchanged(layer, self.old.config)))
        window = self.old.config.window
        return Past(layer.keys[:, :-window], layer.values[:, :-window])


def extend_layer(old: Layer, new: PrefilledLayer, config: BuildConfig, module: torch.nn.Module) -> Layer:
    """One layer of the longer context.

    Args:
        new: the layer's keys, values and queries of the old window and the text behind it; of a sliding-window layer
            all that counts of the longer text.
    """
    if isinstance(old, SlidingTail) or new.queries is None:
        assert isinstance(old, SlidingTail)
        return SlidingTail(new.keys.clone(), new.values.clone(), old.sliding_window)
    keys, values = _unchanged(old, config)
    count, before = new.keys.shape[1] - config.window, old.clustered
    total = before + count
    clusters = max(1, min(count, round(config.clusters_of(total) * count / total)))
    order, runs = find_clusters(new.keys[:, :count], config, clusters, clustering_space(new, config))
    joined = []
    for earlier, later in ((keys, new.keys), (values, new.values)):
        ordered = lay_out(later, order, 0)
        parts = (earlier[:, :before], ordered[:, :count], earlier[:, before:], ordered[:, count:])
        joined.append(torch.cat(parts, dim=1))
    positions = torch.cat([old.positions, (order + before + config.sinks).int()], dim=1)
    sizes = [join_runs(level.sizes.long(), run) for level, run in zip(old.levels, runs, strict=True)]
    layer = store(assemble(joined[0], joined[1], positions, sizes, config.second_order), config)
    return fit_spread(layer, new.queries, scale_of(module))


def _unchanged(layer: ClusteredKeys, config: BuildConfig) -> tuple[Tensor, Tensor]:
    """Keys and values of the clusters, then of the sinks, as the model made them: [kv_heads, clustered + sinks, D]."""
    last = layer.clustered + config.sinks
    if layer.scales is None or layer.window is None:
        return layer.keys[:, :last], layer.values[:, :last]
    dtype = layer.window[0].dtype
    keys = from_eight_bits(layer.keys[:, : layer.clustered], *layer.scales[:2]).to(dtype)
    values = from_eight_bits(layer.values[:, : layer.clustered], *layer.scales[2:]).to(dtype)
    key_sinks, value_sinks = (part[:, : config.sinks] for part in layer.window)
    return torch.cat([keys, key_sinks], dim=1), torch.cat([values, value_sinks], dim=1)


def _counted(tokens: int, on_progress: Progress) -> Callable[[int], None]:
    through = 0

    def on_chunk(more: int) -> None:
        nonlocal through
        through += more
        on_progress("prefill", through, tokens)

    return on_chunk
