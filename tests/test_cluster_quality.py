"""What the quality of clusters is judged by."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from squeezed.bench.cluster_quality import QualityCase, _model_keys, attention_found, judge_clusters
from squeezed.errors import InputError

IDS = [(7 * i) % 23 for i in range(1100)]


def test_clusters_of_one_key_each_find_the_largest_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(2, n, 8, generator=generator) for n in (200, 3))
    labels = torch.arange(200).expand(2, -1)
    weights = (queries @ keys.transpose(1, 2)).softmax(-1)
    expected = weights.sort(dim=-1, descending=True).values[..., :20].sum(-1).mean()
    assert attention_found(keys, labels, queries, 1.0) == pytest.approx(float(expected), rel=1e-5)
    assert attention_found(keys, labels % 50, queries, 1.0, kept=1.0) == pytest.approx(1.0, rel=1e-5)
    assert attention_found(keys, labels % 50, queries, 1.0) < float(expected)


def test_pieces_are_moved_to_their_places(llama: PreTrainedModel) -> None:
    """The first layer's keys depend on nothing but the token and its place."""
    whole, _ = _model_keys(llama, IDS, QualityCase(layers=(0,)))[0]
    pieces, queries = _model_keys(llama, IDS, QualityCase(layers=(0,), windows=2))[0]
    assert pieces.shape[1] == whole.shape[1] - 4  # the second piece's sinks
    torch.testing.assert_close(pieces[:, :546], whole[:, :546])
    torch.testing.assert_close(pieces[:, 546:], whole[:, 550:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(queries, _model_keys(llama, IDS, QualityCase(layers=(0,)))[0][1], rtol=1e-3, atol=1e-4)


def test_every_way_to_cluster_is_judged(llama: PreTrainedModel) -> None:
    rows = list(judge_clusters(llama, IDS, QualityCase(0.1, (0, 1))))
    assert [row["way"] for row in rows] == 2 * ["scikit-learn", "every cluster compared", "squeezed"]
    assert all(row["keys"] == 840 and row["clusters"] == 84 for row in rows)
    assert rows[0]["sum"] == rows[3]["sum"] == 1.0
    assert all(row["sum"] < 1.02 and 0 < row["attention"] < 1 for row in rows)


def test_what_can_not_be_judged_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="layer 70 has no keys"):
        list(judge_clusters(llama, IDS, QualityCase(layers=(70,))))
    with pytest.raises(InputError, match="has 1100 tokens: expected at least 512 for each of 3 windows"):
        list(judge_clusters(llama, IDS, QualityCase(windows=3)))
    with pytest.raises(InputError, match="clusters is 0"):
        QualityCase(clusters=0)
