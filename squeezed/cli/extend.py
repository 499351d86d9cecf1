"""squeeze extend"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import app, messages
from squeezed.cli.build import PeakOfBuild
from squeezed.cli.options import Device, DType, load_built_with, source_of
from squeezed.cli.progress import Stages


@app.command()
def extend(
    context: Annotated[Path, typer.Argument(help="Folder that squeeze build wrote.")],
    files: Annotated[list[str], typer.Argument(help="Text files to add, in this order.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare checksums first.")] = True,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Add text files to the end of a prepared context. Until that is complete the folder stays as it was."""
    from squeezed.artifact import read_manifest
    from squeezed.extension import extend_into, rebuild_advice
    from squeezed.text import read_files

    text, parts = read_files(files)
    manifest = read_manifest(context)
    lm, tokenizer = load_built_with(source_of(context, manifest, model), manifest, model, device, dtype)
    since = time.perf_counter()
    with Stages(messages) as stages, PeakOfBuild(lm.device) as peak:
        longer = extend_into(context, lm, tokenizer, [text], parts, verify, stages.update)
    seconds = time.perf_counter() - since
    added = longer.tokens - manifest.tokens
    messages.print(f"{context}: {added:,} tokens added in {seconds:,.0f} s, now {longer.tokens:,}", soft_wrap=True)
    messages.print(str(stages), soft_wrap=True)
    messages.print(str(peak), soft_wrap=True)
    if advice := rebuild_advice(longer):
        messages.print(f"building it again would pay: {advice}", soft_wrap=True)
