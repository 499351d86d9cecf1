"""The error curve of a context tells what its user gets: what is left out, and what 8 bits put on the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squeezed import ops
from squeezed.calibration import ThresholdCurves, calibrate
from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.errors import InputError
from squeezed.ops.layout import ClusteredKeys
from squeezed.quality import measure_errors, rounding_error
from squeezed.storage import to_eight_bits


def made(kv_heads: int, q_heads: int, head_dim: int, sinks: int) -> tuple[ClusteredKeys, Tensor, float]:
    """A layer with constant channels, and sinks that lie far off and take most of the weight, as models have them."""
    generator = torch.Generator().manual_seed(head_dim + sinks)
    keys = torch.randn(kv_heads, 700, head_dim, generator=generator) + 4 * torch.randn(head_dim, generator=generator)
    values = torch.randn(kv_heads, 700, head_dim, generator=generator)
    query = torch.randn(9, q_heads, head_dim, generator=generator)
    keys[:, :sinks] += 6 * torch.nn.functional.normalize(query.mean((0, 1)), dim=-1)
    config = BuildConfig(clusters=0.2, window=20, sinks=sinks, centroid_bits=16)
    return cluster_layer(keys, values, config), query, head_dim**-0.5


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("kv_heads", "q_heads", "head_dim"), [(1, 1, 64), (2, 6, 64), (1, 4, 128), (3, 3, 256)])
def test_what_rounding_costs_is_foretold_from_the_rounded_keys(
    kv_heads: int, q_heads: int, head_dim: int, sinks: int
) -> None:
    layer, query, scale = made(kv_heads, q_heads, head_dim, sinks)
    rounded = to_eight_bits(layer, keys_too=True, sinks=sinks)
    asked = query.unsqueeze(2)
    exact = ops.attend_fixed(asked, layer, None, layer.tokens, scale)[0][:, :, 0]
    output, lse, _ = (part[:, :, 0] for part in ops.attend_fixed(asked, rounded, None, layer.tokens, scale))
    foretold = rounding_error(query, rounded, output, lse, scale)
    assert foretold.shape == (9, q_heads)
    true = (output - exact).norm(dim=-1)
    assert float(foretold.mean()) == pytest.approx(float(true.mean()), rel=0.15)
    exact_lse = ops.attend_fixed(asked, layer, None, layer.tokens, scale)[1][:, :, 0]
    assert not rounding_error(query, layer, exact, exact_lse, scale).any()


def curves(layer: ClusteredKeys, query: Tensor, scale: float) -> ThresholdCurves:
    segments = [[query.transpose(0, 1).contiguous()]]
    found = calibrate([layer], segments, [scale])
    errors = measure_errors([layer], segments, [scale], found)
    return ThresholdCurves(found.sparsities, found.query_counts, found.log_thresholds, errors)


def test_an_error_is_that_of_leaving_out_and_of_rounding_together() -> None:
    layer, query, scale = made(2, 4, 64, 4)
    wide = curves(layer, query, scale)
    rounded = curves(to_eight_bits(layer, keys_too=True, sinks=4), query, scale)
    assert wide.errors is not None
    assert rounded.errors is not None
    assert wide.errors[0] == 0
    assert 0.001 < rounded.errors[0] < 0.05
    torch.testing.assert_close(rounded.errors[-1], wide.errors[-1], rtol=0.02, atol=0)
    assert (rounded.errors[1:] >= rounded.errors[:-1]).all()


def test_less_than_eight_bits_cost_can_not_be_had() -> None:
    layer, query, scale = made(2, 4, 64, 4)
    found = curves(to_eight_bits(layer, keys_too=True, sinks=4), query, scale)
    assert found.errors is not None
    least = float(found.errors[0])
    assert found.sparsity_for(least) < found.sparsity_for(2 * least) < 1
    with pytest.raises(InputError, match=r"keys in 8 bits put 0\.0\d+ on the output by themselves; ask for more"):
        found.sparsity_for(least / 2)
