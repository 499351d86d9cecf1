"""Adding text to the end of a context without building it again.

The new text is prefilled behind the old one, dense. So is the old observation window once more: from now on it is like
any other part of the text, and tokens at its end may come out differently before what follows. New keys are clustered
by themselves, and their clusters lie behind the old ones, on every level. What was built stays what it is; earlier
extensions are clustered once more along with a new one that is not much smaller, so that many small ones do not leave
many small pieces. Thresholds are set anew.
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
# An earlier extension is clustered again if it is at most that many times as long as what comes with it: 20 extensions
# of 100 tokens each, on 2,000 built, found 1.1% less attention in 10% of the keys than a fresh build, and do not so.
_TOGETHER = 4
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
        total = len(context.layers) + 1  # and the manifest
        queries: list[list[Tensor]] = []
        for number, (layer, observed) in enumerate(longer.layers(model, tokenizer, on_progress)):
            written.append(artifact.write_layer(layer, partial, number))
            on_progress("save", number + 1, total)
            if observed:
                queries.append(observed)
            del layer
        layers = tuple(artifact.read_layer(entry, partial) for entry in written)
        found = replace(longer.context, layers=layers).calibrated(model, queries, on_progress)
        artifact.finish(found, partial, written)
        on_progress("save", total, total)
    return found


def rebuild_advice(context: FixedContext) -> str | None:
    """Why building the context afresh from all its files would pay; None where it would not."""
    if not context.extensions:
        return None
    fresh = context.config.clusters_of(context.squeezed_layers[0].clustered)
    counts = [int((layer.levels[0].sizes > 0).sum(-1).max()) for layer in context.squeezed_layers]
    clusters = max(counts)
    if clusters > _MANY_CLUSTERS * fresh:
        return (
            f"it has {clusters:,} clusters per head, of which each question reads every one; a fresh build of its "
            f"{context.tokens:,} tokens has {fresh:,}"
        )
    return None


@dataclass(frozen=True)
class _Longer:
    """An extension that is about to be prefilled.

    Attributes:
        old: the context that is extended.
        context: the longer one, without layers.
        kept: old tokens that stay where they are: all but the observation window.
        again: old keys at their end, of earlier extensions, that are clustered again with the new ones.
    """

    old: FixedContext
    context: FixedContext
    kept: int
    again: int

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
        earlier, together = list(old.extensions), len(ids) - old.tokens
        while earlier and earlier[-1] <= _TOGETHER * together:
            together += earlier.pop()
        context = replace(
            old,
            layers=(),
            ids=ids,
            seam=prefix.seam,
            text=prefix.text,
            parts=tuple(locate_parts(all_parts, prefix.spans, before)),
            extensions=(*earlier, together),
        )
        return cls(old, context, kept, together - (len(ids) - old.tokens))

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
            layer = extend_layer(self.old.layers[number].to(model.device), new, config, modules[number], self.again)
            on_progress("cluster", number + 1, len(modules))
            observed: list[Tensor] = []
            if probes is not None:
                observed = probes.observe(number, layer)
                on_progress("questions", number + 1, len(modules))
            if new.queries is not None:
                observed = observed or [new.queries]
            yield layer, observed
            del layer, new

    def _past(self, number: int, model: PreTrainedModel) -> Past:
        layer = self.old.layers[number].to(model.device)
        if isinstance(layer, ClusteredKeys):
            return Past(*_unchanged(layer, self.old.config, model.dtype))
        window = self.old.config.window
        return Past(layer.keys[:, :-window], layer.values[:, :-window])


def extend_layer(
    old: Layer, new: PrefilledLayer, config: BuildConfig, module: torch.nn.Module, again: int = 0
) -> Layer:
    """One layer of the longer context.

    Args:
        new: the layer's keys, values and queries of the old window and the text behind it; of a sliding-window layer
            all that counts of the longer text.
        again: last clustered keys of `old`, whole clusters, that are clustered again with the new ones.
    """
    if isinstance(old, SlidingTail) or new.queries is None:
        assert isinstance(old, SlidingTail)
        return SlidingTail(new.keys.clone(), new.values.clone(), old.sliding_window)
    stay, more = old.clustered - again, again + new.keys.shape[1] - config.window
    total = stay + more
    # What is clustered, in text order, then the new window.
    places = (old.positions[:, stay:].long() - (stay + config.sinks)).argsort(dim=1) + stay
    earlier = _unchanged(old, config, new.keys.dtype)
    later = [
        torch.cat([part.gather(1, places.unsqueeze(-1).expand(-1, -1, part.shape[2])), fresh], dim=1)
        for part, fresh in zip(earlier, (new.keys, new.values), strict=True)
    ]
    clusters = max(1, min(more, round(config.clusters_of(total) * more / total)))
    order, runs = find_clusters(later[0][:, :more], config, clusters, clustering_space(new, config))
    joined = []
    for known, added in zip(earlier, later, strict=True):
        ordered = lay_out(added, order, 0)
        parts = (known[:, :stay], ordered[:, :more], known[:, old.clustered :], ordered[:, more:])
        joined.append(torch.cat(parts, dim=1))
    positions = torch.cat([old.positions[:, :stay], (order + stay + config.sinks).int()], dim=1)
    sizes = []
    for level, run in zip(old.levels, runs, strict=True):
        before = level.sizes.long()
        sizes.append(join_runs(before * (before.cumsum(1) <= stay), run))
    layer = store(assemble(joined[0], joined[1], positions, sizes, config.second_order), config)
    return fit_spread(layer, new.queries, scale_of(module))


def _unchanged(layer: ClusteredKeys, config: BuildConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the clusters, then of the sinks, as the model made them: [kv_heads, clustered + sinks, D]."""
    last = layer.clustered + config.sinks
    keys, values = layer.keys[:, :last], layer.values[:, :last]
    if layer.scales is not None and keys.dtype == torch.int8:
        keys, values = from_eight_bits(keys, *layer.scales[:2]), from_eight_bits(values, *layer.scales[2:])
    keys, values = keys.to(dtype), values.to(dtype)
    if layer.sinks is not None:
        keys[:, layer.clustered :], values[:, layer.clustered :] = layer.sinks
    return keys, values


def _counted(tokens: int, on_progress: Progress) -> Callable[[int], None]:
    through = 0

    def on_chunk(more: int) -> None:
        nonlocal through
        through += more
        on_progress("prefill", through, tokens)

    return on_chunk
