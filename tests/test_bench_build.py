"""The build benchmark prepares what it is asked to, and counts the work; its times are not tested."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from squeezed.bench.build import BuildCase, time_build
from squeezed.cli import app
from squeezed.clustering.work import kmeans_work
from squeezed.config import BuildConfig
from squeezed.errors import InputError

STAGES = ["k-means", "layout", "levels", "storage", "second order", "calibration"]


def test_a_row_says_how_long_each_stage_took_and_what_it_held() -> None:
    case = BuildCase(3000, 4, 2, layers=2, head_dim=16, dtype=torch.float32, config=BuildConfig(clusters=0.1, levels=2))
    row = time_build(case, "cpu")
    assert list(row["stages"]) == STAGES
    assert list(row["peak_bytes"]) == STAGES
    assert row["seconds"] == pytest.approx(sum(row["stages"].values()))
    assert row["clusters"] == 290
    assert row["kv_bytes"] == 2 * 2 * 2 * 3000 * 16 * 4
    assert 0 < row["floor"]["share"] < 1


def test_work_grows_almost_linearly_with_the_text() -> None:
    work = {n: kmeans_work(n, 128, round(0.05 * n), 20) for n in (2**17, 2**18, 2**19, 2**20)}
    assert work[2**20][0] < 2.3**3 * work[2**17][0]
    assert work[2**20][1] == 8 * work[2**17][1]
    # Comparing with every cluster would take fifty times as much.
    assert 50 * work[2**20][0] < 20 * 2 * 2**20 * 0.05 * 2**20 * 128


def test_the_command_prints_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import squeezed.cli.bench  # noqa: F401  (registers the command)

    options = ["--context", "1500", "--context", "2000", "--layers", "1", "--q-heads", "2", "--kv-heads", "1"]
    result = CliRunner().invoke(app, ["bench", "build", "--device", "cpu", *options, "--head-dim", "16", "--json"])
    assert result.exit_code == 0
    run = json.loads(result.stdout)
    assert [row["context"] for row in run["rows"]] == [1500, 2000]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_heads": 5}, "equal groups"),
        ({"q_heads": 0}, "q-heads is 0"),
        ({"head_dim": 0}, "head-dim is 0"),
        ({"context": 10}, "at least 1000"),
        ({"layers": 0}, "layers"),
    ],
)
def test_what_can_not_be_built_is_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        BuildCase(**change)
