"""`squeeze eval` and `squeeze compare` as a user types them: one line on bad input, files and tables on good."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.evaluation import harness


@pytest.fixture
def squeeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_squeeze: tiny.Run) -> tiny.Run:
    """Exit status, standard output and standard error of `squeeze ...`."""
    monkeypatch.chdir(tmp_path)
    return run_squeeze


@pytest.fixture(scope="module")
def model_folder(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense", "--model", "demo", "-o", "x"], "no suite 'nonsense'; choose among ruler"),
        (["fidelity", "--model", "demo", "-o", "x", "--methods", "quest,best"], "no method 'best'"),
        (["fidelity", "--model", "demo", "-o", "x", "--budget", "many"], "budget is 'many'"),
        (["fidelity", "--model", "demo", "-o", "x", "--budget", "2"], "budget is 2"),
        (["fidelity", "--model", "demo", "-o", "x", "--length", "4k"], "length is '4k'"),
        (["fidelity", "--model", "demo", "-o", "x", "--length", "64"], "length is 64"),
        (["fidelity", "--model", "demo", "-o", "x", "--workers", "0"], "workers is 0"),
        (["fidelity", "--model", "./absent", "-o", "x"], "does not exist"),
        (["fidelity", "--model", "demo", "-o", "MODEL/config.json/x"], "config.json is a file; choose another"),
        (["ruler", "--model", "MODEL", "-o", "x", "--tasks", "juggling"], "no task juggling"),
        (["ruler", "--model", "MODEL", "-o", "x", "--tasks", "qa_1", "--data", "absent"], "absent"),
        (["fidelity", "--model", "MODEL", "-o", "x", "--data", "absent"], "absent does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], complaint: str, squeeze: tiny.Run, model_folder: Path
) -> None:
    status, _, err = squeeze("eval", *(part.replace("MODEL", str(model_folder)) for part in arguments))
    assert status == 2
    complaints = [line for line in err.splitlines() if line.startswith("squeeze: ")]
    assert len(complaints) == 1
    assert complaint in complaints[0]
    assert "Traceback" not in err


def test_an_interrupted_run_says_what_it_has(
    squeeze: tiny.Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(tiny.text(3000))
    command = ("eval", "perplexity", "--model", model_folder, "--data", "text.txt", "--length", 512, "--samples", 1)
    whole = harness.run
    for answered, complaint in ((False, "nothing half-written was left behind"), (True, "with 2 answers in run; run")):

        def interrupted(*arguments: Any, answered: bool = answered) -> int:
            if answered:
                whole(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(harness, "run", interrupted)
        status, _, err = squeeze(*command, "--methods", "full,streaming", "--budget", "0.3", "-o", "run")
        assert (status, complaint in err) == (2, True), err


def test_a_run_is_written_continued_and_compared(squeeze: tiny.Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.text(3000))
    words = ["eval", "fidelity", "--model", model_folder, "--data", "text.txt", "--length", 512, "--samples", 2]
    words += ["-o", "run", "--budget", 0.3]
    status, out, _ = squeeze(*words, "--methods", "full,quest")
    assert status == 0
    assert "| QUEST | 0." in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "errors.png",
        "fidelity.png",
        "metrics.json",
        "predictions.jsonl",
        "table.md",
    }
    first = (tmp_path / "run" / "predictions.jsonl").read_text()
    assert squeeze(*words, "--methods", "full,quest,random")[0] == 0
    assert (tmp_path / "run" / "predictions.jsonl").read_text().startswith(first)
    status, out, _ = squeeze("compare", "run", "run", "--json")
    assert status == 0
    assert {one["second"] for one in json.loads(out)["differences"]} == {"quest@0.3", "random@0.3"}
    status, out, _ = squeeze("compare", "run", "run", "--against", "quest@0.3")
    assert status == 0
    assert "| quest@0.3 |" in out
    assert "| within chance |" in out
    status, _, err = squeeze("compare", "run", "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "holds no run" in err


def test_workers_share_a_run_and_find_the_same(squeeze: tiny.Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.text(3000))
    words = ["eval", "perplexity", "--model", model_folder, "--data", "text.txt", "--length", 512, "--samples", 2]
    words += ["--methods", "streaming", "--budget", 0.4]
    assert squeeze(*words, "-o", "alone")[0] == 0
    status, out, err = squeeze(*words, "-o", "shared", "--workers", 2)
    assert status == 0, (out, err)

    def found(folder: str) -> list[dict]:
        lines = (tmp_path / folder / "predictions.jsonl").read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda record: (record["id"], record["row"]))

    assert found("shared") == found("alone")
    status, _, err = squeeze(*words[:4], "--data", "absent.txt", "-o", "other", "--workers", 2)
    assert status == 2
    assert "absent.txt does not exist" in err


FAILING = """
import sys
from pathlib import Path
from squeezed.evaluation import harness
from squeezed.evaluation.jobs import Passage
from squeezed.evaluation.settings import RunConfig

def load(number):
    raise RuntimeError("no room for the model")

if __name__ == "__main__":
    # More than a pipe holds, so that what nobody takes can't just lie there.
    jobs = [Passage(512, str(i), "x" * 10**6, "y") for i in range(8)]
    harness.make_jobs = lambda config, tokenizer: iter(jobs)
    config = RunConfig("perplexity", sys.argv[1], "float32", ("streaming",), (0.4,), (512,), data="text.txt")
    harness.run(config, Path("run"), load, workers=1 + 1)
"""


def test_a_run_whose_workers_fail_ends_and_says_why(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILING)
    words = [sys.executable, "script.py", str(model_folder)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "no room for the model" in done.stderr
