"""Keys at random: what a budget is worth without any choosing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method, per_row

_MODULUS = 2**31 - 1


@dataclass(frozen=True)
class Random(Method):
    """Every query token reads another random subset per KV head. The draw is a function of seed, layer, head, key and
    place, so that a token reads the same keys however it is batched."""

    title: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline; no paper"
    seed: int = 0

    def prepare_layer(self, layer: LayerContext, settings: None) -> Tensor:
        """[Hk, n] int64, the part of the draw that does not depend on the query."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + layer.layer)
        return torch.randint(1, _MODULUS, (layer.kv_heads, layer.count), generator=generator).to(layer.keys.device)

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer = asked.layer
        # Multiplying by a number of the place scatters a head's keys anew for each token, modulo a prime.
        factor = (asked.places * 48_271 + 16_807) % _MODULUS
        draw = (state[:, None, None, None] * factor[None, :, None, :, None]) % _MODULUS
        shares = [layer.affordable(budget, 0) / layer.count for budget in asked.budgets]
        limit = per_row([int(share * _MODULUS) + (share == 1) for share in shares], draw.device)
        return Choice(draw < limit)
