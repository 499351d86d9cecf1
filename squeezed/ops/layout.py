"""How one layer's fixed context lies in memory, for every implementation of the operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClusterLevel:
    """One level of clusters of all KV heads of a layer.

    Heads may hold different numbers of clusters; shorter ones are padded at the end with rows of size 0, which no
    operation ever selects.

    Attributes:
        centroids: [kv_heads, clusters, head_dim], mean of the raw (after RoPE) keys of each cluster.
        sizes: [kv_heads, clusters] int32, number of keys N_i; 0 marks padding.
        spread: [kv_heads, clusters] float32, mean variance per dimension of each cluster's keys, for second-order
            scores; None scores by the centroid alone (paper).
        offsets: [kv_heads, clusters + 1] int32, CSR: cluster i's children are [offsets[i], offsets[i + 1]). On the
            finest level the children are keys, on a coarser one the clusters of the next finer level.
    """

    centroids: Tensor
    sizes: Tensor
    offsets: Tensor
    spread: Tensor | None = None

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
        )


@dataclass(frozen=True)
class ClusteredKeys:
    """One layer's fixed context: keys and values cluster by cluster, then what is always attended, in text order.

    RoPE is in the keys already, so their order is free; cluster-contiguous order turns a selected cluster into one run
    of memory, and the clusters of a coarse cluster into one run of centroids.

    Attributes:
        keys, values: [kv_heads, tokens, head_dim]; the first `clustered` tokens are permuted. Behind them lie the
            attention sinks (the text's first tokens, if they are kept out of the clusters) and the observation window;
            the operations treat both as one window.
        positions: [kv_heads, clustered] int32, place in the text of each permuted key (for inspection).
        levels: finest first; at least one.
        clustered: number of keys in clusters, n = N - w - sinks.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    levels: tuple[ClusterLevel, ...]
    clustered: int

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, the full KV that a budget is measured against."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str) -> ClusteredKeys:
        return ClusteredKeys(
            self.keys.to(device),
            self.values.to(device),
            self.positions.to(device),
            tuple(level.to(device) for level in self.levels),
            self.clustered,
        )
