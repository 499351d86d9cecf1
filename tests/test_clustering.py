"""What holds for the clusters of a layer, and how good they are."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from squeezed import clustering
from squeezed.clustering import cluster_layer, kmeans
from squeezed.config import BuildConfig
from squeezed.errors import InputError

HEADS, TOKENS, DIM = 3, 620, 16


def keys_with_structure(tokens: int = TOKENS, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(HEADS, 40, dim, generator=generator)
    chosen = torch.randint(0, 40, (HEADS, tokens), generator=generator)
    noise = 0.4 * torch.randn(HEADS, tokens, dim, generator=generator)
    return centres.gather(1, chosen.unsqueeze(-1).expand(-1, -1, dim)) + noise


def inertia(rows: Tensor, labels: Tensor) -> float:
    """Sum of 1 - cosine to the normalised mean direction of each row's cluster."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    total = 0.0
    for head in range(rows.shape[0]):
        for label in labels[head].unique():
            members = unit[head, labels[head] == label]
            total += float((1 - members @ torch.nn.functional.normalize(members.mean(0), dim=0)).sum())
    return total


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_layout_holds_every_key_once_and_levels_nest(levels: int, sinks: int) -> None:
    keys = keys_with_structure()
    keys[1, sinks:520] = keys[1, 5:6]  # a head with a single distinct key: one cluster must remain, none empty
    values = torch.randn(keys.shape)
    config = BuildConfig(clusters=0.2, levels=levels, window=100, sinks=sinks, centroid_bits=16)
    made = cluster_layer(keys, values, config)
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
            assert int(level.offsets[head, -1]) == (
                made.clustered if number == 0 else int((made.levels[number - 1].sizes[head] > 0).sum())
            )
            first = 0
            for cluster in range(count):
                last = first + int(level.sizes[head, cluster])
                expected = made.keys[head, first:last].mean(0)
                torch.testing.assert_close(level.centroids[head, cluster], expected, rtol=1e-4, atol=1e-5)
                assert level.spread is not None
                assert level.values is not None
                mean_value = made.values[head, first:last].mean(0)
                torch.testing.assert_close(level.values[head, cluster], mean_value, rtol=1e-4, atol=1e-5)
                variance = (made.keys[head, first:last] - expected).square().mean()
                torch.testing.assert_close(level.spread[head, cluster], variance, rtol=1e-3, atol=1e-6)
                first = last
    assert int((made.levels[0].sizes[1] > 0).sum()) == 1


def test_clusters_are_the_same_every_time() -> None:
    keys = keys_with_structure()
    assert torch.equal(kmeans(keys, 50), kmeans(keys.clone(), 50))


def test_inertia_is_near_that_of_scikit_learn() -> None:
    keys = keys_with_structure(1500, 32)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    theirs = torch.stack(
        [
            torch.from_numpy(KMeans(75, n_init=1, random_state=0).fit_predict(unit[head].numpy())).long()
            for head in range(HEADS)
        ]
    )
    assert inertia(keys, kmeans(keys, 75)) < 1.05 * inertia(keys, theirs)


def test_coarse_to_fine_is_nearly_as_good_as_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_with_structure(3000, 32)
    flat = kmeans(keys, 150)
    monkeypatch.setattr(clustering, "_FLAT_CLUSTERS", 100)
    fine = kmeans(keys, 150)
    assert int(fine.max()) < 150
    assert not torch.equal(flat, fine)
    assert inertia(keys, fine) < 1.1 * inertia(keys, flat)


def test_more_clusters_than_keys_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="clusters is"):
        BuildConfig(clusters=1.5)
    assert BuildConfig(clusters=1.0).clusters_of(7) == 7
    assert BuildConfig().clusters_of(7) == 1
    assert BuildConfig().clusters_of(100_000) == 5_000
