"""`squeeze extend`: adds files to a context that `squeeze ask` then knows, or says in one line why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.context import FixedContext


@pytest.fixture
def squeeze(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_squeeze: tiny.Run,
) -> tiny.Run:
    """The command in a folder with a model and the texts a.txt, b.txt and c.txt: exit status and both outputs."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for number, name in enumerate(("a.txt", "b.txt", "c.txt")):
        (tmp_path / name).write_text(tiny.text(300, seed=number))
    monkeypatch.chdir(tmp_path)
    return run_squeeze


def test_files_are_added_and_can_be_asked_about(squeeze: tiny.Run, tmp_path: Path) -> None:
    assert squeeze("build", "model", "a.txt", "-o", "book", "--window", 24)[0] == 0
    before = FixedContext.load(tmp_path / "book")
    status, _, said = squeeze("extend", "book", "b.txt", "c.txt")
    assert status == 0
    after = FixedContext.load(tmp_path / "book")
    assert f"{after.tokens - before.tokens:,} tokens added" in said
    assert f"now {after.tokens:,}" in said
    assert "peak memory" in said
    timed = next(line for line in said.splitlines() if line.startswith("seconds: "))
    assert all(stage in timed for stage in ("prefill", "cluster", "questions", "save", "calibrate", "measure"))
    assert "building it again would pay" not in said
    assert after.tokens == before.tokens + after.extensions[0]
    assert [part.name for part in after.parts] == ["a.txt", "b.txt", "c.txt"]
    assert squeeze("ask", "book", "Who?", "--max-new-tokens", 2)[0] == 0
    status, out, _ = squeeze("inspect", "book", "--json")
    assert status == 0
    assert json.loads(out)["extensions"] == list(after.extensions)


def test_it_is_said_when_building_again_would_pay(squeeze: tiny.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert squeeze("build", "model", "a.txt", "-o", "book", "--window", 24)[0] == 0
    monkeypatch.setattr("squeezed.extension._MANY_CLUSTERS", 0.1)
    assert "building it again would pay: it has" in squeeze("extend", "book", "b.txt")[2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere", "b.txt"), "not a fixed context"),
        (("book", "missing.txt"), "missing.txt does not exist"),
        (("book", "empty.txt"), "empty.txt is empty"),
        (("book", "long.txt"), "more than fit"),
        (("book", "b.txt", "--model", "other"), "another model"),
        (("book", "b.txt", "--dtype", "bfloat16"), "built in float32"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(
    arguments: tuple[str, ...], reason: str, squeeze: tiny.Run, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert squeeze("build", "model", "a.txt", "-o", "book", "--window", 24)[0] == 0
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text(tiny.text(9000))
    before = {path.name: path.read_bytes() for path in (tmp_path / "book").iterdir()}
    names = sorted(path.name for path in tmp_path.iterdir())
    status, _, said = squeeze("extend", *arguments)
    assert status == 2
    complaint = [line for line in said.splitlines() if line.startswith("squeeze: ")]
    assert len(complaint) == 1
    assert reason in complaint[0]
    assert "Traceback" not in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "book").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_damaged_context_is_not_extended(squeeze: tiny.Run, tmp_path: Path) -> None:
    assert squeeze("build", "model", "a.txt", "-o", "book", "--window", 24)[0] == 0
    path = tmp_path / "book" / "layer-001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    status, _, said = squeeze("extend", "book", "b.txt")
    assert status == 2
    assert "layer-001.safetensors is damaged" in said.replace("\n", " ")
