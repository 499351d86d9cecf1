"""What holds for the clusters of a layer, and how good they are."""

from __future__ import annotations

import logging
import os
from itertools import pairwise

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from squeezed.clustering import batched_kmeans, cluster_layer, inertia, kmeans, steps
from squeezed.clustering.layout import find_clusters, join_runs
from squeezed.config import BuildConfig
from squeezed.errors import InputError

HEADS, TOKENS, DIM = 3, 620, 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(function):
    """Kernels, in Triton's interpreter or on a CUDA device."""
    if INTERPRETED:
        return function
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(function))


def keys_with_structure(tokens: int = TOKENS, dim: int = DIM, topics: int = 40) -> Tensor:
    """Keys that scatter around topics; neighbours in the text often share one."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(HEADS, topics, dim, generator=generator)
    chosen = torch.randint(0, topics, (HEADS, tokens // 3 + 1), generator=generator).repeat_interleave(3, 1)[:, :tokens]
    noise = 0.4 * torch.randn(HEADS, tokens, dim, generator=generator)
    return centres.gather(1, chosen.unsqueeze(-1).expand(-1, -1, dim)) + noise


def normalised(rows: Tensor, metric: str) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1) if metric == "cosine" else rows


def of_scikit_learn(rows: Tensor, clusters: int, metric: str) -> Tensor:
    return torch.stack(
        [
            torch.from_numpy(KMeans(clusters, n_init=1, random_state=0).fit_predict(head.numpy())).long()
            for head in normalised(rows, metric)
        ]
    )


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_layout_holds_every_key_once_and_levels_nest(levels: int, sinks: int) -> None:
    keys = keys_with_structure()
    keys[1, sinks:520] = keys[1, 5:6]  # a head with a single distinct key: one cluster must remain, none empty
    values = torch.randn(keys.shape)
    made = cluster_layer(
        keys, values, BuildConfig(clusters=0.2, levels=levels, window=100, sinks=sinks, centroid_bits=16)
    )
    assert made.clustered == TOKENS - 100 - sinks
    for head in range(HEADS):
        positions = made.positions[head].long()
        assert torch.equal(positions.sort().values, torch.arange(sinks, TOKENS - 100))
        assert torch.equal(made.keys[head, : made.clustered], keys[head, positions])
        assert torch.equal(made.values[head, : made.clustered], values[head, positions])
        always = torch.cat([keys[head, :sinks], keys[head, TOKENS - 100 :]])
        assert torch.equal(made.keys[head, made.clustered :], always)
        for number, level in enumerate(made.levels):
            count = int((level.sizes[head] > 0).sum())
            assert (level.sizes[head, :count] > 0).all()
            assert int(level.sizes[head].sum()) == made.clustered
            children = made.clustered if number == 0 else int((made.levels[number - 1].sizes[head] > 0).sum())
            assert int(level.offsets[head, count]) == int(level.offsets[head, -1]) == children
            first = 0
            for cluster in range(count):
                last = first + int(level.sizes[head, cluster])
                expected = made.keys[head, first:last].mean(0)
                torch.testing.assert_close(level.centroids[head, cluster], expected, rtol=1e-4, atol=1e-5)
                assert level.spread is not None
                assert level.values is not None
                torch.testing.assert_close(
                    level.values[head, cluster], made.values[head, first:last].mean(0), rtol=1e-4, atol=1e-5
                )
                variance = (made.keys[head, first:last] - expected).square().mean()
                torch.testing.assert_close(level.spread[head, cluster], variance, rtol=1e-3, atol=1e-6)
                if number > 0:
                    own = slice(int(level.offsets[head, cluster]), int(level.offsets[head, cluster + 1]))
                    assert int(made.levels[number - 1].sizes[head, own].sum()) == last - first
                first = last
    assert int((made.levels[0].sizes[1] > 0).sum()) == 1


def test_clusters_are_the_same_every_time() -> None:
    keys = keys_with_structure()
    assert torch.equal(kmeans(keys, 50), kmeans(keys.clone(), 50))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("clusters", [75, 300])
def test_inertia_is_at_most_2_percent_above_that_of_scikit_learn(metric: str, clusters: int) -> None:
    keys = 3 * keys_with_structure(1500, 32) + 100 * torch.arange(32)  # far from the origin, as biases put real keys
    if metric == "cosine":
        keys -= 100 * torch.arange(32)
    ours = inertia(keys, kmeans(keys, clusters, metric=metric), metric).sum()
    assert ours < 1.02 * inertia(keys, of_scikit_learn(keys, clusters, metric), metric).sum()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_topics_that_no_seed_meets_are_found(metric: str) -> None:
    """Few seeds, rare topics, keys in no order: what seeds at even distances alone would miss."""
    generator = torch.Generator().manual_seed(3)
    topics = torch.randn(2, 100, 16, generator=generator)
    chosen = torch.randint(0, 100, (2, 2000), generator=generator).unsqueeze(-1).expand(-1, -1, 16)
    keys = topics.gather(1, chosen) + 0.05 * torch.randn(2, 2000, 16, generator=generator)
    ours = inertia(keys, kmeans(keys, 100, metric=metric), metric).sum()
    assert ours < 1.02 * inertia(keys, of_scikit_learn(keys, 100, metric), metric).sum()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_keys_are_clustered_in_the_space_that_is_given(metric: str) -> None:
    keys = keys_with_structure(800) + 5
    space = torch.randn(HEADS, DIM, DIM, generator=torch.Generator().manual_seed(2)) * torch.arange(DIM)
    there = inertia(keys @ space, kmeans(keys, 60, metric=metric, space=space), metric).sum()
    assert there < 1.02 * inertia(keys @ space, of_scikit_learn(keys @ space, 60, metric), metric).sum()
    assert there < 0.95 * inertia(keys @ space, kmeans(keys, 60, metric=metric), metric).sum()


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="metric is 'manhattan': expected one of cosine, euclidean"):
        kmeans(keys_with_structure(), 5, metric="manhattan")


def test_neighbourhoods_are_nearly_as_good_as_comparing_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_with_structure(6000, 32, 500)
    labels = {}
    for name, candidates, exact in (("all", 10**6, 10**6), ("near", 128, 10**6), ("near from the start", 128, 256)):
        monkeypatch.setattr(batched_kmeans, "_CANDIDATES", candidates)
        monkeypatch.setattr(batched_kmeans, "_EXACT", exact)
        monkeypatch.setattr(batched_kmeans, "_EXACT_GROUP", 32)
        labels[name] = kmeans(keys, 600)
        assert int(labels[name].max()) < 600
    assert not torch.equal(labels["all"], labels["near"])
    assert not torch.equal(labels["near from the start"], labels["near"])
    best = inertia(keys, labels["all"]).sum()
    assert inertia(keys, labels["near"]).sum() < 1.01 * best
    assert inertia(keys, labels["near from the start"]).sum() < 1.03 * best


def test_an_exchange_lowers_the_sum_of_squared_distances() -> None:
    rows = torch.nn.functional.normalize(keys_with_structure(500), dim=-1)
    labels = torch.randint(0, 40, (HEADS, 500), generator=torch.Generator().manual_seed(0))
    squares = rows.square().sum(-1)
    sums = [float(inertia(rows, labels).sum())]
    for phase in (0, 1, 0, 1, 0, 1):
        order, offsets = batched_kmeans._sorted(labels, 40)
        centres = batched_kmeans._centres(rows, order, offsets, None)
        buckets = steps.Buckets(order, torch.tensor([[0, 500]]).expand(HEADS, -1), None)
        labels = steps.exchange(rows, squares, labels, centres, buckets, phase)
        sums.append(float(inertia(rows, labels).sum()))
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < 0.9 * sums[0]


def test_padding_rows_do_not_move_a_centre() -> None:
    rows = keys_with_structure(300)
    padded = torch.cat([rows, torch.zeros(HEADS, 60, DIM)], dim=1)
    weights = torch.cat([torch.ones(HEADS, 300), torch.zeros(HEADS, 60)], dim=1)
    labels = kmeans(padded, 30, weights=weights)[:, :300]
    assert inertia(rows, labels).sum() < 1.03 * inertia(rows, kmeans(rows, 30)).sum()


def test_runs_found_at_different_times_lie_behind_one_another() -> None:
    earlier = torch.tensor([[3, 2, 0], [1, 1, 3]])
    later = torch.tensor([[4, 0], [2, 2]])
    assert join_runs(earlier, later).tolist() == [[3, 2, 4, 0, 0], [1, 1, 3, 2, 2]]


def test_coarse_clusters_hold_whole_finer_ones() -> None:
    keys = keys_with_structure(900)
    order, runs = find_clusters(keys, BuildConfig(levels=3), 200)
    assert torch.equal(order.sort(dim=1).values, torch.arange(900).expand(HEADS, -1))
    for finer, coarser in pairwise(runs):
        assert 1 < coarser.shape[1] <= round(finer.shape[1] / 4)
        for head in range(HEADS):
            ends = set(finer[head].cumsum(0).tolist())
            assert set(coarser[head].cumsum(0).tolist()) <= ends


def test_a_gpu_that_runs_out_of_memory_takes_fewer_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys, real = keys_with_structure(), batched_kmeans._kmeans
    expected = kmeans(keys, 20)

    def small_memory(vectors: Tensor, *args: object) -> Tensor:
        if vectors.shape[0] > 1:
            raise torch.OutOfMemoryError
        return real(vectors, *args)

    monkeypatch.setattr(batched_kmeans, "_kmeans", small_memory)
    with caplog.at_level(logging.WARNING):
        found = kmeans(keys, 20)
    # Heads that are clustered together settle together.
    assert inertia(keys, found).sum() == pytest.approx(float(inertia(keys, expected).sum()), rel=0.01)
    assert "1 heads at a time" in caplog.text
    monkeypatch.setattr(batched_kmeans, "_kmeans", lambda *args: small_memory(keys))
    with pytest.raises(InputError, match="too small to cluster 620 keys of one head"):
        kmeans(keys, 20)


def test_more_clusters_than_keys_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="clusters is"):
        BuildConfig(clusters=1.5)
    assert BuildConfig(clusters=1.0).clusters_of(7) == 7
    assert BuildConfig().clusters_of(7) == 2
    assert BuildConfig().clusters_of(100_000) == 5_000


@on_device
@pytest.mark.parametrize(("heads", "n", "dim", "clusters"), [(2, 700, 16, 150), (1, 500, 80, 200), (3, 300, 64, 40)])
def test_the_kernels_do_what_the_steps_define(heads: int, n: int, dim: int, clusters: int) -> None:
    from squeezed.clustering import triton

    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(heads, n, dim, generator=generator), dim=-1)
    if DEVICE == "cuda":
        rows = rows.half().float()
    squares, weights = rows.square().sum(-1), torch.rand(heads, n, generator=generator)
    labels = torch.randint(0, clusters - 5, (heads, n), generator=generator)  # the last are empty
    order, offsets = batched_kmeans._sorted(labels, clusters)
    groups = batched_kmeans._group(batched_kmeans._centres(rows, order, offsets, None), 16, 48)
    labels = groups.number.gather(1, labels)
    order, offsets = batched_kmeans._sorted(labels, clusters)
    centres = batched_kmeans._centres(rows, order, offsets, None)
    buckets = steps.Buckets(order, offsets.gather(1, groups.starts), groups.candidates)

    def there(part: object) -> object:
        """On the device, rows in its precision."""
        if isinstance(part, tuple):
            return type(part)(*(there(item) for item in part))
        return part.to(DEVICE) if isinstance(part, Tensor) else part

    exact = rows.to(DEVICE) if DEVICE == "cpu" else rows.to(DEVICE).half()
    for way in (None, weights):
        means = triton.run_means(exact, there(order), there(offsets), None if way is None else there(way))
        torch.testing.assert_close(means.cpu(), steps.run_means(rows, order, offsets, way), rtol=1e-5, atol=1e-6)
    ordered = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
    means = steps.run_means(ordered, None, offsets)
    longer = torch.cat([ordered, ordered[:, :7]], dim=1).to(DEVICE)[:, :n]  # part of a larger store
    torch.testing.assert_close(triton.run_means(longer, None, there(offsets)).cpu(), means, rtol=1e-5, atol=1e-6)
    spread = triton.run_spread(longer, there(offsets), there(means)).cpu()
    torch.testing.assert_close(spread, steps.run_spread(ordered, offsets, means), rtol=1e-4, atol=1e-7)
    gain = triton.farthest(exact, there(squares), there(order), there(offsets), there(centres))[1]
    expected_gain = steps.farthest(rows, squares, order, offsets, centres)[1]
    torch.testing.assert_close(gain.cpu(), expected_gain, rtol=1e-3, atol=1e-4)
    others = steps.nearest_other(centres, None)
    itself = torch.arange(clusters).expand(heads, -1).contiguous()
    ones, sizes = torch.ones_like(centres.squares), centres.sizes
    arguments = (there(ones), there(steps.FAR * ones), None, 0, 1)
    found = triton.step(there(centres.rows), there(centres.squares), there(itself), there(centres), *arguments).cpu()
    assert (found != itself).all()
    assert (found != others)[sizes > 0].float().mean() <= (0.0 if DEVICE == "cpu" else 0.02)
    join, leave = sizes / (sizes + 1), torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), 0.0)
    join = torch.where(sizes > 0, join, 1.0)
    for name, weight, limit, where, phase, stride in (
        ("nearest of all", ones, None, None, 0, 1),
        ("nearest of the listed", ones, None, buckets, 0, 1),
        ("exchange, even", join, leave, buckets, 0, 2),
        ("exchange, odd", join, leave, buckets, 1, 2),
        ("exchange with all", join, leave, buckets._replace(candidates=None), 1, 2),
    ):
        arguments = (weight, limit, where, phase, stride)
        expected = steps._step(rows, squares, labels.clone(), centres, *arguments)
        found = triton.step(
            exact, there(squares), there(labels), there(centres), *(there(argument) for argument in arguments)
        ).cpu()
        # On a device products are of 16 bits: of two that are equally near either may be taken.
        assert (found != expected).float().mean() <= (0.0 if DEVICE == "cpu" else 0.02), name
        if limit is not None:
            assert (found != labels).any()
            assert (found == labels).float().mean() > 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_gpu_finds_clusters_as_good_as_the_cpus_and_always_the_same(metric: str) -> None:
    keys = keys_with_structure(20_000, 64, 2000)
    here = inertia(keys, kmeans(keys, 1000, metric=metric), metric).sum()
    there = kmeans(keys.cuda().bfloat16(), 1000, metric=metric)
    assert torch.equal(there, kmeans(keys.cuda().bfloat16(), 1000, metric=metric))
    assert inertia(keys, there.cpu(), metric).sum() < 1.01 * here
