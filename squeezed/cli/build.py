"""squeeze build"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.cli import app, messages
from squeezed.cli.options import Device, DType, load
from squeezed.cli.progress import Stages


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="Local transformers folder, .gguf file, hub name, or demo.")],
    files: Annotated[list[str], typer.Argument(help="Text files, joined in this order.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    preset: Annotated[str, typer.Option(help="best: ours; paper: the published method.")] = "best",
    clusters: Annotated[float | None, typer.Option(help="Clusters as a share of the keys.")] = None,
    levels: Annotated[int | None, typer.Option(help="Cluster levels, 1 to 3.")] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens that are always attended.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens per prefill chunk; less needs less memory.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text instead of chatting about it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing context.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Prepare a fixed context from text files, once."""
    from squeezed import artifact
    from squeezed.config import find_preset
    from squeezed.context import FixedContext
    from squeezed.models import kv_bytes_per_token
    from squeezed.text import read_files

    given: dict[str, Any] = {"clusters": clusters, "levels": levels, "window": window, "chunk": chunk}
    config = replace(find_preset(preset), **{name: value for name, value in given.items() if value is not None})
    text, parts = read_files(files)
    with artifact.prepare(output, force) as partial:
        lm, tokenizer = load(model, device, dtype)
        artifact.check_space(
            output, round(1.1 * kv_bytes_per_token(lm) * len(tokenizer(text, verbose=False).input_ids))
        )
        with Stages(messages) as stages:
            context = FixedContext.from_text(lm, tokenizer, text, config, not raw, stages.update, parts)
            context = replace(context, model={**context.model, "source": _source(model)})
            stages.update("save", 0, 1)
            artifact.write(context, partial)
            stages.update("save", 1, 1)
    size = sum(path.stat().st_size for path in output.iterdir())
    messages.print(f"{output}: {context.tokens:,} tokens, {size / 1e6:,.0f} MB. Ask it: squeeze ask {output} QUESTION")


def _source(model: str) -> str:
    """What `squeeze ask` should load; a local path must not depend on the current folder."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model
