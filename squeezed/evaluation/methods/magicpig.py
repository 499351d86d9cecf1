"""MagicPIG: keys sampled by locality-sensitive hashing, weighted by how likely they were to be sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method, scaled_products

_ENTRY = 4  # bytes of a key's number in a bucket
_MATCHES = 2**27  # comparisons of buckets held at once
_BITS, _TABLES = range(2, 13), (8, 16, 32, 64)


class Tables(NamedTuple):
    """Hash tables of one layer.

    Attributes:
        planes: [D, tables * bits] float32, normals of the random hyperplanes.
        codes: [tables, Hk, n] int16, each centred key's bucket in each table.
        centre: [Hk, 1, D] float32, the keys' mean.
        directions: [Hk, n, D] float32, centred keys of length 1.
        bits: per bucket number.
    """

    planes: Tensor
    codes: Tensor
    centre: Tensor
    directions: Tensor
    bits: int


@dataclass(frozen=True)
class MagicPig(Method):
    """SimHash with `bits` bits in each of `tables` tables, keys centred. A key is sampled if its bucket is the query's
    in two tables or more; its weight is divided by the probability of that, 1 - (1-p^K)^L - L p^K (1-p^K)^(L-1) with
    p = 1 - angle / pi, which makes the sums of the softmax unbiased (Chen et al. 2024, arXiv 2410.16179).

    Every query head samples for itself; a KV head reads the union. Counted: the entries of the buckets looked at, 4
    bytes each, and the sampled keys and values.

    Attributes:
        bits, tables: K and L, 10 and 150 in the paper; 0 chooses, over the observation window's queries, the largest
            sample within the budget, with at most 64 tables.
    """

    title: ClassVar[str] = "MagicPIG"
    paper: ClassVar[str] = "Chen et al. 2024, arXiv 2410.16179"
    bits: int = 0
    tables: int = 0
    seed: int = 0

    def settings(self, budget: float) -> float:
        return budget

    def prepare(self, layers: Sequence[LayerContext], settings: float) -> list[Tables]:
        bits, tables = self._fit(layers, settings)
        return [self.build(layer, bits, tables) for layer in layers]

    def build(self, layer: LayerContext, bits: int, tables: int) -> Tables:
        device, dim = layer.keys.device, layer.keys.shape[-1]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + layer.layer)
        planes = torch.randn(dim, tables * bits, generator=generator).to(device)
        directions, centre = _directions(layer)
        codes = _codes(directions, planes, bits).permute(2, 0, 1).contiguous()
        return Tables(planes, codes, centre, directions, bits)

    def _fit(self, layers: Sequence[LayerContext], budget: float) -> tuple[int, int]:
        """The tables whose expected bytes, over all layers, come closest to the budget from below."""
        given = [self.bits] if self.bits else _BITS, [self.tables] if self.tables else _TABLES
        candidates = list(itertools.product(*given))
        if len(candidates) == 1:
            return candidates[0]
        expected = torch.zeros(len(candidates), dtype=torch.float64)
        for layer in layers[:: max(1, len(layers) // 8)]:
            directions, _ = _directions(layer)
            query = layer.queries[:, -16:].float().view(layer.kv_heads, 1, -1, 16, layer.keys.shape[-1])
            closeness = collision(torch.nn.functional.normalize(query, dim=-1), directions).double()
            costs = []
            for bits, tables in candidates:
                hit = closeness**bits
                read = 1 - (1 - sampling(hit, tables)).prod(2)
                entries = tables * hit.sum(2)
                cost = 2 * layer.row_bytes * read + _ENTRY * entries
                costs.append(cost.sum((0, 1, 3)).mean())
            always = 2 * layer.kv_heads * (layer.sinks + layer.window) * layer.row_bytes
            expected += (torch.stack(costs).cpu() + always) / layer.full_bytes
        expected /= len(layers[:: max(1, len(layers) // 8)])
        within = [i for i, cost in enumerate(expected.tolist()) if cost <= budget]
        best = max(within, key=lambda i: float(expected[i])) if within else int(expected.argmin())
        return candidates[best]

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        if min(asked.budgets) >= 1:
            return Choice(kept=None)
        direction = torch.nn.functional.normalize(asked.query.float(), dim=-1)
        heads, shape = layer.kv_heads, direction.shape[:-1]
        codes = _codes(direction.reshape(heads, -1, direction.shape[-1]), state.planes, state.bits)
        counting = torch.uint8 if codes.shape[-1] < 256 else torch.int16
        found = torch.zeros(heads, codes.shape[1], layer.count, dtype=counting, device=codes.device)
        step = max(1, _MATCHES // found.numel())
        for first in range(0, codes.shape[-1], step):
            some = slice(first, first + step)
            matches = codes.permute(2, 0, 1)[some].unsqueeze(-1) == state.codes[some].unsqueeze(2)
            found += matches.sum(0, dtype=counting)
        found = found.view(*shape, layer.count)
        closeness = collision(direction, state.directions)
        chance = sampling(closeness**state.bits, codes.shape[-1]).clamp_(min=1e-9)
        entries = found.sum((0, 2, 4), dtype=torch.float64)
        return Choice(found >= 2, _ENTRY * entries, log_weights=chance.log_().neg_())


def _directions(layer: LayerContext) -> tuple[Tensor, Tensor]:
    keys = layer.inner_keys.float()
    centre = keys.mean(1, keepdim=True)
    return torch.nn.functional.normalize(keys - centre, dim=-1), centre


def _codes(directions: Tensor, planes: Tensor, bits: int) -> Tensor:
    """Bucket numbers [H, R, tables] int16 of directions [H, R, D]."""
    sides = (directions @ planes > 0).unflatten(-1, (-1, bits))
    return (sides * (2 ** torch.arange(bits, device=planes.device))).sum(-1).short()


def collision(query: Tensor, keys: Tensor) -> Tensor:
    """Probability that a random hyperplane leaves query and key on one side: [Hk, B, G, M, n]. All of length 1."""
    cosine = scaled_products(query, keys, 1.0).clamp_(-1, 1)
    return cosine.acos_().div_(-math.pi).add_(1)


def sampling(hit: Tensor, tables: int) -> Tensor:
    """Probability of at least two hits in that many tables, each with probability `hit`."""
    miss = 1 - hit
    return 1 - miss**tables - tables * hit * miss ** (tables - 1)
