"""The whole of it on a real model: SmolLM2, 2K tokens, `squeeze eval` as a user calls it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from squeezed.cli import main
from squeezed.evaluation.compare import compare_runs

pytestmark = pytest.mark.model


def squeeze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["squeeze", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 0


def test_smollm2_finds_needles_dense_and_squeezed_but_not_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ruler"
    words = ["eval", "ruler", "--model", "demo", "--length", 2048, "--samples", 1, "--tasks", "niah_single_1,vt"]
    squeeze(monkeypatch, *words, "--methods", "full,squeezed,random", "--budget", 0.25, "-o", folder)
    rows = json.loads((folder / "metrics.json").read_text())["lengths"]["2048"]["rows"]
    needles = {key: row["tasks"]["niah_single_1"]["mean"] for key, row in rows.items()}
    assert needles == {"full": 100.0, "squeezed@0.25": 100.0, "random@0.25": 0.0}
    assert rows["squeezed@0.25"]["kv_budget"] == pytest.approx(0.25, abs=0.04)
    assert rows["random@0.25"]["kv_budget"] == pytest.approx(0.25, abs=0.01)
    found = {one.second: one for one in compare_runs(folder, folder)}
    assert found["random@0.25"].difference < found["squeezed@0.25"].difference
    assert (folder / "accuracy.png").exists()


def test_squeezed_is_far_nearer_to_full_attention_than_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fidelity"
    words = ["eval", "fidelity", "--model", "demo", "--length", 1024, "--samples", 1, "--budget", 0.3]
    squeeze(monkeypatch, *words, "--methods", "full,squeezed,random", "-o", folder)
    rows = json.loads((folder / "metrics.json").read_text())["lengths"]["1024"]["rows"]
    assert rows["full"]["error"]["mean"] < 1e-4
    assert rows["squeezed@0.3"]["error"]["mean"] < 0.5 * rows["random@0.3"]["error"]["mean"]
    assert rows["squeezed@0.3"]["kl"]["mean"] < 0.5 * rows["random@0.3"]["kl"]["mean"]
