"""Clustering as queries feel it: keys that no query tells apart share a cluster."""

from __future__ import annotations

import torch

from squeezed.clustering import cluster_layer
from squeezed.config import BuildConfig
from squeezed.query_metric import add_moment, factor

HEADS, GROUP, TOKENS, DIM = 2, 3, 1200, 16


def test_the_factor_gives_the_mean_squared_difference_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS * GROUP, 5000, DIM, generator=generator) * torch.linspace(0.1, 3, DIM)
    moment = add_moment(add_moment(None, query[:, :, :2000], HEADS), query[:, :, 2000:], HEADS)
    linear = factor(moment, GROUP * 5000)
    difference = torch.randn(HEADS, 7, DIM, generator=generator)
    grouped = query[0].reshape(HEADS, -1, DIM)
    felt = (difference @ grouped.transpose(1, 2)).square().mean(-1)
    distance = (difference @ linear).square().sum(-1)
    ratio = felt / distance
    assert torch.allclose(linear, linear.tril())
    for head in range(HEADS):  # up to one factor for the head, and the ridge
        assert float(ratio[head].max() / ratio[head].min()) < 1.1


def test_few_queries_leave_distances_nearly_euclidean() -> None:
    query = torch.zeros(1, HEADS, 2, DIM)
    query[..., 0] = 1.0
    linear = factor(add_moment(None, query, HEADS), 2)
    squares = (linear @ linear.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    assert float(squares.max() / squares.min()) < 1.3


def test_clusters_ignore_what_no_query_sees() -> None:
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

    assert error(linear) < 0.1 * error(None)
