"""The transformers cache of a question: a shared, read-only fixed part and the user's own growing part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from squeezed.calibration import ThresholdCurves
from squeezed.decode.own import OwnTokens
from squeezed.ops import voting
from squeezed.ops.layout import ClusteredKeys, Recalled
from squeezed.query_metric import add_moment
from squeezed.recall import Recall


@dataclass
class Usage:
    """What a cache has read of its layers' fixed contexts.

    Attributes:
        kept, offered: clustered keys attended, and those there were.
        bytes_read, bytes_full: bytes read, and those of the full KV.
        All are [B] float64, or 0 before anything was read.
    """

    kept: Tensor | int = 0
    offered: Tensor | int = 0
    bytes_read: Tensor | int = 0
    bytes_full: Tensor | int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def question(self, row: int) -> Usage:
        """The share of one question of the batch."""
        return Usage(*(value if isinstance(value, int) else value[row] for value in vars(self).values()))

    @property
    def kept_fraction(self) -> float:
        """Share of the clustered keys that were attended; 1 minus the realised sparsity."""
        return _ratio(self.kept, self.offered)

    @property
    def kv_budget(self) -> float:
        """Bytes read over bytes of the full KV: kept keys and values, the window, and the centroids looked at."""
        return _ratio(self.bytes_read, self.bytes_full)


def _ratio(part: Tensor | int, whole: Tensor | int) -> float:
    total = float(torch.as_tensor(whole).sum())
    return float(torch.as_tensor(part).sum()) / total if total else 1.0


class Read(NamedTuple):
    """What one block of queries that share a selection read; nothing is computed from it until it is asked for.

    Attributes:
        rows: questions of the batch; a single one may stand for several blocks or queries that selected for themselves.
        decode: a generated token, otherwise part of a question.
        kept: [levels, B, Hk], see `squeezed.ops.attend_fixed`; None if everything was attended.
        batch: number of selections, one per question, block or query.
        steps: selections of each question that `kept` is the sum of.
    """

    rows: slice
    decode: bool
    kept: Tensor | None
    batch: int
    steps: int = 1


@dataclass(frozen=True)
class Selection:
    """How a question selects: thresholds for a sparsity, or everything.

    Attributes:
        curves: None attends to everything (dense).
        sparsity: share of the clustered keys to leave out.
        block: most queries of a longer question that share one selection. More make it faster and coarser: blocks of
            512 err 4% to 10% more than blocks of 256 (docs/results/selection-notes.md) and take a fifth less time.
        voters: most queries of a block by which clusters are scored, see `squeezed.ops.voting`; None: all of them.
        alone: most queries times keys for which each query of a question selects for itself; None: 2^20 on a CPU and
            2^22, 149 queries at 28K tokens, on a GPU. Sharing a selection costs less time but finds less: of the demo's
            15 questions at sparsity 0.9, SmolLM2 answers 14 if each query selects, 13 with blocks of 8, 12 with one
            selection for the whole question, and 14 dense.
        adaptive: attend to everything where a cost model expects selecting to take longer than it saves; on a CPU only
            for generated tokens.
        whole: most queries times keys of a question that reads everything; None: 2^20 on a CPU and 2^24, 599 queries at
            28K tokens, on a GPU. One pass over all keys serves all of the question's tokens, where selecting reads a
            tenth for each: 60 tokens to 7,500 take SmolLM2 0.58 s on a CPU in one pass and 0.68 s if each selects, and
            what is decided there, how the answer begins, is full attention's.
    """

    curves: ThresholdCurves | None
    sparsity: float = 0.0
    block: int = 512
    voters: int | None = None
    alone: int | None = None
    adaptive: bool = False
    whole: int | None = 0
    _on_device: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is selected for any query."""
        return self.curves is None or self.sparsity == 0

    def reads_whole(self, queries: int, index: ClusteredKeys) -> bool:
        """Whether a question of that length reads everything in one pass."""
        whole = self.whole
        if whole is None:
            whole = 2**24 if index.keys.is_cuda else 2**20
        return self.is_dense or (queries > 1 and queries * index.clustered <= whole)

    def block_of(self, queries: int, index: ClusteredKeys) -> int:
        """How many queries of a question of that length share a selection, or a pass over everything."""
        if self.reads_whole(queries, index):
            return queries
        alone = self.alone
        if alone is None:
            alone = 2**22 if index.keys.is_cuda else 2**20
        if queries * index.clustered <= alone:
            return 1
        return min(self.block, queries)

    def thresholds(self, query: Tensor) -> tuple[float, ...] | Tensor | None:
        """Log threshold per level for the M queries of [B, Hq, M, D]; on a GPU a tensor there, made once."""
        if self.is_dense:
            return None
        assert self.curves is not None
        averaged = voting.voters(query.shape[2], self.voters)
        if not query.is_cuda:
            return self.curves.at(self.sparsity, averaged)
        if averaged not in self._on_device:
            self._on_device[averaged] = torch.tensor(self.curves.at(self.sparsity, averaged), device=query.device)
        return self._on_device[averaged]


@dataclass(eq=False)
class FixedLayer(DynamicLayer):
    """One full-attention layer: its clustered fixed context, shared by the batch, plus the own tokens.

    Attributes:
        index: the fixed context of this layer.
        selection: how to select from it.
        window_end: fixed tokens in use, N less those that tokenise differently before this question.
        reads: what was read so far.
        observed: when a list, the queries [B, Hq, M, D] that come by are appended to it.
        own: the own tokens while decoding in steps of a fixed shape; otherwise they are in `keys` and `values`.
        recall: what questions have read closely, shared by a cache's layers; None recalls nothing.
        observes: whether this layer adds to `recall`.
    """

    index: ClusteredKeys
    selection: Selection
    window_end: int
    reads: list[Read] = field(default_factory=list)
    observed: list[Tensor] | None = None
    own: OwnTokens | None = None
    recall: Recall | None = None
    observes: bool = False

    def recalled(self, batch: int) -> Recalled | None:
        """What each question's generated tokens attend to besides what they select; None if that is nothing."""
        found = None if self.recall is None else self.recall.within(self.index)
        if found is None or found.slots.shape[0] in (1, batch):
            return found
        # Questions are answered several times each.
        repeats = batch // found.slots.shape[0]
        return Recalled.from_tensors(part.repeat_interleave(repeats, dim=0) for part in found.tensors)

    def usage(self, decode: bool | None = None) -> Usage:
        """Sum of what generated tokens have read, or a question's own, or both."""
        reads = [read for read in self.reads if decode is None or read.decode is decode]
        if not reads:
            return Usage()
        index = self.index
        kv_heads = index.keys.shape[0]
        coarsest = int((index.levels[-1].sizes > 0).sum())
        batch = max(read.batch if read.rows == slice(None) else read.rows.stop for read in reads)
        kept, looked_at, blocks = (torch.zeros(batch, dtype=torch.float64) for _ in range(3))
        for read in reads:
            # Several selections of one question add up; otherwise there is one for each question.
            single = read.rows != slice(None)
            selections = read.batch if single else read.steps
            blocks[read.rows] += selections
            if read.kept is None:
                kept[read.rows] += kv_heads * index.clustered * selections
                continue
            counts = read.kept.sum(-1).double().cpu()  # [levels, selections]
            seen = read.steps * coarsest + counts[1:].sum(0)
            kept[read.rows] += counts[0].sum() if single else counts[0]
            looked_at[read.rows] += seen.sum() if single else seen
        offered = blocks * (kv_heads * index.clustered)
        window = blocks * (kv_heads * (self.window_end - index.clustered))
        always = blocks * (kv_heads * index.always_bytes(self.window_end))
        return Usage(
            kept=kept,
            offered=offered,
            bytes_read=kept * index.key_bytes + always + looked_at * index.centroid_bytes,
            bytes_full=(offered + window) * index.full_bytes,
        )

    def __post_init__(self) -> None:
        super().__init__()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.own is not None:
            return self.own.hold(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def own_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.window_end + self.own_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # The mask covers the own tokens only: every fixed token is visible to every own one.
        return self.own_length + query_length, self.window_end

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.own_length > 0:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.own_length > 0:
            super().batch_select_indices(indices)


class FixedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer: it stays dense, and starts from the fixed context's last tokens that it can still see.

    The tail is at most the window long; it is repeated for each question of a batch, as transformers does itself.
    """

    def __init__(self, keys: Tensor, values: Tensor, fixed_tokens: int, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._tail = (keys.unsqueeze(0), values.unsqueeze(0))
        self.cumulative_length = fixed_tokens
        self.own: OwnTokens | None = None  # as in FixedLayer; the tail is part of it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        self.keys, self.values = (tail.expand(batch, -1, -1, -1) for tail in self._tail)
        # Padding of a batch lies behind the tail and takes slots, at most as many as the longest question has tokens.
        self._slots = self.sliding_window - 1 + (key_states.shape[-2] if batch > 1 else 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.own is not None:
            return self.own.hold(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        kept = slice(max(0, keys.shape[-2] - self._slots), None)
        self.keys, self.values = keys[:, :, kept], values[:, :, kept]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = (self.keys if self.is_initialized else self._tail[0]).shape[-2]
        return stored + query_length, self.cumulative_length - stored


class SqueezedCache(Cache):
    """A question's cache, to be passed to `generate` as `past_key_values` on an attached model.

    Make it with :meth:`squeezed.FixedContext.cache`. The fixed part is never copied.
    """

    def __init__(self, layers: list[FixedLayer | FixedSlidingLayer]) -> None:
        super().__init__(layers=layers)

    @property
    def fixed_layers(self) -> list[FixedLayer]:
        return [layer for layer in self.layers if isinstance(layer, FixedLayer)]

    @property
    def recall(self) -> Recall | None:
        """What answers have in view besides what they select; the layers share it."""
        return next((layer.recall for layer in self.fixed_layers), None)

    def follow(self, tokens: Tensor) -> None:
        """Take note of tokens [B, M] that the model is about to read."""
        if self.recall is not None:
            self.recall.follow(tokens)

    @property
    def fixed_tokens(self) -> int:
        """Tokens of the fixed context in use."""
        return self.fixed_layers[0].window_end

    @property
    def prefill_usage(self) -> Usage:
        """What the question's own tokens read of the fixed context."""
        return sum((layer.usage(decode=False) for layer in self.fixed_layers), Usage())

    @property
    def decode_usage(self) -> Usage:
        """What the generated tokens read of the fixed context."""
        return sum((layer.usage(decode=True) for layer in self.fixed_layers), Usage())


class PrefillLayer(DynamicLayer):
    """A full-attention layer while the fixed context is prefilled: allocated once, and it keeps the last queries.

    Attributes:
        queries: [1, q_heads, window, head_dim], the last ones.
        moment: [kv_heads, head_dim, head_dim] float32, sum of q^T q over all queries.
    """

    def __init__(self, tokens: int, window: int) -> None:
        super().__init__()
        self.tokens, self.window = tokens, window
        self.filled = 0
        self.queries: Tensor | None = None
        self.moment: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], self.tokens, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], self.tokens, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def observe(self, query: Tensor) -> None:
        """Keep the last `window` queries, [1, q_heads, chunk, head_dim] at a time."""
        recent = query[:, :, -self.window :]
        if self.queries is not None:
            recent = torch.cat([self.queries, recent], dim=2)[:, :, -self.window :]
        self.queries = recent.clone()
        self.moment = add_moment(self.moment, query, self.keys.shape[1])
