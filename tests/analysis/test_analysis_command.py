"""`squeeze roofline` end to end: what it writes, that the page stands alone, and that failures leave nothing behind."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex

import pytest
import typer
from test_analysis_measured import ATTENTION
from test_analysis_source import LLAMA
from typer.testing import CliRunner

from squeezed.analysis import page
from squeezed.analysis.command import roofline
from squeezed.analysis.study import human, tokens_text
from squeezed.errors import InputError

app = typer.Typer()
app.command()(roofline)
FILES = {"heatmaps.png", "roofline.png", "generation.png", "limits.png", "measured.png", "index.html", "roofline.json"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "Llama-3.1-8B.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (folder / "my run.json").write_text(json.dumps(ATTENTION), encoding="utf-8")
    return folder


def invoke(inputs, output, *options: str):
    return CliRunner().invoke(app, [str(inputs / "Llama-3.1-8B.json"), "-o", str(output), *options])


@pytest.fixture(scope="module")
def output(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "deep" / "report"
    result = invoke(inputs, folder, "--device", "h100", "--measured", str(inputs / "my run.json"), "--length", "65536")
    assert result.exit_code == 0, result.exception
    return folder


def test_everything_is_written_and_nothing_else(output):
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    for picture in output.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 300_000


def test_the_page_needs_no_network_and_holds_every_picture(output):
    text = (output / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    inlined = re.findall(r'src="([^"]+)"', text)
    assert all(source.startswith("data:image/png;base64,") for source in inlined)
    pictures = {path.read_bytes() for path in output.glob("*.png")}
    assert {base64.b64decode(source.partition(",")[2]) for source in inlined} == pictures
    assert str(output) not in text
    command = html.unescape(re.findall(r"<code>(squeeze .*?)</code>", text)[0])
    assert shlex.split(command)[-2:] == ["--measured", "my run.json"]


def test_the_numbers_are_consistent(output):
    results = json.loads((output / "roofline.json").read_text(encoding="utf-8"))
    assert results["device"]["ridge"] == pytest.approx(295.3, abs=0.1)
    rows = {(row["phase"], row["method"], row["operation"]): row for row in results["operations"]}
    for phase in ("prefill", "user input", "generation"):
        whole = rows[phase, "dense", "whole"]
        parts = [rows[phase, "dense", name] for name in ("all linear layers", "all attention")]
        for what in ("flops", "bytes", "seconds", "floor_seconds"):
            assert whole[what] == pytest.approx(sum(part[what] for part in parts))
        assert whole["floor_seconds"] < whole["seconds"]
    assert rows["prefill", "dense", "whole"]["regime"] == "compute"
    assert rows["generation", "dense", "whole"]["regime"] == "memory"
    seconds = {row["method"]: row["seconds"] for row in results["generation"]}
    assert seconds["squeezed"] < seconds["dense"]
    assert results["limits"]["squeezing_pays_from"]["squeezed"] < 65536 < results["limits"]["largest_context"]["dense"]
    assert len(results["asymptotics"]) == 6
    assert results["measured"][0]["dense"]["share"] == pytest.approx(0.926, abs=2e-3)


def test_a_failure_leaves_nothing_behind(inputs, tmp_path, monkeypatch):
    def fail(*_: object) -> str:
        raise RuntimeError("disk full")

    monkeypatch.setattr(page, "page", fail)
    result = invoke(inputs, tmp_path / "report")
    assert isinstance(result.exception, RuntimeError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device", "TPU"], "device 'TPU' is not known"),
        (["--batch", "0"], "--batch is 0, expected 1 or more"),
        (["--sparsity", "1.5"], "--sparsity is 1.5"),
        (["--kv-bytes", "0"], "--kv-bytes is 0"),
        (["--measured", "absent.json"], "absent.json: cannot be read"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(inputs, tmp_path, options, complaint):
    result = invoke(inputs, tmp_path / "report", *options)
    assert isinstance(result.exception, InputError)
    assert complaint in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["my run.json", "my run.json/report", "my run.json/deep/report"])
def test_a_file_in_the_place_of_a_folder_is_refused(inputs, place):
    result = invoke(inputs, inputs / place)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(f"{inputs / place}: ")


@pytest.mark.parametrize(
    ("number", "text"),
    [(3.02e12, "3.02 TB"), (999.7, "1 kB"), (0.000193, "193 µB"), (0, "0 B"), (12, "12 B"), (2.5e18, "2.5e+03 PB")],
)
def test_numbers_carry_decimal_prefixes(number, text):
    assert human(number, "B") == text


@pytest.mark.parametrize(("count", "text"), [(None, "never"), (100, "100"), (131072, "128K"), (2**20, "1M")])
def test_contexts_are_written_as_they_are_quoted(count, text):
    assert tokens_text(count) == text
