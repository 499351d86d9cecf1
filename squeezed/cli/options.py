"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squeezed.cli import messages
from squeezed.errors import InputError

if TYPE_CHECKING:  # not imported at start-up: it brings torch
    from squeezed.artifact import Manifest

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on CPU.")]
Recall = Annotated[
    int | None, typer.Option(help="Most tokens that an answer attends to because its question read them closely.")
]
Copying = Annotated[bool | None, typer.Option(help="Let an answer also attend to the passages that it is copying.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def load(model: str, device: str, dtype: str, expected: dict[str, str] | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, with a note on the screen while they load; `expected` as for `load_model`."""
    from rich.markup import escape
    from transformers.utils import logging

    from squeezed.models import load_model

    logging.disable_progress_bar()
    with messages.status(escape(f"loading {model}")):
        return load_model(model, resolve_device(device), parse_dtype(dtype), expected)


def source_of(context: Path, manifest: Manifest, model: str | None) -> str:
    """Where the model of a prepared context is: where the user says, or where it was at the build.

    Raises:
        InputError: neither says.
    """
    source = model or manifest.model.get("source")
    if source is None:
        raise InputError(f"{context} does not say where its model is; pass --model")
    return source


def load_built_with(source: str, manifest: Manifest, model: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """`load` of what `source_of` found, in the dtype of the build: it takes no other.

    Raises:
        InputError: another device or dtype than can be had, or as `load_model` for the manifest's model.
    """
    # Refused first: what is wrong with these is not where the model is.
    resolve_device(device)
    parse_dtype(dtype)
    built = manifest.model["dtype"]
    if dtype not in ("auto", built):
        raise InputError(f"dtype is {dtype!r}: the context was built in {built}; leave --dtype out, or build it again")
    try:
        return load(source, device, built, manifest.model)
    except InputError as error:
        raise InputError(f"{error}" if model else f"{error}; if the model has moved, pass --model") from error


def resolve_device(device: str) -> str:
    import torch

    from squeezed.config import check_device

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return check_device(device)


def parse_dtype(dtype: str) -> Any:
    """The torch dtype of that name; None for auto."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
    if dtype not in names:
        raise InputError(f"dtype is {dtype!r}: expected one of {', '.join(names)}")
    return names[dtype]
