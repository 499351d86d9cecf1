"""Thresholds keep the share of keys that was asked for, on the queries that calibrated them."""

from __future__ import annotations

import math

import pytest
import torch

from squeezed.calibration import ThresholdCurves, calibrate
from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.ops import chain, reference
from squeezed.ops.layout import ClusteredKeys

SCALE = 0.25


def layers(levels: int) -> list[ClusteredKeys]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for sharpness in (0.5, 3.0):  # layers that need very different shares of their keys
        keys = sharpness * torch.randn(2, 1224, 16, generator=generator)
        made.append(cluster_layer(keys, torch.randn(keys.shape), BuildConfig(clusters=0.2, levels=levels, window=20)))
    return made


def queries() -> torch.Tensor:
    return torch.randn(4, 128, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 64])
@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.62, 0.7, 0.9, 0.97])
def test_the_asked_share_is_dropped(levels: int, count: int, sparsity: float) -> None:
    made, query = layers(levels), queries()
    curves = calibrate(made, [[query], [query]], [SCALE, SCALE])
    blocks = query.unflatten(1, (128 // count, count)).transpose(0, 1)
    shares = []
    for layer in made:
        _, _, kept = chain.attend_fixed(reference, blocks, layer, curves.at(sparsity, count), layer.tokens, SCALE)
        shares.append(1 - float(kept[0].float().mean()) / layer.clustered)
    assert sum(shares) / 2 == pytest.approx(sparsity, abs=0.03)


def test_before_calibration_nothing_is_dropped_whatever_is_asked() -> None:
    for levels in (1, 2, 3):
        assert ThresholdCurves.keep_everything(levels).at(0.6, 1) == (-math.inf,) * levels


def test_one_threshold_lets_a_flat_layer_keep_more_than_a_sharp_one() -> None:
    made, query = layers(1), queries()
    curves = calibrate(made, [[query], [query]], [SCALE, SCALE])
    kept = [
        chain.attend_fixed(
            reference, query.transpose(0, 1).unsqueeze(2), layer, curves.at(0.9, 1), layer.tokens, SCALE
        )[2]
        for layer in made
    ]
    assert abs(float(kept[0].float().mean()) - float(kept[1].float().mean())) > 0.02 * made[0].clustered


def test_curves_cover_the_whole_range_and_rise() -> None:
    made, query = layers(1), queries()
    curves = calibrate(made, [[query], [query]], [SCALE, SCALE])
    assert curves.at(0.0, 1) == (-math.inf,)
    assert curves.at(1.0, 1) == (math.inf,)
    for count in (1, 2, 7, 64, 500):
        values = [curves.at(i / 200, count)[0] for i in range(201)]
        assert values == sorted(values)


def test_between_two_numbers_of_queries_the_threshold_lies_between() -> None:
    curves = ThresholdCurves(
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),
        torch.tensor([1, 4]),
        torch.tensor([[[-math.inf, -8.0, math.inf], [-math.inf, -6.0, math.inf]]], dtype=torch.float64),
    )
    assert curves.at(0.5, 1) == (-8.0,)
    assert curves.at(0.5, 2) == pytest.approx((-7.0,))
    assert curves.at(0.5, 4) == (-6.0,)
    assert curves.at(0.5, 99) == (-6.0,)


def test_padding_in_eight_bits_disturbs_nothing() -> None:
    # One head has few keys to tell apart, so that most of its clusters are empty. Its channels lie far from 0, where
    # padding is stored as the far end of each channel's range: hundreds of logits above every real cluster.
    torch.manual_seed(5)
    keys = torch.randn(2, 600, 16) + 40 * torch.randn(2, 1, 16)
    keys[1] = keys[1, :7].repeat(86, 1)[:600]
    layer = cluster_layer(keys, torch.randn_like(keys), BuildConfig(clusters=0.1, window=20, centroid_bits=8))
    assert (layer.levels[0].sizes[1] == 0).any()
    asked = 150 * torch.randn(4, 1000, 16)
    curves = calibrate([layer], [[asked]], [1.0])
    assert not curves.log_thresholds.isnan().any()
    # The other head, whose thresholds these are too, is as it is alone.
    blocks = asked.transpose(0, 1).unsqueeze(2)
    _, _, kept = chain.attend_fixed(reference, blocks, layer, curves.at(0.9, 1), layer.tokens, 1.0)
    assert float(kept[0].float().mean()) / layer.clustered == pytest.approx(0.1, abs=0.05)
