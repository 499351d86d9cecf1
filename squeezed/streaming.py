"""Building a context straight into its folder, a layer at a time, so that no more than one layer need fit into memory.

Beside the folder stands a working folder until all is done. Besides the finished layers' files, which stay, it holds

    .progress.json            what is finished, and a key of everything that went in
    .hidden-0, .hidden-1      the text's hidden states before and after the current layer
    .probes-003.safetensors   the calibrating questions' hidden states before layer 3
    .queries-002.safetensors  what calibrates: queries in layer 2

A build that is cut short goes on with the first layer that is not finished. There is no manifest until the end, so that
nothing takes the working folder for a context.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pydantic
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from squeezed import artifact
from squeezed.artifact import WrittenLayer
from squeezed.config import BuildConfig
from squeezed.context import FixedContext, Progress
from squeezed.errors import InputError
from squeezed.models import attention_modules, kv_bytes_per_token, plan_layers
from squeezed.prefill import prefill
from squeezed.preparation import Probes, prepare_layer
from squeezed.text import Part

_PROGRESS = ".progress.json"


class _Progress(pydantic.BaseModel):
    """What is finished of `total` layers. `pid` is who works on it, `hidden` the width and dtype of hidden states."""

    model_config = pydantic.ConfigDict(extra="forbid")

    key: str
    total: int
    pid: int
    hidden: tuple[int, str] | None = None
    layers: list[WrittenLayer] = []


def build_into(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    config: BuildConfig | None = None,
    chat: bool = True,
    parts: Sequence[Part] = (),
    source: str | None = None,
    replace_existing: bool = False,
    resume: bool = True,
    on_progress: Progress = lambda stage, done, total: None,
    on_unfinished: Callable[[str], None] = lambda line: None,
) -> FixedContext:
    """Prepare `text` and write it to `folder`; the same as `FixedContext.from_text` and `save`, with less memory.

    Args:
        text, config, chat, parts, on_progress: as for :meth:`FixedContext.from_text`.
        source: what `squeeze ask` should load as the model.
        replace_existing: put it in the place of a context that is there already.
        resume: go on with a build of the same text, model and settings that was cut short. Otherwise start over.
        on_unfinished: is told in one line what becomes of a build that was cut short, unless that is not to be resumed.

    Returns:
        The context, mapped from its files.

    Raises:
        InputError: as for :meth:`FixedContext.from_text`; too little space on the disk; the folder can't be written, or
            another process builds into it.
    """
    target, config = Path(folder).absolute(), config or BuildConfig()
    context = FixedContext.unprepared(model, tokenizer, text, config, chat, parts)
    if source is not None:
        context = replace(context, model={**context.model, "source": source})
    with artifact.naming(target):
        artifact.check_target(target, replace_existing)
        work = _Work.open(target, _key(context, chat), len(attention_modules(model)), resume, on_unfinished)
        try:
            with _in_vain(work):
                probes = context.probes(model, tokenizer)
            queries = config.window if probes is None else probes.tokens
            artifact.check_space(target, needed_bytes(model, context.tokens, config, queries) - work.bytes)
            with _in_vain(work):
                finished = _build(work, context, model, probes, on_progress)
        finally:
            work.leave()
        try:
            artifact.put_in_place(work.folder, target, replace_existing)
        except InputError as error:
            raise InputError(f"{error}; the finished context is {work.folder}") from error
    return finished


@contextmanager
def _in_vain(work: _Work) -> Iterator[None]:
    """Input that is refused here would be again: nothing is left to go on with."""
    try:
        yield
    except InputError:
        work.remove()
        raise


def unfinished_layers(folder: Path) -> int:
    """How many layers a build into `folder` that was cut short has finished."""
    progress = _read(_work_folder(folder.absolute()))
    return len(progress.layers) if progress else 0


def needed_bytes(model: PreTrainedModel, tokens: int, config: BuildConfig, queries: int) -> int:
    """Most bytes on the disk during the build of a context of so many tokens, calibrated by so many queries."""
    text, plan = model.config.get_text_config(), plan_layers(model)
    wide = torch.empty(0, dtype=model.dtype).element_size()
    stored = kv_bytes_per_token(model) * (1 if config.key_bits == 8 else wide) // wide
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = len(plan.squeezed) * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    keys = max(1, tokens - config.window - config.sinks)
    row = head_dim * (1 if config.centroid_bits == 8 else wide) * (2 if config.compensate else 1)
    clusters = sum(round(config.clusters_of(keys) / 5**level) for level in range(config.levels))
    levels = heads * clusters * (row + 12)  # size, offset and spread take 4 bytes each
    window = kv_bytes_per_token(model) * (config.window + config.sinks)
    sliding = sum(min(tokens, size + config.window) for size in plan.sliding.values()) * 2 * head_dim * wide
    sliding *= getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    hidden = (2 * tokens + queries) * text.hidden_size * wide
    asked = len(plan.squeezed) * queries * text.num_attention_heads * head_dim * wide
    return stored * tokens + levels + 4 * heads * keys + window + sliding + hidden + asked + 2**20


class _Work:
    """The working folder; `bytes` is what it takes already."""

    def __init__(self, folder: Path, progress: _Progress) -> None:
        self.folder, self.progress = folder, progress
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    @classmethod
    def open(cls, target: Path, key: str, total: int, resume: bool, on_unfinished: Callable[[str], None]) -> _Work:
        folder = _work_folder(target)
        found = _read(folder)
        if found and found.pid != os.getpid() and psutil.pid_exists(found.pid):
            raise InputError(f"{target} is being built by process {found.pid}; wait for it, or choose another folder")
        goes_on = False
        if found and found.layers and resume:
            changed = "" if found.key == key else "files, model or settings are not the same"
            lost = "" if _complete(folder, found) else "some of its files are missing or cut short"
            goes_on = not (changed or lost)
            on_unfinished(
                f"a build into {target} was cut short after {len(found.layers)} layers; "
                + ("going on there" if goes_on else f"starting over: {changed or lost}")
            )
        if found is None or not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            found = _Progress(key=key, total=total, pid=0)
        work = cls(folder, found)
        work.progress.pid = os.getpid()
        work.note()
        return work

    def note(self) -> None:
        """Write down how far the build has got; everything that it speaks of is on the disk before."""
        new = self.folder / f"{_PROGRESS}.new"
        new.write_text(self.progress.model_dump_json())
        _sync(new)
        new.rename(self.folder / _PROGRESS)

    def leave(self) -> None:
        """Nobody works on it any more; without a finished layer there is nothing to go on with."""
        if not self.folder.exists() or (self.folder / artifact.MANIFEST).exists():
            return
        if not self.progress.layers:
            self.remove()
            return
        self.progress.pid = 0
        self.note()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _HiddenOnDisk:
    """Hidden states in two mapped files: a layer reads from one and writes to the other.

    They stay in the host's memory as long as that has room.
    """

    def __init__(self, work: _Work, tokens: int) -> None:
        self._work, self._tokens, self._layer = work, tokens, len(work.progress.layers)
        self._read: Tensor | None = None
        self._write: Tensor | None = None

    def read(self, first: int, last: int) -> Tensor:
        if self._read is None:
            self._read = self._map(self._layer)
        return self._read[first:last]

    def write(self, first: int, rows: Tensor) -> None:
        self._work.progress.hidden = (rows.shape[1], str(rows.dtype).removeprefix("torch."))
        if self._write is None:
            self._write = self._map(self._layer + 1)
        self._write[first : first + len(rows)] = rows

    def next_layer(self) -> None:
        _sync(_hidden_path(self._work.folder, self._layer + 1))
        self._read, self._write, self._layer = self._write, None, self._layer + 1

    def _map(self, layer: int) -> Tensor:
        assert self._work.progress.hidden is not None
        path, (width, dtype) = _hidden_path(self._work.folder, layer), self._work.progress.hidden
        kind = getattr(torch, dtype)
        count = self._tokens * width
        with path.open("a+b") as file:  # a mapped file that grows into a full disk would end the process
            os.posix_fallocate(file.fileno(), 0, count * kind.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=kind).view(self._tokens, width)


def _build(
    work: _Work,
    context: FixedContext,
    model: PreTrainedModel,
    probes: Probes | None,
    on_progress: Progress,
) -> FixedContext:
    modules, progress, config = attention_modules(model), work.progress, context.config
    start, total = len(progress.layers), len(modules)
    if probes is not None and 0 < start < total:
        probes.hidden = _load(_probes_path(work.folder, start), model.device)
    through = start * context.tokens // total

    def on_chunk(tokens: int) -> None:
        nonlocal through
        through += tokens
        on_progress("prefill", through, context.tokens)

    hidden = _HiddenOnDisk(work, context.tokens)
    prefilled = prefill(model, context.ids.tolist(), config.window, config.chunk, on_chunk, hidden, start)
    for number, layer in enumerate(prefilled, start):
        made = prepare_layer(layer, modules[number], config)
        on_progress("cluster", number + 1, total)
        observed: list[Tensor] = []
        if probes is not None:
            observed = probes.observe(number, made)
            on_progress("questions", number + 1, total)
        if layer.queries is not None:
            _save(_queries_path(work.folder, number), observed or [layer.queries])
        if probes is not None:
            _save(_probes_path(work.folder, number + 1), probes.hidden)
        written = artifact.write_layer(made, work.folder, number)
        _sync(work.folder / written.layer.file)
        progress.layers.append(written)
        work.note()
        _probes_path(work.folder, number).unlink(missing_ok=True)
        del made, layer
        on_progress("save", number + 1, total + 1)
    layers = tuple(artifact.read_layer(written, work.folder) for written in progress.layers)
    queries = [
        _load(path, model.device) for path in (_queries_path(work.folder, i) for i in range(total)) if path.exists()
    ]
    context = replace(context, layers=layers).calibrated(model, queries, on_progress)
    artifact.finish(context, work.folder, progress.layers)
    for path in sorted(work.folder.glob(".*"), key=lambda path: path.name == _PROGRESS):
        path.unlink()
    on_progress("save", total + 1, total + 1)
    return context


def _key(context: FixedContext, chat: bool) -> str:
    """Of everything that decides what the layers hold; the chunk only decides about memory."""
    settings: dict[str, Any] = {**context.config.to_dict(), "chunk": None}
    model = {name: value for name, value in context.model.items() if name != "source"}
    content = [artifact.FORMAT, model, context.tokenizer, settings, chat, context.ids.tolist(), context.text]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _work_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.unfinished"


def _hidden_path(folder: Path, layer: int) -> Path:
    """Where the hidden states that go into `layer` are."""
    return folder / f".hidden-{layer % 2}"


def _probes_path(folder: Path, layer: int) -> Path:
    return folder / f".probes-{layer:03d}.safetensors"


def _queries_path(folder: Path, layer: int) -> Path:
    return folder / f".queries-{layer:03d}.safetensors"


def _read(folder: Path) -> _Progress | None:
    try:
        return _Progress.model_validate_json((folder / _PROGRESS).read_text())
    except (OSError, ValueError):
        return None


def _complete(folder: Path, progress: _Progress) -> bool:
    """Whether all the files are there that the progress speaks of."""
    done = len(progress.layers)
    whole = all(
        path.is_file() and path.stat().st_size == written.file.bytes
        for written in progress.layers
        for path in [folder / written.layer.file]
    )
    needed = [_queries_path(folder, i) for i, written in enumerate(progress.layers) if written.layer.clustered]
    if done < progress.total:
        needed.append(_hidden_path(folder, done))
    return whole and all(path.is_file() for path in needed)


def _save(path: Path, tensors: Sequence[Tensor]) -> None:
    artifact.write_tensors(path, {f"{i:03d}": tensor.cpu().contiguous() for i, tensor in enumerate(tensors)})
    _sync(path)


def _load(path: Path, device: torch.device) -> list[Tensor]:
    found = load_file(path, device=str(device))
    return [found[name] for name in sorted(found)]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
