"""Clustering as queries feel it: keys that no query tells apart share a cluster."""

from __future__ import annotations

import torch

from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.query_metric import add_moment, factor

HEADS, GROUP, TOKENS, DIM = 2, 3, 1200, 16


def test_distance_is_the_mean_squared_difference_of_logits_with_three_queries_in_thirteen_of_any_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS * GROUP, 5000, DIM, generator=generator) * torch.linspace(0.1, 3, DIM)
    moment = add_moment(add_moment(None, query[:, :, :2000], HEADS), query[:, :, 2000:], HEADS)
    linear = factor(moment, GROUP * 5000)
    difference = torch.randn(HEADS, 7, DIM, generator=generator)
    grouped = query[0].reshape(HEADS, -1, DIM)
    felt = (difference @ grouped.transpose(1, 2)).square().mean(-1) / grouped.square().mean(dim=(1, 2)).unsqueeze(-1)
    of_any_direction = difference.square().sum(-1)
    distance = (difference @ linear).square().sum(-1)
    assert torch.allclose(linear, linear.tril())
    assert torch.allclose(distance, (felt + 0.3 * of_any_direction) / 1.3, rtol=1e-3)


def test_few_queries_leave_distances_nearly_euclidean() -> None:
    query = torch.zeros(1, HEADS, 2, DIM)
    query[..., 0] = 1.0
    linear = factor(add_moment(None, query, HEADS), 2)
    squares = (linear @ linear.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    assert float(squares.max() / squares.min()) < 1.3


def test_clusters_heed_what_queries_see() -> None:
    generator = torch.Generator().manual_seed(1)
    seen = torch.zeros(DIM)
    seen[:4] = 1
    centres = 3 * torch.randn(HEADS, 40, DIM, generator=generator) * seen
    noise = torch.randn(HEADS, TOKENS, DIM, generator=generator)
    keys = centres[:, torch.randint(40, (TOKENS,), generator=generator)] + noise * (0.05 * seen + 4 * (1 - seen))
    query = torch.randn(1, HEADS * GROUP, 900, DIM, generator=generator) * (seen + 0.01)
    config = BuildConfig(clusters=40 / TOKENS, window=10, sinks=0, centroid_bits=16)
    linear = factor(add_moment(None, query, HEADS), GROUP * 900)

    def error(space: torch.Tensor | None) -> float:
        layer = cluster_layer(keys, keys, config, space=space)
        level = layer.levels[0]
        mean = torch.repeat_interleave(level.centroids[0], level.sizes[0].long(), 0)
        return float(((layer.keys[0, : layer.clustered] - mean) * seen).square().mean())

    assert error(linear) < 0.2 * error(None)


def test_no_direction_is_lost_because_the_text_never_asks_for_it() -> None:
    query = torch.randn(1, HEADS * GROUP, 900, DIM, generator=torch.Generator().manual_seed(2))
    query[..., 3] = 0.0
    linear = factor(add_moment(None, query, HEADS), GROUP * 900)
    step = torch.eye(DIM)[3].expand(HEADS, 1, DIM)
    assert torch.allclose((step @ linear).square().sum(-1), torch.tensor(0.3 / 1.3), rtol=1e-3)
