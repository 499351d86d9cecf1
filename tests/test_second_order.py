"""The coefficient of the second-order term: 1 where its assumption holds, 0 where queries see no scatter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squeezed.clustering import assemble, cluster_layer
from squeezed.config import BuildConfig
from squeezed.second_order import fit_spread
from squeezed.storage import to_eight_bits

HEADS, TOKENS, DIM, GROUP = 2, 3000, 32, 2
SCALE = DIM**-0.5


def scattered(seen: float) -> tuple[Tensor, Tensor]:
    """Keys around centres that lie in the first half of the dimensions, as do the queries.

    Half of all scatter is there if `seen` is 1, none if it is 0.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.ones(DIM)
    half[DIM // 2 :] = 0
    centres = 6 * torch.randn(HEADS, 60, DIM, generator=generator) * half
    keys = centres[:, torch.arange(TOKENS) % 60]
    keys = keys + torch.randn(keys.shape, generator=generator) * (seen * half + (1 - half))
    queries = torch.randn(HEADS * GROUP, 40, DIM, generator=generator) * half
    return keys, queries


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("seen", "expected"), [(1.0, 1.0), (0.0, 0.0)])
def test_the_coefficient_is_what_queries_see_of_the_scatter(
    seen: float, expected: float, bits: int, levels: int
) -> None:
    keys, queries = scattered(seen)
    labels = (torch.arange(TOKENS) % 60).expand(HEADS, -1)
    order = labels.argsort(dim=1, stable=True)
    runs = [torch.full((HEADS, count), TOKENS // count) for count in (60, 3)][:levels]
    laid_out = keys.gather(1, order.unsqueeze(-1).expand(-1, -1, DIM))
    layer = assemble(laid_out, laid_out, order.int(), runs, second_order=True)
    if bits == 8:
        layer = to_eight_bits(layer, keys_too=True)
    fitted = fit_spread(layer, queries, SCALE)
    before, after = layer.levels[0].spread, fitted.levels[0].spread
    assert before is not None
    assert after is not None
    coefficients = (after.sum(-1) / before.sum(-1)).tolist()
    assert coefficients == pytest.approx([expected] * HEADS, abs=0.2)


def test_a_layer_without_spread_stays_as_it_is() -> None:
    keys, queries = scattered(1.0)
    layer = cluster_layer(keys, keys, BuildConfig(clusters=0.02, window=10, second_order=False))
    assert fit_spread(layer, queries, SCALE) is layer
