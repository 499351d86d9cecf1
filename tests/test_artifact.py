"""The artefact on disk: bit-equal, mapped, whole or not at all, refused by name when it is not what it should be."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed import artifact
from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.ops.layout import ClusteredKeys


@pytest.fixture
def saved(context: FixedContext, tmp_path: Path) -> Path:
    folder = tmp_path / "manual"
    context.save(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_round_trip_is_bit_equal(
    family: str, dtype: torch.dtype, levels: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lm = tiny.model(family).to(dtype)
    config = replace(tiny.BUILD, levels=levels, iterations=1)
    before = FixedContext.from_text(lm, tokenizer, tiny.text(), config)
    before.save(tmp_path / "manual")
    after = FixedContext.load(tmp_path / "manual", lm, tokenizer)
    ours, theirs = list(tiny.tensors(before)), list(tiny.tensors(after))
    assert len(ours) == len(theirs) > len(before.layers)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    for name in ("seam", "parts", "text", "config", "model", "tokenizer"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_loaded_context_answers_like_the_built_one(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: FixedContext, saved: Path
) -> None:
    logits = []
    for fixed in (context, FixedContext.load(saved, llama, tokenizer)):
        with torch.inference_mode(), attached(llama):
            logits.append(tiny.generate(llama, 4, **fixed.inputs(tokenizer, tiny.QUESTIONS, sparsity=0.7))[1])
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_files_and_their_places_are_remembered(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name, seed in (("one.txt", 1), ("two.txt", 2)):
        (tmp_path / name).write_text(f"\n{tiny.text(150, seed)}\n\n", encoding="utf-8")
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    fixed = FixedContext.build(llama, tokenizer, paths, tiny.BUILD)
    fixed.save(tmp_path / "both")
    loaded = FixedContext.load(tmp_path / "both")
    assert [part.name for part in loaded.parts] == ["one.txt", "two.txt"]
    head = loaded.text.index(tiny.text(150, 1))
    for part, seed in zip(loaded.parts, (1, 2), strict=True):
        assert loaded.text[head:][slice(*part.characters)] == tiny.text(150, seed)
        # A token may reach over an end of the part.
        assert tiny.text(150, seed).strip(".") in tokenizer.decode(loaded.ids[slice(*part.tokens)])


def test_loading_maps_the_files_instead_of_reading_them(context: FixedContext, tmp_path: Path) -> None:
    first = context.squeezed_layers[0]
    keys = torch.randn(first.keys.shape[0], 500_000, first.keys.shape[2])
    grown = replace(context, layers=(replace(first, keys=keys, values=keys.clone()), *context.layers[1:]))
    grown.save(tmp_path / "large")
    size = sum(path.stat().st_size for path in (tmp_path / "large").iterdir())
    del keys, grown
    process = psutil.Process()
    before = process.memory_info()
    loaded = FixedContext.load(tmp_path / "large", verify=False)
    after = process.memory_info()
    assert size > 100_000_000
    assert after.rss - before.rss < size / 10
    assert after.vms - before.vms >= size / 2
    assert loaded.squeezed_layers[0].keys.shape[1] == 500_000


def _other_model(**changes: object) -> Callable[[], PreTrainedModel]:
    return lambda: tiny.model("llama", **changes)


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        (lambda: tiny.model("qwen2-bias"), "model type"),
        (_other_model(num_hidden_layers=2), "model configuration"),
        (_other_model(rms_norm_eps=1e-3), "model configuration"),
        (lambda: tiny.model("llama", seed=1), "model weights"),
        (lambda: tiny.model("llama").to(torch.bfloat16), "dtype"),
        (lambda: tiny.model("llama").to(torch.float16), "dtype"),
    ],
    ids=["type", "layers", "norm", "weights", "bfloat16", "float16"],
)
def test_another_model_is_refused_naming_the_difference(
    make: Callable[[], PreTrainedModel], difference: str, tokenizer: PreTrainedTokenizerFast, saved: Path
) -> None:
    with pytest.raises(InputError, match=difference):
        FixedContext.load(saved, make(), tokenizer)


def test_a_single_changed_matrix_is_another_model(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, saved: Path
) -> None:
    tuned = tiny.model("llama")
    with torch.no_grad():
        tuned.model.layers[1].self_attn.v_proj.weight.mul_(1.05)
    with pytest.raises(InputError, match="model weights"):
        FixedContext.load(saved, tuned, tokenizer)


def test_another_tokenizer_is_refused(llama: PreTrainedModel, saved: Path) -> None:
    with pytest.raises(InputError, match="another tokenizer"):
        FixedContext.load(saved, llama, tiny.prefix_space_tokenizer())


def test_the_same_model_is_recognised_after_use_and_reload(
    tokenizer: PreTrainedTokenizerFast, saved: Path, tmp_path: Path
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    from squeezed.models import load_model

    lm, same = load_model(str(tmp_path / "model"))
    same(["short", "a longer text"], padding=True, truncation=True, max_length=5)  # leaves settings behind
    FixedContext.load(saved, lm, same)


def _edit_manifest(folder: Path, edit: Callable[[dict], object], sealed: bool = False) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    edit(raw)
    if sealed:
        raw["sha256"] = artifact._manifest_sha256(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda raw: raw.update(format=2), "format 2"),
        (lambda raw: raw.update(format=artifact.FORMAT + 1), f"format {artifact.FORMAT + 1}"),
        (lambda raw: raw.update(format=0), "format 0"),
        (lambda raw: raw.pop("format"), "damaged"),
        (lambda raw: raw.update(surprise=1), "surprise"),
        (lambda raw: raw["config"].update(surprise=1), "surprise"),
        (lambda raw: raw["config"].update(clusters=7), "clusters"),
        (lambda raw: raw.pop("tokenizer"), "tokenizer"),
        (lambda raw: raw.update(tokens="many"), "tokens"),
        (lambda raw: raw["files"].pop("layer-001.safetensors"), "damaged"),
        (lambda raw: raw["layers"].pop(), "damaged"),
        (lambda raw: raw["layers"][0].update(levels=3), "damaged"),
        (lambda raw: raw["layers"][0].update(clustered=10_000), "damaged"),
        (lambda raw: raw.update(tokens=1), "damaged"),
    ],
)
def test_a_changed_manifest_is_refused(edit: Callable[[dict], object], reason: str, saved: Path) -> None:
    _edit_manifest(saved, edit)
    with pytest.raises(InputError, match=reason):
        FixedContext.load(saved)


def test_a_manifest_cannot_point_outside_its_folder(saved: Path) -> None:
    (saved / "layer-000.safetensors").rename(saved.parent / "outside.safetensors")

    def edit(raw: dict) -> None:
        raw["files"]["../outside.safetensors"] = raw["files"].pop("layer-000.safetensors")
        raw["layers"][0]["file"] = "../outside.safetensors"

    _edit_manifest(saved, edit, sealed=True)
    with pytest.raises(InputError, match="outside its folder"):
        FixedContext.load(saved)


FILES = ("context.safetensors", "layer-000.safetensors", "layer-002.safetensors", "text.txt", "manifest.json")


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(name: str, place: float, saved: Path) -> None:
    path = saved / name
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 0x11
    path.write_bytes(raw)
    with pytest.raises(InputError, match=name if name != "manifest.json" else None) as refusal:
        FixedContext.load(saved)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(name: str, left: float, saved: Path) -> None:
    os.truncate(saved / name, int(left * (saved / name).stat().st_size))
    with pytest.raises(InputError, match=name):
        FixedContext.load(saved, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        FixedContext.load(saved)


def test_a_folder_that_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a fixed context"):
        FixedContext.load(tmp_path)
    with pytest.raises(InputError, match="not a fixed context"):
        FixedContext.load(tmp_path / "nowhere")


def test_an_existing_folder_is_kept_unless_it_is_to_be_replaced(context: FixedContext, saved: Path) -> None:
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="--force"):
        context.save(saved)
    assert (saved / "manifest.json").read_bytes() == before
    (saved / "stale.txt").touch()
    context.save(saved, replace_existing=True)
    assert not (saved / "stale.txt").exists()
    FixedContext.load(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_replacing_spares_a_folder_of_something_else(context: FixedContext, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not a fixed context"):
        context.save(tmp_path, replace_existing=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(context: FixedContext, tmp_path: Path) -> None:
    (tmp_path / "manual").mkdir()
    context.save(tmp_path / "manual")
    FixedContext.load(tmp_path / "manual")


def test_missing_parent_folders_are_made(context: FixedContext, tmp_path: Path) -> None:
    context.save(tmp_path / "a" / "b" / "manual")
    FixedContext.load(tmp_path / "a" / "b" / "manual")


def test_a_file_in_the_way_of_the_folder_is_refused(context: FixedContext, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "manual"):
        for force in (False, True):
            with pytest.raises(InputError):
                context.save(target, replace_existing=force)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_write_that_fails_leaves_things_as_they_were(
    number: int, replacing: bool, context: FixedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "manual"
    if replacing:
        context.save(folder)
    real, calls = artifact.save_file, []

    def fails_later(content: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        real(content, path)

    monkeypatch.setattr(artifact, "save_file", fails_later)
    with pytest.raises(InputError, match="full" if number != errno.EIO else "can't be written"):
        context.save(folder, replace_existing=replacing)
    assert [path.name for path in tmp_path.iterdir()] == (["manual"] if replacing else [])
    if replacing:
        FixedContext.load(folder)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small disk")
def test_a_full_disk_is_named_and_left_empty(context: FixedContext, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine allows no mount")
    try:
        with pytest.raises(InputError, match="full"):
            context.save(tmp_path / "manual")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a read-only disk")
def test_a_read_only_disk_is_named(context: FixedContext, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine allows no mount")
    try:
        with pytest.raises(InputError, match="Read-only"):
            context.save(tmp_path / "manual")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(context: FixedContext, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        context.save(tmp_path / "manual")


# Saves over and over, so that a kill lands anywhere in it; the first build is kept so that there is much to write.
_SAVER = """
import sys, torch
sys.path.insert(0, {tests!r})
import tiny
from pathlib import Path
from squeezed.context import FixedContext
torch.set_num_threads(1)
context = FixedContext.load({source!r})
print("ready", flush=True)
while True:
    context.save(Path({target!r}), replace_existing=True)
"""


def _start(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_save_leaves_a_whole_context_or_none(context: FixedContext, saved: Path, tmp_path: Path) -> None:
    target, moments = tmp_path / "target" / "manual", random.Random(0)
    script = _SAVER.format(tests=str(Path(__file__).parent), source=str(saved), target=str(target))
    for _ in range(3):
        process = _start(script)
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        process.wait()
        if target.exists():
            FixedContext.load(target)
        context.save(target, replace_existing=True)
        assert [path.name for path in target.parent.iterdir()] == ["manual"]
        FixedContext.load(target)


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(
    context: FixedContext, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, renamed = Path.rename, []

    def dies_after_the_first(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:
            raise SystemExit  # as a kill would: no clean-up may run
        return real(self, target)

    monkeypatch.setattr(Path, "rename", dies_after_the_first)
    monkeypatch.setattr(artifact.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit):
        context.save(saved, replace_existing=True)
    monkeypatch.undo()
    assert not saved.exists()
    with pytest.raises(InputError, match="--force"):
        context.save(saved)
    FixedContext.load(saved)


def test_leftovers_of_a_build_that_still_runs_are_spared(context: FixedContext, tmp_path: Path) -> None:
    running = tmp_path / f".manual[1].partial-{os.getppid()}"
    dead = tmp_path / ".manual[1].partial-999999999"
    for folder in (running, dead):
        folder.mkdir()
    context.save(tmp_path / "manual[1]")
    assert running.exists()
    assert not dead.exists()


def test_inspection_reports_every_layer_and_finds_damage(context: FixedContext, saved: Path) -> None:
    found = artifact.describe(saved)
    assert found["tokens"] == context.tokens
    assert found["kv_bytes"] == context.kv_bytes
    assert found["bytes"] == sum(path.stat().st_size for path in saved.iterdir())
    assert len(found["layers"]) == len(context.layers)
    for described, layer in zip(json.loads(json.dumps(found))["layers"], context.layers, strict=True):
        assert isinstance(layer, ClusteredKeys)
        sizes = layer.levels[0].sizes
        counts = (sizes > 0).sum(-1)
        assert described["clusters"][0] == [counts.min(), counts.max()]
        assert described["cluster_sizes"] == [sizes[sizes > 0].min(), sizes.max()]
    path = saved / "layer-001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="layer-001"):
        artifact.describe(saved)


def test_inspection_prints_numbers_for_programs_and_words_for_people(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, run_squeeze: tiny.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("squeezed.cli.inspect.output", wide)
    made = FixedContext.from_text(tiny.model("gemma3-sliding"), tokenizer, tiny.text(), replace(tiny.BUILD, levels=2))
    made.save(tmp_path / "book")
    layers = json.loads(run_squeeze("inspect", tmp_path / "book", "--json")[1])["layers"]
    assert {len(layer["clusters"]) for layer in layers} == {0, 2}
    assert run_squeeze("inspect", tmp_path / "book")[0] == 0
    assert isinstance(wide.file, io.StringIO)
    rows = [line for line in wide.file.getvalue().splitlines() if "tensors good" in line]
    for layer, row in zip(layers, rows, strict=True):
        counts = [str(low) if low == high else f"{low} to {high}" for low, high in layer["clusters"]]
        sizes = layer["cluster_sizes"]
        shown = [cell.strip() for cell in row.split("\u2502")[3:5]]
        assert shown == [", ".join(counts), f"{sizes[0]} to {sizes[1]}" if sizes else ""]


def test_disk_space_is_asked_for_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="free some space"):
        artifact.check_space(tmp_path / "not" / "there" / "yet", 10**18)
    artifact.check_space(tmp_path, 1)
