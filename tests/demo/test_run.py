"""The demo's run, with a tiny model in the place of its own: what it suggests can be copied."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.demo import run


def test_the_command_that_the_demo_suggests_can_be_copied(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manual, home = tmp_path / "manual.md", tmp_path / "my home"
    manual.write_text(tiny.text(2000))
    monkeypatch.setenv("SQUEEZED_HOME", str(home))
    monkeypatch.setattr(run, "demo_model", lambda: tmp_path)
    monkeypatch.setattr(run, "load_model", lambda name: (llama, tokenizer))
    monkeypatch.setattr(run, "manual_path", lambda: manual)
    monkeypatch.setattr(run, "questions", list)
    output = Console(file=StringIO(), width=60)
    run.run(0.9, output, Console(file=StringIO()))
    assert isinstance(output.file, StringIO)
    assert output.file.getvalue().endswith(f"squeeze ask '{home}/demo-context' QUESTION\n")
