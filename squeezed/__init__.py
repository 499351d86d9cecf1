"""Squeezed Attention: many questions over one long, fixed text, answered fast and right.

from squeezed import FixedContext, ask, load_model

model, tokenizer = load_model("demo")
context = FixedContext.build(model, tokenizer, ["manual.md"])
print(ask(model, tokenizer, context, ["Who is the director of the station?"])[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squeezed.answer import Answer, Conversation, Decoding, ask
    from squeezed.attention import attached
    from squeezed.config import BuildConfig
    from squeezed.context import FixedContext
    from squeezed.errors import InputError
    from squeezed.models import load_model

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "BuildConfig",
    "Conversation",
    "Decoding",
    "FixedContext",
    "InputError",
    "ask",
    "attached",
    "load_model",
]

_HOME = {
    "Answer": "answer",
    "BuildConfig": "config",
    "Conversation": "answer",
    "Decoding": "answer",
    "FixedContext": "context",
    "InputError": "errors",
    "ask": "answer",
    "attached": "attention",
    "load_model": "models",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch and transformers take seconds, and `squeeze --help` needs neither.
    if name not in _HOME:
        raise AttributeError(f"module 'squeezed' has no attribute {name!r}")
    return getattr(import_module(f"squeezed.{_HOME[name]}"), name)
