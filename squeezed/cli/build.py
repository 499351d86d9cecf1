"""squeeze build"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.cli import app, messages
from squeezed.cli.options import Copying, Device, DType, Recall, load
from squeezed.cli.progress import Stages


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="Local transformers folder, .gguf file, hub name, or demo.")],
    files: Annotated[list[str], typer.Argument(help="Text files, joined in this order.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    preset: Annotated[str, typer.Option(help="best: ours; compact: keys in 8 bits; paper: as published.")] = "best",
    clusters: Annotated[float | None, typer.Option(help="Clusters as a share of the keys.")] = None,
    levels: Annotated[int | None, typer.Option(help="Cluster levels, 1 to 3.")] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens that are always attended.")] = None,
    recall: Recall = None,
    copying: Copying = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per prefill chunk; less needs less memory.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text instead of chatting about it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing context.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over even if a build was cut short.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Prepare a fixed context from text files, once. A build that was cut short goes on where it stopped."""
    from squeezed import artifact
    from squeezed.config import find_preset
    from squeezed.errors import InputError
    from squeezed.streaming import build_into, unfinished_layers
    from squeezed.text import read_files

    given: dict[str, Any] = {
        "clusters": clusters,
        "levels": levels,
        "window": window,
        "recall": recall,
        "copying": copying,
        "chunk": chunk,
    }
    config = replace(find_preset(preset), **{name: value for name, value in given.items() if value is not None})
    text, parts = read_files(files)
    artifact.check_target(output.absolute(), force)
    lm, tokenizer = load(model, device, dtype)

    def say(line: str) -> None:
        messages.print(line, soft_wrap=True)

    try:
        with Stages(messages) as stages, PeakOfBuild(lm.device) as peak:
            context = build_into(
                output,
                lm,
                tokenizer,
                text,
                config,
                not raw,
                parts,
                _source(model),
                force,
                not fresh,
                stages.update,
                on_unfinished=say,
            )
    except KeyboardInterrupt:
        if done := unfinished_layers(output):
            raise InputError(
                f"interrupted after {done} finished layers; run the same command again to go on there"
            ) from None
        raise
    size = sum(path.stat().st_size for path in output.iterdir())
    ask = f"squeeze ask {shlex.quote(str(output))} QUESTION"
    say(f"{output}: {context.tokens:,} tokens, {size / 1e6:,.0f} MB. Ask it: {ask}")
    say(str(stages))
    say(str(peak))


class PeakOfBuild:
    """The most memory that a build took besides the model: in the host's memory, and on the GPU if it ran there."""

    def __init__(self, device: Any) -> None:
        import torch

        from squeezed.memory import PeakMemory

        self._parts = {"in the host's memory": PeakMemory(torch.device("cpu"))}
        if device.type == "cuda":
            self._parts["on the GPU"] = PeakMemory(device)

    def __enter__(self) -> PeakOfBuild:
        for part in self._parts.values():
            part.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._said = ", ".join(f"{part.read() / 1e6:,.0f} MB {where}" for where, part in self._parts.items())
        for part in self._parts.values():
            part.__exit__(*exception)

    def __str__(self) -> str:
        return f"peak memory besides the model: {self._said}"


def _source(model: str) -> str:
    """What `squeeze ask` should load; a local path must not depend on the current folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model
