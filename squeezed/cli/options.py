"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from squeezed.cli import messages
from squeezed.errors import InputError

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: float32 on CPU.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, with a note on the screen while they load."""
    from transformers.utils import logging

    from squeezed.models import load_model

    logging.disable_progress_bar()
    with messages.status(f"loading {model}"):
        return load_model(model, resolve_device(device), parse_dtype(dtype))


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
