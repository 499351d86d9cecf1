"""Many methods in one forward pass: each row of the batch is the same question, attended by another method.

A row is a method and a budget. The fixed context is prefilled once and shared; a row's own tokens are its own. Rows may
stand at different lengths, so that one can go on generating where another has got further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from squeezed.attention import attend_fixed, attend_own
from squeezed.cache import FixedLayer, Read
from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method, products
from squeezed.evaluation.place import Place
from squeezed.evaluation.streams import side_by_side
from squeezed.ops import dense, merge_attention
from squeezed.recall import peak_weights

_BATCHES = (32, 64, 128)  # query tokens that go to the GPU kernels together
_LOGITS = {"cpu": 2**25, "cuda": 2**28}  # float32 logits held at once


@dataclass(frozen=True)
class Row:
    """A method under a budget, `None` for full attention; `spec` is how the command line names it."""

    spec: str
    method: Method
    budget: float | None

    @property
    def key(self) -> str:
        return self.spec if self.budget is None else f"{self.spec}@{self.budget:g}"


@dataclass(frozen=True)
class Group:
    """Rows of one method that share what was built: positions in the batch, and the state of each layer."""

    rows: slice
    method: Method
    states: Sequence[Any]


def padded(tokens: Tensor) -> Tensor:
    """[n, ...] as the GPU kernels get it: they are compiled anew for new sizes of a batch; few sizes are enough."""
    count = tokens.shape[0]
    if not tokens.is_cuda:
        return tokens
    size = next((size for size in _BATCHES if size >= count), -(-count // _BATCHES[-1]) * _BATCHES[-1])
    return torch.cat([tokens, tokens[-1:].expand(size - count, *tokens.shape[1:])]) if size > count else tokens


class RowsLayer(DynamicLayer):
    """Own tokens of all rows in one layer: keys, values and queries [R, capacity, heads, head_dim]."""

    def __init__(self, place: Place, rows: int, capacity: int) -> None:
        super().__init__()
        self.place, self.rows, self.capacity = place, rows, capacity
        self.is_initialized = False
        self.queries: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            heads, dim = key_states.shape[1], key_states.shape[-1]
            self.keys = key_states.new_zeros(self.rows, self.capacity, heads, dim)
            self.values = torch.zeros_like(self.keys)
            self.is_initialized = True
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        return key_states, value_states

    def _write(self, store: Tensor, new: Tensor) -> None:
        store[self.place.active.unsqueeze(1), self.place.places] = new.transpose(1, 2)

    def _read(self, store: Tensor) -> Tensor:
        """[A, heads, reach, D]"""
        return store[self.place.active, : self.place.reach].transpose(1, 2)

    def share_first_row(self, tokens: int) -> None:
        """Give every row the own tokens that were fed to row 0."""
        for store in (self.keys, self.values):
            store[1:, :tokens] = store[:1, :tokens]

    def get_seq_length(self) -> int:
        return self.place.reach

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """[A, Hq, M, D] -> [A, Hq, M, D] float32, causal over the own tokens and by method over the fixed ones."""
        raise NotImplementedError

    def _own(self, query: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
        at = torch.arange(self.place.reach, device=query.device)
        places = self.place.places.unsqueeze(-1)
        mask = at <= places
        if window is not None:
            mask &= at > places - window
        return attend_own(query, self._read(self.keys), self._read(self.values), mask.unsqueeze(1), scale)


class SlidingRowsLayer(RowsLayer):
    """A layer with a sliding window, dense for every row; its fixed part is the last tokens [Hk, tail, D]."""

    def __init__(
        self, place: Place, rows: int, capacity: int, keys: Tensor, values: Tensor, given_up: int, window: int
    ) -> None:
        super().__init__(place, rows, capacity)
        end = keys.shape[1] - given_up
        self.tail = (keys[:, :end], values[:, :end])
        self.window = window

    def attend(self, query: Tensor, scale: float) -> Tensor:
        keys, values = (tail.expand(query.shape[0], -1, -1, -1) for tail in self.tail)
        distance = self.place.places.unsqueeze(-1) + torch.arange(keys.shape[2], 0, -1, device=query.device)
        fixed = attend_own(query, keys, values, (distance < self.window).unsqueeze(1), scale)
        return merge_attention([fixed, self._own(query, scale, self.window)])[0]


class ScoredLayer(RowsLayer):
    """A full-attention layer: rows of choosing methods read `context`, those of ours their FixedLayer.

    Attributes:
        groups: the choosing methods' rows, in the order of the batch.
        ours: row -> the product's cache layer.
        end: fixed tokens in use.
        budgets: of all rows.
        observed: when a list, the queries [A, Hq, M, D] that come by are appended to it.
    """

    def __init__(
        self,
        place: Place,
        rows: int,
        capacity: int,
        context: LayerContext,
        groups: Sequence[Group],
        ours: dict[int, FixedLayer],
        end: int,
        budgets: Sequence[float],
    ) -> None:
        super().__init__(place, rows, capacity)
        self.context, self.groups, self.ours = context, groups, ours
        self.end, self.budgets = end, budgets
        self.observed: list[Tensor] | None = None

    def share_first_row(self, tokens: int) -> None:
        super().share_first_row(tokens)
        assert self.queries is not None
        self.queries[1:, :tokens] = self.queries[:1, :tokens]

    def attend(self, query: Tensor, scale: float) -> Tensor:
        if self.queries is None:
            self.queries = query.new_zeros(self.rows, self.capacity, query.shape[1], query.shape[-1])
        self._write(self.queries, query)
        if self.observed is not None:
            self.observed.append(query)
        fixed = self._everything(query, scale) if self.place.whole else self.fixed(query, scale)[:2]
        return merge_attention([fixed, self._own(query, scale)])[0]

    def _everything(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Full attention to the fixed context, by the kernels that the product has for it."""
        keys, values = self.context.keys[:, : self.end], self.context.values[:, : self.end]
        if dense.serves(query, keys):
            output, lse = dense.attend_dense(query, keys, values, self.end, scale)
            output = output.float()
        else:
            output, lse = attend_own(query, keys.unsqueeze(0), values.unsqueeze(0), None, scale)
        recalls = {id(layer.recall): layer.recall for layer in self.ours.values() if layer.recall and layer.observes}
        if recalls:
            inner = self.context.inner
            weights = lse.new_full((1, self.end), float("-inf"))
            weights[:, inner] = peak_weights(query, self.context.inner_keys, lse, scale).sum(1)
            for recall in recalls.values():
                recall.observe(weights, self)
        return output, lse

    def fixed(self, query: Tensor, scale: float, mass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Attention to the fixed context: output [A, Hq, M, D] float32, log-sum-exp [A, Hq, M], and with `mass` the
        log-sum-exp of the exactly attended keys alone."""
        output = query.new_empty(query.shape, dtype=torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        exact = lse if not mass else torch.empty_like(lse)
        active = self.place.rows
        chosen = [at for at, row in enumerate(active) if row not in self.ours]
        product = [at for at, row in enumerate(active) if row in self.ours]
        calls = [partial(self._ours, query[at], self.ours[active[at]], scale) for at in product]
        for at, (found, found_lse) in zip(product, side_by_side(calls, query.device), strict=True):
            output[at], lse[at] = found, found_lse
            if mass:
                exact[at] = found_lse
        if chosen:
            part = slice(chosen[0], chosen[-1] + 1)
            step = max(1, _LOGITS[query.device.type] // (len(chosen) * query.shape[1] * self.end))
            for first in range(0, query.shape[2], step):
                block = slice(first, min(first + step, query.shape[2]))
                results = self._choose(query[part, :, block], part, block, mass)
                output[part, :, block], lse[part, :, block] = results[:2]
                if mass:
                    exact[part, :, block] = results[2]
        return output, lse, exact

    def _ours(self, query: Tensor, layer: FixedLayer, scale: float) -> tuple[Tensor, Tensor]:
        """[Hq, M, D] by the product, as a batch of questions of one token each: every token selects for itself."""
        count = query.shape[1]
        alone = padded(query.transpose(0, 1).unsqueeze(2))
        found, lse = attend_fixed(alone, layer, None, scale)
        read = layer.reads[-1]
        layer.reads[-1] = read._replace(kept=None if read.kept is None else read.kept[:, :count], batch=count)
        return found[:count, :, 0].transpose(0, 1), lse[:count, :, 0].T

    def _choose(self, query: Tensor, part: slice, block: slice, mass: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of `part` of the batch, and the queries of `block`."""
        context, place = self.context, self.place
        heads = context.kv_heads
        batch, q_heads, queries, dim = query.shape
        # KV heads first: rows and queries of a head are one matrix.
        grouped = query.view(batch, heads, q_heads // heads, queries, dim).transpose(0, 1)
        assert self.queries is not None
        history = self._read(self.queries)[part].unflatten(1, (heads, -1)).transpose(0, 1)
        keys, values = context.keys[:, : self.end], context.values[:, : self.end]
        flat = products(grouped.reshape(heads, -1, dim), keys.transpose(1, 2)).mul_(context.scale)
        logits = flat.view(*grouped.shape[:-1], self.end)
        full_lse = logits.logsumexp(-1) if mass else None
        exact_mass = None if full_lse is None else torch.zeros_like(full_lse)
        estimates: list[tuple[slice, Tensor, Tensor]] = []
        active = place.rows[part]
        inside = [(g, [at for at, row in enumerate(active) if g.rows.start <= row < g.rows.stop]) for g in self.groups]
        present = [(group, slice(found[0], found[-1] + 1)) for group, found in inside if found]

        def choose(group: Group, rows: slice) -> Choice:
            budgets = tuple(self.budgets[row] for row in active[rows])
            places = place.places[part, block][rows]
            asked = Asked(context, grouped[:, rows], logits[:, rows], places, history[:, rows], budgets)
            return group.method.choose(group.states[context.layer], asked)

        choices = side_by_side([partial(choose, *one) for one in present], query.device)
        for (_, rows), choice in zip(present, choices, strict=True):
            own = logits[:, rows]
            inner = own[..., context.inner]
            read = 2.0 * context.row_bytes * heads * (self.end - context.count)
            if choice.kept is None:
                place.bytes[part, block][rows] += read + 2.0 * context.row_bytes * heads * context.count
            else:
                union = choice.kept.any(2) if choice.kept.shape[2] > 1 else choice.kept[:, :, 0]
                kept_keys = union.sum((0, 3), dtype=torch.float64)
                place.bytes[part, block][rows] += read + 2.0 * context.row_bytes * kept_keys
                inner.masked_fill_(~choice.kept, float("-inf"))
            place.bytes[part, block][rows] += choice.metadata
            if exact_mass is not None and full_lse is not None:
                exact_mass[:, rows] = own.logsumexp(-1)
            if choice.log_weights is not None:
                inner += choice.log_weights
            if choice.estimates is not None and choice.stand_ins is not None:
                estimates.append((rows, choice.estimates, choice.stand_ins))
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak).exp_()
        total = weights.sum(-1)
        summed = products(weights.view(heads, -1, self.end).to(values.dtype), values)
        output = summed.view(*grouped.shape[:-1], dim) / total.unsqueeze(-1)
        lse = total.log() + peak.squeeze(-1)
        for rows, stand_in_logits, stand_ins in estimates:
            own_lse = stand_in_logits.logsumexp(-1)
            shares = (stand_in_logits - own_lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp_()
            guessed = products(shares.view(heads, -1, shares.shape[-1]).to(stand_ins.dtype), stand_ins)
            merged = merge_attention([(output[:, rows], lse[:, rows]), (guessed.view_as(output[:, rows]), own_lse)])
            output[:, rows], lse[:, rows] = merged

        def by_row(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).flatten(1, 2)

        return by_row(output), by_row(lse), by_row(lse if exact_mass is None else exact_mass)


def last_reads(layers: Sequence[ScoredLayer]) -> dict[int, Tensor | None]:
    """What each of our rows kept in the pass just done, and forget it: row -> [layers, levels, tokens, Hk], or None if
    it attended to everything."""
    found: dict[int, Tensor | None] = {}
    for row in layers[0].ours:
        kept = []
        for layer in layers:
            reads = layer.ours[row].reads
            if reads and reads[-1].kept is not None:
                kept.append(reads[-1].kept)
            reads.clear()
        found[row] = torch.stack(kept) if kept else None
    return found


def bytes_of(layers: Sequence[ScoredLayer], row: int, kept: Tensor | None, tokens: int) -> Tensor:
    """Bytes that one of our rows read for each token, [tokens] float64, all layers together, as the product counts."""
    total = torch.zeros(tokens, dtype=torch.float64)
    for number, layer in enumerate(layers):
        fixed = layer.ours[row]
        fixed.reads = [Read(slice(None), False, None if kept is None else kept[number], tokens)]
        total += torch.as_tensor(fixed.usage().bytes_read)
        fixed.reads = []
    return total
