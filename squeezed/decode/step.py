"""One decode step of a model: fixed shapes, nothing read back, captured in a CUDA graph where that works."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.attention import attached, takes_everything
from squeezed.cache import FixedLayer, FixedSlidingLayer, Read, SqueezedCache
from squeezed.decode import fused
from squeezed.decode.own import OwnTokens
from squeezed.decode.sampler import Sampler, Sampling, StepState
from squeezed.decode.standing import StandingRecall
from squeezed.models import rope_switch


class DecodeStep:
    """A step for one model, fixed context and batch size, to be used for one generation after another.

    Attributes:
        state: with the token to be fed; a step leaves the next one there.
        logits: [B, vocabulary], of the latest step.
        path: how it runs: `fused graph` (our own kernels for the whole layer), `graph` (the model's own code), or
            `eager` and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SqueezedCache,
        batch: int,
        capacity: int,
        sampling: Sampling,
        capture: bool = True,
    ) -> None:
        self.model, self.cache = model, cache
        self.batch, self.capacity, self.sampling = batch, capacity, sampling
        device = model.device
        # Row 0 counts the own tokens; each sliding-window layer's tail makes its count differ.
        sliding = [i for i, layer in enumerate(cache.layers) if isinstance(layer, FixedSlidingLayer)]
        self.state = StepState.start(batch, 1 + len(sliding), capacity, device)
        self._own = [
            self._buffer(layer, sliding.index(i) + 1 if i in sliding else 0) for i, layer in enumerate(cache.layers)
        ]
        self.sampler = Sampler(sampling, batch, model.config.get_text_config().vocab_size, device)
        selecting = [
            layer.index
            for layer, own in zip(cache.layers, self._own, strict=True)
            if isinstance(layer, FixedLayer) and own.kept is not None
        ]
        self._recall = StandingRecall(cache.recall, selecting, batch) if cache.recall and selecting else None
        # Own masks are in the attention itself; a mask of four dimensions keeps transformers from making any.
        self._mask = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=device)
        self.logits = torch.empty(0)
        self.path = "eager"
        self._capture = capture and device.type == "cuda"
        self._fused: fused.FusedModel | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def _buffer(self, layer: FixedLayer | FixedSlidingLayer, row: int) -> OwnTokens:
        found = layer.keys
        slots = self.capacity + (layer.sliding_window + found.shape[2] if isinstance(layer, FixedSlidingLayer) else 0)
        # Zeros, so that nothing that is masked can be a NaN.
        keys, values = (
            part.new_zeros(self.batch, part.shape[1], slots, part.shape[3]) for part in (found, layer.values)
        )
        own = OwnTokens(keys, values, self.state.lengths[row])
        if isinstance(layer, FixedSlidingLayer):
            return replace(own, window=layer.sliding_window)
        q_heads = self.model.config.get_text_config().num_attention_heads
        query = keys.new_empty(self.batch, q_heads, 1, keys.shape[3])
        if takes_everything(query, layer):
            return own
        kept = torch.zeros(len(layer.index.levels), self.batch, dtype=torch.int64, device=keys.device)
        return replace(own, kept=kept, running=self.state.running)

    def serves(self, cache: SqueezedCache, batch: int, needed: int, sampling: Sampling) -> bool:
        """Whether this step can generate for another cache: the same fixed context, read in the same way."""
        return (
            (batch, sampling) == (self.batch, self.sampling)
            and needed <= self.capacity
            and len(cache.layers) == len(self.cache.layers)
            and all(_alike(a, b) for a, b in zip(cache.layers, self.cache.layers, strict=True))
        )

    def begin(self, cache: SqueezedCache, ids: Tensor, padding: list[int]) -> None:
        """Take over a cache that has seen the questions `ids` [B, L], left-padded by `padding` tokens each."""
        length = ids.shape[1]
        earlier = cache.fixed_layers[0].own_length - length  # turns before this one; only ever of a single question
        lengths = [earlier + length - count for count in padding]
        counters = [lengths]
        for layer, own in zip(cache.layers, self._own, strict=True):
            keys, values = _real_rows(layer.keys, padding, length), _real_rows(layer.values, padding, length)
            for row in range(self.batch):
                own.keys[row, :, : keys[row].shape[1]] = keys[row]
                own.values[row, :, : values[row].shape[1]] = values[row]
            if isinstance(layer, FixedSlidingLayer):
                counters.append([part.shape[1] for part in keys])
            if own.kept is not None:
                own.kept.zero_()
            layer.own = own
        if self._recall is not None and cache.recall is not None:
            self._recall.take(cache.recall)
            self._given = cache.recall
            for fixed in cache.fixed_layers:
                fixed.recall = self._recall
        self.state.begin(counters)
        self.sampler.begin(ids, padding)
        self._padding, self._length = padding, earlier + length
        if self._graph is None:
            self.cache = cache

    def first(self, logits: Tensor) -> Tensor:
        """Choose the first token from the question's logits [B, vocabulary]; returns [B, 1]."""
        return self.state.token.copy_(self.sampler.choose(logits))

    def prepare(self) -> None:
        """Capture the step in a CUDA graph, once; needs a cache and a first token."""
        if not self._capture:
            return
        self._capture = False
        reason = rope_depends_on_length(self.model)
        if reason is not None:
            self.path = f"eager: {reason}"
            return
        state, random = self._copies(), torch.cuda.get_rng_state(self.model.device)
        try:
            self._fused = self._checked_fused(state)
            self._step()
            self._restore(state)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
            self._graph = graph
            self.path = "graph" if self._fused is None else "fused graph"
        except (RuntimeError, NotImplementedError) as error:
            torch.cuda.synchronize(self.model.device)
            self.path = f"eager: {str(error).strip().splitlines()[0]}"
            self._fused = None
            self.sampler.in_one_launch = False  # what failed may be the compiler of kernels
        self._restore(state)
        torch.cuda.set_rng_state(random, self.model.device)

    def _checked_fused(self, state: list[Tensor]) -> fused.FusedModel | None:
        """Our own kernels for the model's layers, if they give the model's own logits for this very token."""
        if fused.why_not(self.model, self.cache.layers, self.batch) is not None:
            return None
        expected = self._forward()
        self._restore(state)
        found = fused.FusedModel(self.model, self.cache.fixed_tokens, self.capacity)
        logits = self._by(found)
        self._restore(state)
        return found if fused.close(logits, expected) else None

    def _copies(self) -> list[Tensor]:
        """Copies of everything that a step changes, but for the slots that it writes."""
        return [tensor.clone() for tensor in self._changing()]

    def _restore(self, state: list[Tensor]) -> None:
        for tensor, before in zip(self._changing(), state, strict=True):
            tensor.copy_(before)

    def _changing(self) -> list[Tensor]:
        kept = [own.kept for own in self._own if own.kept is not None]
        recent = [] if self._recall is None else [self._recall.recent]
        return [*self.state.changing(), *kept, *recent, *self.sampler.changing()]

    def run(self) -> None:
        """Feed the token, and leave the next one in its place."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self.logits = self._forward()
        self.sampler.advance(self.logits, self.state)

    def _forward(self) -> Tensor:
        if self._fused is not None:
            return self._by(self._fused)
        with attached(self.model):
            output = self.model(
                input_ids=self.state.token,
                attention_mask=self._mask,
                position_ids=self.state.lengths[0].long()[:, None] + self.cache.fixed_tokens,
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.logits[:, -1]

    def _by(self, model: fused.FusedModel) -> Tensor:
        self.cache.follow(self.state.token)
        return model(self.state.token, self.cache.layers)

    def end(self, cache: SqueezedCache, steps: int) -> None:
        """Give the cache back as it is after `steps` steps, and write down what they read.

        A sliding-window layer gets nothing back: caches with such layers are not continued.
        """
        if self._recall is not None:
            self._given.look_up(self._recall.recent.clone())
            for fixed in cache.fixed_layers:
                fixed.recall = self._given
        for layer, own in zip(cache.layers, self._own, strict=True):
            layer.own = None
            if isinstance(layer, FixedLayer):
                layer.keys, layer.values = (self._padded(part, steps) for part in (own.keys, own.values))
                kept = None if own.kept is None else own.kept.unsqueeze(-1).clone()
                if steps:
                    layer.reads.append(Read(slice(None), True, kept, self.batch, steps))

    def _padded(self, states: Tensor, steps: int) -> Tensor:
        """The own tokens of a buffer with each question's left padding in front, [B, kv_heads, slots, D]."""
        total = self._length + steps
        out = states.new_zeros(*states.shape[:2], total, states.shape[3])
        for row, count in enumerate(self._padding):
            out[row, :, count:] = states[row, :, : total - count]
        return out


def _alike(ours: FixedLayer | FixedSlidingLayer, theirs: FixedLayer | FixedSlidingLayer) -> bool:
    """Whether a step captured for one layer reads what the other would."""
    if isinstance(ours, FixedLayer) and isinstance(theirs, FixedLayer):
        a, b = ours.selection, theirs.selection
        return (
            ours.index is theirs.index
            and ours.window_end == theirs.window_end
            and a.curves is b.curves
            and (ours.recall and (ours.recall.most, ours.recall.copies))
            == (theirs.recall and (theirs.recall.most, theirs.recall.copies))
            and (a.sparsity, a.adaptive) == (b.sparsity, b.adaptive)
        )
    return type(ours) is type(theirs) and ours.sliding_window == theirs.sliding_window


def _real_rows(states: Tensor, padding: list[int], length: int) -> list[Tensor]:
    """Each question's slots without its padding: [kv_heads, slots, D] of stored [B, kv_heads, S, D].

    What is stored ends with the questions' `length` slots, of which each row's first are padding; a sliding-window
    layer may hold fewer.
    """
    before, lost = max(0, states.shape[2] - length), max(0, length - states.shape[2])
    return [
        torch.cat([states[row, :, :before], states[row, :, before + max(0, count - lost) :]], dim=1)
        for row, count in enumerate(padding)
    ]


def rope_depends_on_length(model: PreTrainedModel) -> str | None:
    """Why the rotation can't be captured: it asks how long the sequence is, on the host."""
    kind, switch = rope_switch(model)
    return None if switch is None else f"{kind} rotation depends on the length"
