"""Building into a folder: the same context as in memory, layer by layer, and what was cut short goes on."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from squeezed import artifact, prefill, streaming
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.layerwise import LayerRunner
from squeezed.streaming import build_into, needed_bytes, unfinished_layers

TOKENIZER = tiny.tokenizer()


class Killed(BaseException):
    """Nothing may catch it, as nothing catches a kill."""


def assert_same(found: FixedContext, expected: FixedContext) -> None:
    ours, theirs = list(tiny.tensors(found)), list(tiny.tensors(expected))
    assert len(ours) == len(theirs) > len(expected.layers)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for name in ("seam", "parts", "text", "config", "model", "tokenizer"):
        assert getattr(found, name) == getattr(expected, name), name


def build(folder: Path, lm: PreTrainedModel, **options: Any) -> FixedContext:
    return build_into(folder, lm, TOKENIZER, **{"text": tiny.text(), "config": tiny.BUILD, **options})


def killed_in(layer: int, patched: pytest.MonkeyPatch) -> None:
    """Let a build be killed when `layer` is prefilled but not finished."""
    real, done = streaming.prepare_layer, []

    def dies(*arguments: Any) -> Any:
        done.append(len(done))
        if len(done) == layer + 1:
            raise Killed
        return real(*arguments)

    patched.setattr(streaming, "prepare_layer", dies)


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that a text goes through, whenever one does (calibrating questions left out)."""
    seen: list[int] = []
    real = LayerRunner.step

    def counted(self: LayerRunner, number: int, hidden: Any, cache: Any, **inputs: Any) -> Tensor:
        if "attention_mask" not in inputs and number not in seen[-1:]:
            seen.append(number)
        return real(self, number, hidden, cache, **inputs)

    monkeypatch.setattr(LayerRunner, "step", counted)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding", "phi3-longrope"])
@pytest.mark.parametrize(("chat", "levels"), [(True, 1), (False, 2)])
def test_a_folder_holds_what_a_build_in_memory_gives(family: str, chat: bool, levels: int, tmp_path: Path) -> None:
    lm, config = tiny.model(family), replace(tiny.BUILD, levels=levels)
    expected = FixedContext.from_text(lm, TOKENIZER, tiny.text(), config, chat)
    assert_same(build(tmp_path / "manual", lm, config=config, chat=chat), expected)
    assert_same(FixedContext.load(tmp_path / "manual", lm, TOKENIZER), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["manual"]
    assert not [path.name for path in (tmp_path / "manual").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_killed_build_goes_on_at_the_first_layer_that_is_not_finished(
    family: str, layer: int, layers_run: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.model(family)
    with monkeypatch.context() as patched:
        killed_in(layer, patched)
        with pytest.raises(Killed):
            build(tmp_path / "manual", lm)
    assert not (tmp_path / "manual").exists()
    assert unfinished_layers(tmp_path / "manual") == layer
    with pytest.raises(InputError, match="not a fixed context"):
        artifact.read_manifest(tmp_path / ".manual.unfinished")
    layers_run.clear()
    found = build(tmp_path / "manual", lm)
    assert layers_run == list(range(layer, 3))
    assert_same(found, FixedContext.from_text(lm, TOKENIZER, tiny.text(), tiny.BUILD))
    assert [path.name for path in tmp_path.iterdir()] == ["manual"]


@pytest.mark.parametrize(
    "where", ["squeezed.context.calibrate", "squeezed.artifact.finish", "squeezed.artifact.put_in_place"]
)
def test_a_build_that_is_killed_at_its_end_prefills_nothing_again(
    where: str, layers_run: list[int], llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(where, dies)
        with pytest.raises(Killed):
            build(tmp_path / "manual", llama)
    layers_run.clear()
    found = build(tmp_path / "manual", llama)
    if where != "squeezed.artifact.put_in_place":
        assert layers_run == []
    assert_same(found, FixedContext.from_text(llama, TOKENIZER, tiny.text(), tiny.BUILD))
    assert [path.name for path in tmp_path.iterdir()] == ["manual"]


def test_a_build_killed_in_its_first_layer_leaves_nothing(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(0, monkeypatch)
    with pytest.raises(Killed):
        build(tmp_path / "manual", llama)
    assert list(tmp_path.iterdir()) == []


def _other_settings(folder: Path) -> dict[str, Any]:
    return {"config": replace(tiny.BUILD, clusters=0.2)}


def _other_text(folder: Path) -> dict[str, Any]:
    return {"text": tiny.text(seed=5)}


def _fresh(folder: Path) -> dict[str, Any]:
    return {"resume": False}


def _cut_layer(folder: Path) -> dict[str, Any]:
    os.truncate(folder / "layer-000.safetensors", 100)
    return {}


def _lost(name: str) -> Callable[[Path], dict[str, Any]]:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).unlink()
        return {}

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_settings, "not the same"),
        (_other_text, "not the same"),
        (_fresh, None),
        (_cut_layer, "missing or cut short"),
        (_lost(".hidden-0"), "missing or cut short"),
        (_lost(".queries-001.safetensors"), "missing or cut short"),
        (_lost(".progress.json"), None),
    ],
)
def test_a_build_starts_over_where_it_can_not_go_on_and_says_why(
    change: Callable[[Path], dict[str, Any]],
    reason: str | None,
    layers_run: list[int],
    llama: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        killed_in(2, patched)
        with pytest.raises(Killed):
            build(tmp_path / "manual", llama)
    options = change(tmp_path / ".manual.unfinished")
    layers_run.clear()
    said: list[str] = []
    found = build(tmp_path / "manual", llama, on_unfinished=said.append, **options)
    assert layers_run == [0, 1, 2]
    assert len(said) == (reason is not None)
    assert all("after 2 layers; starting over: " in line and str(reason) in line for line in said)
    text, config = options.get("text", tiny.text()), options.get("config", tiny.BUILD)
    assert_same(found, FixedContext.from_text(llama, TOKENIZER, text, config))


def test_a_build_goes_on_with_smaller_chunks(
    layers_run: list[int], llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        killed_in(2, patched)
        with pytest.raises(Killed):
            build(tmp_path / "manual", llama)
    layers_run.clear()
    said: list[str] = []
    build(tmp_path / "manual", llama, config=replace(tiny.BUILD, chunk=16), on_unfinished=said.append)
    assert layers_run == [2]
    assert [line.partition("after ")[2] for line in said] == ["2 layers; going on there"]


def test_two_processes_do_not_build_into_one_folder(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        killed_in(1, patched)
        with pytest.raises(Killed):
            build(tmp_path / "manual", llama)
    path = tmp_path / ".manual.unfinished" / ".progress.json"
    path.write_text(path.read_text().replace('"pid":0', f'"pid":{os.getppid()}'))
    with pytest.raises(InputError, match=f"being built by process {os.getppid()}"):
        build(tmp_path / "manual", llama)


_BUILDER = """
import signal, sys, time
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell is told to ignore it
import squeezed.cli, squeezed.context, squeezed.streaming
def wait(*args, **kwargs):
    print("ready", flush=True)
    time.sleep(60)
squeezed.context.calibrate = wait
sys.argv = ["squeeze", "build", {model!r}, {text!r}, "-o", {target!r}, "--window", "24"]
squeezed.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_says_how_to_go_on_and_does(
    number: signal.Signals, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    names = {
        name: str(tmp_path / place)
        for name, place in (("model", "model"), ("text", "text.txt"), ("target", "out/manual"))
    }
    script = _BUILDER.format(tests=str(Path(__file__).parent), **names)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert not (tmp_path / "out" / "manual").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 2
        assert "run the same command again" in complaint.strip().splitlines()[-1]
        assert "Traceback" not in complaint
    script = script.replace("squeezed.context.calibrate = wait", "squeezed.streaming.prepare_layer = wait")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr  # no layer was prepared again
    assert "after 3 layers; going on there" in done.stderr
    assert "peak memory" in done.stderr
    timed = next(line for line in done.stderr.splitlines() if line.startswith("seconds: "))
    assert all(stage in timed for stage in ("calibrate", "measure", "save"))
    FixedContext.load(tmp_path / "out" / "manual")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manual"]


def test_one_layer_is_held_at_a_time(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    real = streaming.prepare_layer

    def watched(layer: prefill.PrefilledLayer, *arguments: Any) -> Any:
        gc.collect()
        made = real(layer, *arguments)
        alive.extend(weakref.ref(part) for part in (layer.keys, made.keys))
        most.append(sum(part() is not None for part in alive))
        return made

    monkeypatch.setattr(streaming, "prepare_layer", watched)
    build(tmp_path / "manual", llama)
    assert most == [2, 2, 2]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"levels": 2, "clusters": 0.3, "compensate": False, "centroid_bits": 16}),
        ("llama-mqa-128", {"key_bits": 8}),
        ("gemma3-sliding", {}),
    ],
)
def test_the_space_that_is_asked_for_is_what_a_build_takes(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, config, most = tiny.model(family), replace(tiny.BUILD, **changes), [0]
    real = streaming._Work.note

    def note(self: streaming._Work) -> None:
        most[0] = max(most[0], sum(path.stat().st_size for path in self.folder.iterdir()))
        real(self)

    monkeypatch.setattr(streaming._Work, "note", note)
    made = build(tmp_path / "manual", lm, config=config, text=tiny.text(3000))
    probes = made.probes(lm, TOKENIZER)
    assert probes is not None
    asked = needed_bytes(lm, made.tokens, config, probes.tokens) - 2**20  # for the manifest and the like
    assert 0.8 * asked < most[0] < asked + 2**18


def test_a_disk_that_is_too_small_is_named_before_any_work(
    layers_run: list[int], llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes .* 1,000 free"):
        build(tmp_path / "manual", llama)
    assert layers_run == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_grown_too_small_does_not_cost_what_is_finished(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "manual"
    with monkeypatch.context() as patched:
        killed_in(2, patched)
        with pytest.raises(Killed):
            build(target, llama)
    finished = unfinished_layers(target)
    assert finished > 0
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)
        patched.setattr(artifact.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match="free some space"):
            build(target, llama)
    assert unfinished_layers(target) == finished


def test_what_has_come_to_stand_at_the_target_is_not_replaced(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "manual", streaming.prepare_layer

    def slow(*arguments: Any) -> Any:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(streaming, "prepare_layer", slow)
    with pytest.raises(InputError, match="not a fixed context") as caught:
        build(target, llama)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    finished = next(path for path in tmp_path.iterdir() if path != target)
    assert str(caught.value).endswith(str(finished))
    FixedContext.load(finished)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_is_named(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine allows no mount")
    monkeypatch.setattr(artifact, "check_space", lambda folder, needed: None)
    try:
        with pytest.raises(InputError, match="full"):
            build(tmp_path / "manual", llama, text=tiny.text(3000))
        assert not (tmp_path / "manual").exists()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize(("part", "value"), [("k_proj", torch.nan), ("v_proj", torch.inf)])
def test_keys_and_values_that_are_not_finite_are_named_by_layer_and_head(
    part: str, value: float, tmp_path: Path
) -> None:
    lm = tiny.model("llama")
    with torch.no_grad():
        getattr(lm.model.layers[1].self_attn, part).weight[16:32] = value  # of the second KV head
    what = "keys" if part == "k_proj" else "values"
    with pytest.raises(InputError, match=f"layer 1, KV head 1 has {what} that are not finite"):
        build(tmp_path / "manual", lm)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
def test_a_gpu_that_runs_out_of_memory_goes_on_with_smaller_chunks(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny.model(family)
    expected = FixedContext.from_text(lm, TOKENIZER, tiny.text(), tiny.BUILD)
    decoder, room = lm.get_decoder(), 40
    real = decoder.layers[1].mlp.forward

    def small_memory(hidden: Tensor) -> Tensor:
        # After attention: the layer's cache has been written to.
        if hidden.shape[1] > room:
            raise torch.OutOfMemoryError
        return real(hidden)

    monkeypatch.setattr(decoder.layers[1].mlp, "forward", small_memory)
    # The calibrating questions are longer than the room for a chunk of text.
    quiet = replace(tiny.BUILD, calibration="window")
    with caplog.at_level(logging.WARNING):
        found = build(tmp_path / "manual", lm, config=quiet)
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU ran out of memory: going on with chunks of 48 tokens",
        "the GPU ran out of memory: going on with chunks of 24 tokens",
    ]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert tiny.relative_error(a.keys.double().sum(1), b.keys.double().sum(1)) < 1e-4
    monkeypatch.setattr(prefill, "LayerRunner", _Full)
    with pytest.raises(InputError, match="too small for a single token"):
        build(tmp_path / "other", lm, config=quiet)


class _Full(LayerRunner):
    """On a GPU without any room."""

    def step(self, *arguments: Any, **inputs: Any) -> Tensor:
        raise torch.OutOfMemoryError


class _Doubling:
    """A model whose decoder doubles what goes from layer to layer."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.config, self.device, self.layers = lm.config, lm.device, [torch.nn.Identity(), torch.nn.Identity()]

    def get_decoder(self) -> Any:
        return self

    def __call__(self, input_ids: Tensor, use_cache: bool) -> None:
        hidden = torch.zeros(1, input_ids.shape[1], 4)
        for layer in self.layers:
            hidden = 2 * layer(hidden)


def test_a_decoder_that_is_no_plain_chain_of_layers_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="llama does more than to pass hidden states"):
        LayerRunner(_Doubling(llama))  # type: ignore[arg-type]


def test_stepping_through_a_model_leaves_it_as_it_was(llama: PreTrainedModel) -> None:
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = llama(ids).logits
        runner, hidden = LayerRunner(llama), None
        for number in range(3):
            hidden = runner.step(number, hidden, DynamicCache(config=llama.config), input_ids=ids)
        assert torch.equal(llama.lm_head(llama.model.norm(hidden)), expected)
        assert torch.equal(llama(ids).logits, expected)
