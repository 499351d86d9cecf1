"""How one layer's fixed context lies in memory, for every implementation of the operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ChannelScales(NamedTuple):
    """How rows in 8 bits are read: number * scale + centre, channel by channel. [kv_heads, head_dim] float32 each.

    Keys and centroids share one pair, values and centroid values the other. With one scale per channel nothing has to
    be undone key by key: scale the query, and the centre adds the same to every logit of a row.
    """

    key_scale: Tensor
    key_centre: Tensor
    value_scale: Tensor
    value_centre: Tensor


def from_eight_bits(rows: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """[kv_heads, n, head_dim] int8 as float32; rows of any other dtype are only converted."""
    if rows.dtype != torch.int8:
        return rows.float()
    return torch.addcmul(centre.unsqueeze(1), rows.float(), scale.unsqueeze(1))


@dataclass(frozen=True)
class ClusterLevel:
    """One level of clusters of all KV heads of a layer.

    Heads may hold different numbers of clusters; shorter ones are padded at the end with rows of size 0, which no
    operation ever selects.

    Attributes:
        centroids: [kv_heads, clusters, head_dim], mean of the raw (after RoPE) keys of each cluster; may be in 8 bits.
        sizes: [kv_heads, clusters] int32, number of keys N_i; 0 marks padding.
        spread: [kv_heads, clusters] float32, mean variance per dimension of each cluster's keys, for second-order
            scores; None scores by the centroid alone (paper).
        offsets: [kv_heads, clusters + 1] int32, CSR: cluster i's children are [offsets[i], offsets[i + 1]). On the
            finest level the children are keys, on a coarser one the clusters of the next finer level.
        values: [kv_heads, clusters, head_dim], mean value of each cluster, of the centroids' dtype; they stand in for
            the keys of clusters that are left out (Multipole Attention, arXiv 2506.13059). None drops those (paper).
    """

    centroids: Tensor
    sizes: Tensor
    offsets: Tensor
    spread: Tensor | None = None
    values: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(kv_heads, clusters, head_dim)"""
        return tuple(self.centroids.shape)  # type: ignore[return-value]

    def to(self, device: torch.device | str) -> ClusterLevel:
        return ClusterLevel(
            self.centroids.to(device),
            self.sizes.to(device),
            self.offsets.to(device),
            None if self.spread is None else self.spread.to(device),
            None if self.values is None else self.values.to(device),
        )


class Recalled(NamedTuple):
    """Clustered keys that a question's generated tokens attend to whatever is selected, see `squeezed.recall`.

    Attributes:
        slots: [B, kv_heads, R] int32, places among the clustered keys, ascending; -1 for padding, which comes last.
        clusters: [B, kv_heads, R] int32, the finest cluster of each; for padding, the number of clusters.
        sizes: of each level, finest first, [B, kv_heads, clusters] int32: keys of each cluster that are not among them.
        All with B = 1 where the questions of a batch share them.
    """

    slots: Tensor
    clusters: Tensor
    sizes: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it as a flat list, which `from_tensors` undoes."""
        return [self.slots, self.clusters, *self.sizes]

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor]) -> Recalled:
        slots, clusters, *sizes = tensors
        return cls(slots, clusters, tuple(sizes))


def recalled_at(places: Tensor, *layers: tuple[ClusterLevel, ...]) -> list[Recalled]:
    """The keys at `places` in each of several layers of the same shapes, given by their levels.

    Args:
        places: [B, layers * kv_heads, R] int64 among the clustered keys in any order, -1 for none.
    """
    last = torch.iinfo(torch.int64).max
    slots = torch.where(places < 0, last, places).sort(-1).values
    present = slots < last
    slots = slots.where(present, -1)
    sizes, inside = [], slots
    for number, level in enumerate(zip(*layers, strict=True)):
        before = torch.cat([layer.sizes for layer in level])
        inside = _holder(inside.clamp(min=0), torch.cat([layer.offsets for layer in level]))
        taken = torch.zeros(places.shape[0], *before.shape, dtype=torch.int32, device=places.device)
        taken.scatter_add_(2, inside, present.int())
        sizes.append(before - taken)
        if number == 0:
            own = inside.where(present, before.shape[1])
    parts = (
        [part.contiguous() for part in tensor.chunk(len(layers), dim=1)] for tensor in (slots.int(), own.int(), *sizes)
    )
    return [Recalled.from_tensors(tensors) for tensors in zip(*parts, strict=True)]


def _holder(children: Tensor, offsets: Tensor) -> Tensor:
    """The cluster that holds each child, [B, kv_heads, n] int64."""
    batch, kv_heads, count = children.shape
    rows = children.transpose(0, 1).reshape(kv_heads, batch * count)
    found = torch.searchsorted(offsets.long(), rows.contiguous(), right=True) - 1
    return found.view(kv_heads, batch, count).transpose(0, 1)


@dataclass(frozen=True)
class ClusteredKeys:
    """One layer's fixed context: keys and values cluster by cluster, then what is always attended, in text order.

    RoPE is in the keys already, so their order is free; cluster-contiguous order turns a selected cluster into one run
    of memory, and the clusters of a coarse cluster into one run of centroids.

    Attributes:
        keys, values: [kv_heads, tokens, head_dim]; the first `clustered` tokens are permuted. Behind them lie the
            attention sinks (the text's first tokens, if they are kept out of the clusters) and the observation window;
            the operations treat both as one window. With keys in 8 bits the sinks' rows here are not read.
        positions: [kv_heads, clustered] int32, place in the text of each permuted key (for inspection).
        levels: finest first; at least one.
        clustered: number of keys in clusters, n = N - w - sinks.
        scales: of whatever is in 8 bits; None if nothing is.
        sinks: keys and values [kv_heads, sinks, head_dim] of the attention sinks as the model made them, if `keys` are
            in 8 bits: they lie so far off that they would cost all other keys their precision.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    levels: tuple[ClusterLevel, ...]
    clustered: int
    scales: ChannelScales | None = None
    sinks: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def window_start(self) -> int:
        """First of the tokens that are always attended and read from `keys`; those of `sinks` come before it."""
        return self.clustered + (0 if self.sinks is None else self.sinks[0].shape[1])

    # What a budget counts. A deployment keeps keys in 16 bits, so wider ones (float32 on a CPU) count as 16.

    @property
    def full_bytes(self) -> int:
        """Of a key and its value as the model makes them; also of a sink."""
        return 4 * self.keys.shape[2]

    @property
    def key_bytes(self) -> int:
        """Of a clustered key and its value as they are stored; also of one in the window."""
        return 2 * self.keys.shape[2] * min(2, self.keys.element_size())

    def always_bytes(self, window_end: int) -> int:
        """Of what every token reads of a head: sinks, and the window up to `window_end`."""
        apart = self.window_start - self.clustered
        return apart * self.full_bytes + (window_end - self.window_start) * self.key_bytes

    @property
    def centroid_bytes(self) -> int:
        """Of a centroid that is looked at, with its spread and its mean value where they are kept."""
        level = self.levels[0]
        row = self.keys.shape[2] * min(2, level.centroids.element_size())
        return row * (1 if level.values is None else 2) + (0 if level.spread is None else 4)

    def centroids(self, level: int) -> Tensor:
        """[kv_heads, clusters, head_dim] float32, as the operations see them."""
        rows = self.levels[level].centroids
        return rows.float() if self.scales is None else from_eight_bits(rows, *self.scales[:2])

    def to(self, device: torch.device | str) -> ClusteredKeys:
        return ClusteredKeys(
            self.keys.to(device),
            self.values.to(device),
            self.positions.to(device),
            tuple(level.to(device) for level in self.levels),
            self.clustered,
            None if self.scales is None else ChannelScales(*(scale.to(device) for scale in self.scales)),
            None if self.sinks is None else (self.sinks[0].to(device), self.sinks[1].to(device)),
        )
