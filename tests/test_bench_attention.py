"""The attention benchmark times every case that is asked for, and draws them; its times are not tested."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

pytest.importorskip("triton")

from squeezed.attention import attend_fixed
from squeezed.bench.attention import Sweep, time_on_cpu
from squeezed.bench.device_attention import Case, calibrated_thresholds, mean_scores, relative_errors
from squeezed.bench.planted import Planted, copies, planted_context, planted_queries, with_clusters_copied
from squeezed.bench.plots import plot_speedups
from squeezed.cache import FixedLayer
from squeezed.config import PRESETS
from squeezed.errors import InputError
from squeezed.ops import reference
from squeezed.storage import store

SMALL = Planted(1500, 4, 2, 16, coarse_share=0.01, dtype=torch.float32)


def test_a_sweep_has_one_hierarchical_row_beside_those_of_one_level() -> None:
    assert Sweep.published().ways() == [(1, 0.7), (1, 0.9), (1, 0.95), (2, 0.9)]
    assert Sweep(sparsities=(0.7, 0.8), levels=(2,)).ways() == [(2, 0.7), (2, 0.8)]
    with pytest.raises(InputError, match="levels is 3"):
        Sweep(levels=(1, 3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": ((32, 5),)}, "equal groups"),
        ({"heads": ((0, 8),)}, "q-heads is 0"),
        ({"heads": ((32, 8), (32, 0))}, "kv-heads is 0"),
        ({"head_dim": 0}, "head-dim is 0"),
        ({"queries": (1, 0)}, "queries is 0"),
        ({"contexts": (10,)}, "at least 1000"),
    ],
)
def test_a_sweep_that_can_not_be_timed_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Sweep(**change)


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_every_case_gives_a_row_and_a_point_in_the_picture(preset: str, tmp_path: Path) -> None:
    asked = Sweep((1000, 2000), ((4, 2),), 16, (1, 5), (0.7, 0.9), (1, 2), preset=preset)
    rows = list(time_on_cpu(asked))
    assert [(row["context"], row["queries"], row["levels"], row["sparsity"]) for row in rows] == [
        (context, queries, *way)
        for context in (1000, 2000)
        for queries in (1, 5)
        for way in ((1, 0.7), (1, 0.9), (2, 0.9))
    ]
    assert all(0 < row["rel_error"] < 1 and 0 < row["kv_budget"] < 1 for row in rows)
    plot_speedups({"device": "cpu", "date": "today", "rows": rows}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_single_row_is_printed_in_words(run_squeeze: tiny.Run) -> None:
    options = ("--context", 1000, "--q-heads", 2, "--kv-heads", 1, "--head-dim", 16)
    status, out, _ = run_squeeze("bench", "attention", "--device", "cpu", *options)
    assert status == 0
    assert re.search(r"stages \(score [\d.e-]+,", out)
    assert not re.search(r"[{}']", out)


def test_further_layers_share_keys_and_have_clusters_of_their_own() -> None:
    own = [store(layer, PRESETS["best"]) for layer in copies(planted_context(SMALL, "cpu"), 2)]
    layers = with_clusters_copied(own, 5)
    assert [id(layer) for layer in layers[:2]] == [id(layer) for layer in own]
    assert all(layer.keys is own[i % 2].keys and layer.values is own[i % 2].values for i, layer in enumerate(layers))
    for depth in range(2):
        for part in ("centroids", "values", "sizes", "offsets"):
            found = [getattr(layer.levels[depth], part) for layer in layers]
            assert len({tensor.data_ptr() for tensor in found}) == 5
            assert all(tensor.equal(found[0]) for tensor in found)
    assert with_clusters_copied(own, 1) == own


def test_scores_taken_a_few_rows_at_a_time_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squeezed.bench.device_attention._LOGITS", 500)
    layer = planted_context(SMALL, "cpu")
    query = planted_queries(SMALL, layer, 1, 7, seed=2)
    level = layer.levels[0]
    allowed = torch.rand(level.sizes.shape) < 0.5
    expected = reference.score_centroids(query, level.centroids, level.sizes, 0.25, allowed[None])
    for head in range(2):
        rows = query[0, 2 * head : 2 * head + 2].reshape(-1, 16)
        found = mean_scores(rows, level.centroids[head], level.sizes[head], 0.25, allowed[head])
        torch.testing.assert_close(found.float(), expected[0, head], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("queries", [1, 6])
def test_thresholds_keep_what_is_asked_for_and_errors_are_those_of_selecting(levels: int, queries: int) -> None:
    shape = SMALL if levels == 2 else Planted(1500, 4, 2, 16, dtype=torch.float32)
    case = Case("", shape, queries, 0.8)
    layer = planted_context(shape, "cpu")
    thresholds = calibrated_thresholds(case, layer)
    query = planted_queries(shape, layer, 1, queries, seed=5)
    allowed = None
    for depth in reversed(range(levels)):
        level = layer.levels[depth]
        scores = reference.score_centroids(query, level.centroids, level.sizes, case.scale, allowed)
        selected = scores > thresholds[depth]
        if depth:
            allowed = reference.expand_to_children(selected, level.offsets, layer.levels[depth - 1].shape[1])
    kept = reference.kept_keys(selected, layer.levels[0].sizes).sum() / (2 * layer.clustered)
    assert kept == pytest.approx(0.2, abs=0.1)
    window = (layer.clustered, layer.tokens)
    output, _ = reference.attend_selected(
        query, layer.keys, layer.values, layer.levels[0].offsets, selected, window, case.scale
    )
    errors = relative_errors(case, query, layer, thresholds, output)
    assert errors["rel_error_same_selection"] < 1e-5 < errors["rel_error"] < 1


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("voters", [None, 3])
def test_what_is_timed_is_what_generation_attends_to(levels: int, voters: int | None) -> None:
    shape = SMALL if levels == 2 else Planted(1500, 4, 2, 16, dtype=torch.float32)
    case = Case("", shape, 40, 0.8, storage=replace(PRESETS["paper"], voters=voters), block=10)
    layer = planted_context(shape, "cpu")
    thresholds = calibrated_thresholds(case, layer)
    query = planted_queries(shape, layer, 1, 40, seed=5)
    fixed = FixedLayer(layer, case.selection(thresholds), layer.tokens)
    output, _ = attend_fixed(query, fixed, None, case.scale)
    assert len(fixed.reads) == 4
    assert fixed.usage().kept_fraction == pytest.approx(0.2, abs=0.1)
    errors = relative_errors(case, query, layer, thresholds, output)
    assert errors["rel_error_same_selection"] < 1e-5 < errors["rel_error"] < 1
