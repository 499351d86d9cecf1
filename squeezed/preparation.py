"""From prefilled layers to finished ones: clustered, stored, and looked at by the questions that calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from squeezed import query_metric
from squeezed.attention import attached
from squeezed.cache import FixedLayer, FixedSlidingLayer, Selection
from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.layerwise import LayerRunner
from squeezed.models import plan_layers
from squeezed.ops.layout import ClusteredKeys
from squeezed.prefill import PrefilledLayer
from squeezed.recall import Recall
from squeezed.second_order import fit_spread

# General questions whose queries calibrate, see squeezed.calibration: as unlike one another as users' questions are,
# and one long enough to calibrate selections shared by 64 queries.
PROBES = (
    "What is this text about?",
    "Who is mentioned first, and what did they do? Answer in one sentence.",
    "List three facts from the text, with the numbers and dates that it gives for them.",
    "I have read the text above only once and need your help. Please look for the passage that says how things are "
    "supposed to work, compare it with what actually happened according to the rest of the text, and then tell me in a "
    "few short sentences what I should do next, where I can read more about it, and whom I could ask if something is "
    "still unclear to me.",
)


@dataclass(frozen=True)
class SlidingTail:
    """The last tokens of a sliding-window layer, in text order: keys, values [kv_heads, tail, head_dim]."""

    keys: Tensor
    values: Tensor
    sliding_window: int

    def to(self, device: torch.device | str) -> SlidingTail:
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))


Layer = ClusteredKeys | SlidingTail


def prepare_layer(layer: PrefilledLayer, module: torch.nn.Module, config: BuildConfig) -> Layer:
    """One layer of the fixed context, for the attention module `module`; the prefilled layer is only read."""
    if layer.queries is None:
        return SlidingTail(layer.keys.clone(), layer.values.clone(), layer.sliding_window or 0)
    space = clustering_space(layer, config)
    return fit_spread(cluster_layer(layer.keys, layer.values, config, space=space), layer.queries, scale_of(module))


def clustering_space(layer: PrefilledLayer, config: BuildConfig) -> Tensor | None:
    """[kv_heads, head_dim, head_dim] in which the layer's keys are clustered; None for cosine similarity."""
    if config.metric != "query" or layer.moment is None or layer.queries is None:
        return None
    group = layer.queries.shape[0] // layer.keys.shape[0]
    return query_metric.factor(layer.moment, group * layer.keys.shape[1])


def scale_of(module: torch.nn.Module) -> float:
    """The attention module's own softmax scale."""
    return float(getattr(module, "scaling", None) or module.head_dim**-0.5)  # type: ignore[operator]


def question_layer(
    layer: Layer,
    selection: Selection,
    tokens: int,
    given_up: int,
    recall: Recall | None = None,
    observes: bool = False,
) -> FixedLayer | FixedSlidingLayer:
    """A question's cache of one layer of a context of `tokens` tokens, less the last `given_up`."""
    end = tokens - given_up
    if isinstance(layer, ClusteredKeys):
        return FixedLayer(layer, selection, end, recall=recall, observes=observes)
    stop = layer.keys.shape[1] - given_up
    tail = slice(max(0, stop - layer.sliding_window + 1), stop)
    return FixedSlidingLayer(layer.keys[:, tail], layer.values[:, tail], end, layer.sliding_window)


class Probes:
    """Questions that go through the model layer by layer as a context's layers get finished.

    Each attends to every key of the fixed context; their queries are what a user's would be.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, given_up: Sequence[int], ids: Sequence[Sequence[int]]):
        """Questions of token ids `ids`, each after a context of `tokens` tokens less its `given_up` last."""
        self._runner, self._plan = LayerRunner(model), plan_layers(model)
        self._context_tokens = tokens
        self._given_up = list(given_up)
        self._ids = [torch.tensor([list(question)], device=model.device) for question in ids]
        self.hidden: list[Tensor] = []  # [1, tokens, hidden size] each, what goes into the next layer

    @property
    def tokens(self) -> int:
        """Of all questions together."""
        return sum(ids.shape[1] for ids in self._ids)

    def observe(self, number: int, layer: Layer) -> list[Tensor]:
        """Lead all questions through layer `number`: their queries there, [q_heads, tokens, head_dim] each."""
        queries: list[Tensor] = []
        hidden: list[Tensor] = []
        with attached(self._runner.model):  # once for all questions: it walks through all modules
            for i, (given_up, ids) in enumerate(zip(self._given_up, self._ids, strict=True)):
                end = self._context_tokens - given_up
                own = question_layer(layer, Selection(None), self._context_tokens, given_up)
                seen: list[Tensor] = []
                if isinstance(own, FixedLayer):
                    own.observed = seen
                cache = Cache(layers=self._stand_ins(end))
                cache.layers[number] = own
                mask = torch.ones(1, end + ids.shape[1], dtype=torch.int64, device=ids.device)
                before = self.hidden[i] if number else None
                hidden.append(self._runner.step(number, before, cache, input_ids=ids, attention_mask=mask))
                queries.extend(query[0] for query in seen)
        self.hidden = hidden
        return queries

    def _stand_ins(self, seen: int) -> list[FixedLayer | FixedSlidingLayer]:
        """Caches that only say how long they are, from which the decoder makes its masks."""
        layers: list[FixedLayer | FixedSlidingLayer] = []
        for i in range(self._plan.num_layers):
            window = self._plan.sliding.get(i)
            if window is None:
                layers.append(FixedLayer(None, Selection(None), seen))
            else:
                nothing = torch.empty(1, min(seen, window - 1), 1)
                layers.append(FixedSlidingLayer(nothing, nothing, seen, window))
        return layers
