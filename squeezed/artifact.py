"""A fixed context on disk: a folder of safetensors and a manifest, written whole or not at all.

    manifest.json             format, model, tokenizer, settings, files, seam, and each tensor's sha256
    context.safetensors       token ids and threshold curves
    layer-000.safetensors     one file per decoder layer
    text.txt                  the prefix as a string

Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from squeezed.calibration import ThresholdCurves
from squeezed.config import BuildConfig
from squeezed.context import FixedContext, SlidingTail
from squeezed.errors import InputError
from squeezed.ops.layout import ChannelScales, ClusteredKeys, ClusterLevel
from squeezed.template import Seam
from squeezed.text import Part

FORMAT = 4
MANIFEST, TEXT, CONTEXT = "manifest.json", "text.txt", "context.safetensors"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class _File(_Strict):
    bytes: int
    tensors: dict[str, str]  # name -> sha256


class _Layer(_Strict):
    file: str
    clustered: int | None = None
    levels: int | None = None
    sliding_window: int | None = None


class Manifest(_Strict):
    """What stands in manifest.json; unknown or missing fields are refused."""

    format: int
    created: str
    squeezed: str
    model: dict[str, str]
    tokenizer: str
    config: BuildConfig
    tokens: int
    parts: list[Part]
    seam: Seam
    layers: list[_Layer]
    extensions: list[int] = []
    text_sha256: str
    files: dict[str, _File]
    sha256: str = ""  # of all the other fields, see _manifest_sha256


def save(context: FixedContext, folder: Path, replace_existing: bool = False) -> None:
    """Write `context` to `folder`: under a temporary name first, then renamed.

    Raises:
        InputError: the folder exists, can't be written, or the disk is full.
    """
    with prepare(folder, replace_existing) as partial:
        write(context, partial)


@contextmanager
def prepare(folder: Path, replace_existing: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and vanishes if it does not.

    Entering it first shows early, before any long work, that the place can be written to.
    """
    folder = folder.absolute()
    check_target(folder, replace_existing)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
    try:
        with naming(folder):
            yield partial
            put_in_place(partial, folder, replace_existing)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path, replace_existing: bool) -> None:
    """Raise InputError if the absolute `folder` can't be written, or holds what may not be replaced."""
    _restore(folder)
    check_place(folder, folder.parent)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} exists and is not a fixed context; choose another folder")
    if not replace_existing:
        raise InputError(f"{folder} exists already; pass --force to replace it, or choose another folder")


def check_place(folder: Path, place: Path) -> None:
    """Raise InputError unless `place`, or as much of it as there is, takes what is to be written to `folder`."""
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder} can't be written: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK):
        reason = "Read-only file system" if os.statvfs(place).f_flag & os.ST_RDONLY else "Permission denied"
        raise InputError(f"{folder} can't be written: {reason}; choose another folder")


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Errors of the operating system become one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {folder} is full; free some space and try again") from error
        raise InputError(f"{folder} can't be written: {error.strerror}; choose another folder") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError unless the disk under `folder` has `needed` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"the context needs {needed:,} bytes on the disk of {folder}, which has {free:,} free; free some space"
        )


def _restore(folder: Path) -> None:
    """Put back what a build was about to replace when it was killed between its two renames."""
    for old in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.partial-old-*")):
        if not folder.exists() and (old / MANIFEST).is_file() and not _runs(old):
            old.rename(folder)


def _runs(partial: Path) -> bool:
    """Whether the process that made this temporary folder is still there."""
    pid = partial.name.rpartition("-")[2]
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))


def _remove_leftovers(folder: Path) -> None:
    """What killed builds of the same folder left behind; a build that still runs keeps its own."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if not _runs(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def put_in_place(partial: Path, folder: Path, replace_existing: bool) -> None:
    """Rename a complete `partial` to `folder`, in place of what stands there.

    Raises:
        InputError: what stands there by now may not be replaced; `partial` stays where it is.
    """
    check_target(folder, replace_existing)
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists() and any(folder.iterdir()):
        old = folder.parent / f".{folder.name}.partial-old-{os.getpid()}"
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write(context: FixedContext, folder: Path) -> None:
    """Write all files of `context` into the existing, empty `folder`."""
    finish(context, folder, [write_layer(layer, folder, i) for i, layer in enumerate(context.layers)])


class WrittenLayer(_Strict):
    """What the manifest says of a layer, and of its file."""

    layer: _Layer
    file: _File


def write_layer(layer: ClusteredKeys | SlidingTail, folder: Path, number: int) -> WrittenLayer:
    """Write one layer's file into `folder`."""
    name = f"layer-{number:03d}.safetensors"
    file = write_tensors(folder / name, _layer_tensors(layer))
    if isinstance(layer, ClusteredKeys):
        return WrittenLayer(layer=_Layer(file=name, clustered=layer.clustered, levels=len(layer.levels)), file=file)
    return WrittenLayer(layer=_Layer(file=name, sliding_window=layer.sliding_window), file=file)


def read_layer(written: WrittenLayer, folder: Path) -> ClusteredKeys | SlidingTail:
    """Map a layer that :func:`write_layer` wrote."""
    return _layer(written.layer, _read_tensors(folder / written.layer.file, written.file, verify=False))


def finish(context: FixedContext, folder: Path, layers: Sequence[WrittenLayer]) -> None:
    """Write what belongs to the whole into `folder`, which holds the layers' files; the manifest is last."""
    from squeezed import __version__

    files = {written.layer.file: written.file for written in layers}
    curves = context.curves
    files[CONTEXT] = write_tensors(
        folder / CONTEXT,
        {
            "ids": context.ids,
            "sparsities": curves.sparsities,
            "query_counts": curves.query_counts,
            "log_thresholds": curves.log_thresholds,
            **({} if curves.errors is None else {"errors": curves.errors}),
        },
    )
    text = context.text.encode()
    (folder / TEXT).write_bytes(text)
    manifest = Manifest(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        squeezed=__version__,
        model=context.model,
        tokenizer=context.tokenizer,
        config=context.config,
        tokens=context.tokens,
        parts=list(context.parts),
        seam=context.seam,
        layers=[written.layer for written in layers],
        extensions=list(context.extensions),
        text_sha256=hashlib.sha256(text).hexdigest(),
        files=files,
    )
    content = manifest.model_dump(mode="json")
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": _manifest_sha256(content)}, indent=1))


def _manifest_sha256(content: dict[str, Any]) -> str:
    others = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _layer_tensors(layer: ClusteredKeys | SlidingTail) -> dict[str, Tensor]:
    tensors = {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, ClusteredKeys):
        tensors["positions"] = layer.positions
        for i, level in enumerate(layer.levels):
            tensors |= {f"centroids.{i}": level.centroids, f"sizes.{i}": level.sizes, f"offsets.{i}": level.offsets}
            if level.spread is not None:
                tensors[f"spread.{i}"] = level.spread
            if level.values is not None:
                tensors[f"centroid_values.{i}"] = level.values
        if layer.scales is not None:
            tensors |= layer.scales._asdict()
        if layer.sinks is not None:
            tensors["sink_keys"], tensors["sink_values"] = layer.sinks
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> _File:
    """Write tensors that lie in the CPU's memory to one file."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the only way it tells of a full disk is in words
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    return _File(bytes=path.stat().st_size, tensors={name: _sha256(tensor) for name, tensor in tensors.items()})


def _sha256(tensor: Tensor) -> str:
    raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artefact in `folder`.

    Raises:
        InputError: not an artefact, a newer format, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a fixed context (it has no {MANIFEST}); make one with: squeeze build")
    try:
        raw: Any = json.loads(path.read_text())
        found = raw["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}); build the context again") from error
    if found != FORMAT:
        raise InputError(
            f"{folder} has format {found}, and this version reads format {FORMAT}; "
            "update squeezed-attention, or build the context again"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except (pydantic.ValidationError, InputError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, pydantic.ValidationError) else error
        raise InputError(f"{path} is damaged (at {where}); build the context again") from error
    if manifest.sha256 != _manifest_sha256(raw):
        raise InputError(f"{path} is damaged: its checksum differs; build the context again")
    return manifest


def load(folder: Path, verify: bool = True) -> FixedContext:
    """Map the artefact in `folder` into memory.

    Args:
        verify: read everything once and compare each tensor with its checksum.

    Raises:
        InputError: not an artefact, a newer format, damaged or truncated; says which file and tensor.
    """
    manifest = read_manifest(folder)
    try:
        text = (folder / TEXT).read_bytes()
    except OSError as error:
        raise InputError(f"{folder / TEXT} can't be read ({error.strerror}); build the context again") from error
    if hashlib.sha256(text).hexdigest() != manifest.text_sha256:
        raise InputError(f"{folder / TEXT} is damaged: its checksum differs; build the context again")
    if outside := [name for name in manifest.files if Path(name).name != name]:
        raise InputError(f"{folder / MANIFEST} names {outside[0]!r}, outside its folder; build the context again")
    tensors = {name: _read_tensors(folder / name, file, verify) for name, file in manifest.files.items()}
    try:
        layers = tuple(_layer(entry, tensors[entry.file]) for entry in manifest.layers)
        found = tensors[CONTEXT]
        curves = ThresholdCurves(
            found["sparsities"], found["query_counts"], found["log_thresholds"], found.get("errors")
        )
        ids = found["ids"]
    except KeyError as error:
        raise InputError(
            f"{folder} is damaged: {error} is missing from its manifest; build the context again"
        ) from error
    return FixedContext(
        layers=layers,
        curves=curves,
        ids=ids,
        seam=manifest.seam,
        parts=tuple(manifest.parts),
        text=text.decode(),
        config=manifest.config,
        model=manifest.model,
        tokenizer=manifest.tokenizer,
        extensions=tuple(manifest.extensions),
    )


def _read_tensors(path: Path, file: _File, verify: bool) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing; build the context again")
    if path.stat().st_size != file.bytes:
        raise InputError(
            f"{path} is {path.stat().st_size:,} bytes long, expected {file.bytes:,}: it was cut short or changed; "
            "build the context again"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {str(error).splitlines()[0]}; build the context again") from error
    if tensors.keys() != file.tensors.keys():
        raise InputError(f"{path} does not hold the tensors that its manifest lists; build the context again")
    if verify:
        for name, tensor in tensors.items():
            if _sha256(tensor) != file.tensors[name]:
                raise InputError(f"{path} is damaged: the checksum of {name!r} differs; build the context again")
    return tensors


def _layer(entry: _Layer, tensors: dict[str, Tensor]) -> ClusteredKeys | SlidingTail:
    if entry.clustered is None or entry.levels is None:
        return SlidingTail(tensors["keys"], tensors["values"], entry.sliding_window or 0)
    levels = tuple(
        ClusterLevel(
            tensors[f"centroids.{i}"],
            tensors[f"sizes.{i}"],
            tensors[f"offsets.{i}"],
            tensors.get(f"spread.{i}"),
            tensors.get(f"centroid_values.{i}"),
        )
        for i in range(entry.levels)
    )
    scales = ChannelScales(*(tensors[name] for name in ChannelScales._fields)) if "key_scale" in tensors else None
    sinks = (tensors["sink_keys"], tensors["sink_values"]) if "sink_keys" in tensors else None
    return ClusteredKeys(
        tensors["keys"], tensors["values"], tensors["positions"], levels, entry.clustered, scales, sinks
    )


def describe(folder: Path) -> dict[str, Any]:
    """What the artefact in `folder` holds, after every tensor was compared with its checksum.

    `clusters` of a layer are the fewest and most of a head, for each level; `cluster_sizes` the fewest and most keys.

    Raises:
        InputError: as :func:`load`.
    """
    manifest, context = read_manifest(folder), load(folder, verify=True)
    layers = []
    for i, (entry, layer) in enumerate(zip(manifest.layers, context.layers, strict=True)):
        squeezed = isinstance(layer, ClusteredKeys)
        described = {"layer": i, "kind": "squeezed" if squeezed else f"sliding window of {entry.sliding_window}"}
        described |= {"clusters": [], "cluster_sizes": None, "tensors": len(manifest.files[entry.file].tensors)}
        if isinstance(layer, ClusteredKeys):
            counts = [(level.sizes > 0).sum(-1) for level in layer.levels]
            sizes = layer.levels[0].sizes[layer.levels[0].sizes > 0]
            described["clusters"] = [[int(c.min()), int(c.max())] for c in counts]
            described["cluster_sizes"] = [int(sizes.min()), int(sizes.max())]
        layers.append(described)
    curves = context.curves
    return {
        "folder": str(folder),
        "format": manifest.format,
        "created": manifest.created,
        "squeezed": manifest.squeezed,
        "model": manifest.model,
        "config": manifest.config.to_dict(),
        "tokens": context.tokens,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "kv_bytes": context.kv_bytes,
        "extensions": manifest.extensions,
        "parts": [{"name": p.name, "characters": p.characters, "tokens": p.tokens} for p in manifest.parts],
        "layers": layers,
        "thresholds": {
            "sparsities": curves.sparsities.tolist(),
            "query_counts": curves.query_counts.tolist(),
            "finest": curves.log_thresholds[0].T.tolist(),
            "errors": None if curves.errors is None else curves.errors.tolist(),
        },
        "checksums": "good",
    }
