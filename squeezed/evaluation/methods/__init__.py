"""All methods that are compared, by name, and how a command line names one with options."""

from __future__ import annotations

import dataclasses
from typing import Any

from squeezed.errors import InputError
from squeezed.evaluation.methods.actqkv import ActQKV
from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method
from squeezed.evaluation.methods.cascade import Cascade
from squeezed.evaluation.methods.full import Full
from squeezed.evaluation.methods.magicpig import MagicPig
from squeezed.evaluation.methods.multipole import Multipole
from squeezed.evaluation.methods.oracle import Oracle
from squeezed.evaluation.methods.quest import Quest
from squeezed.evaluation.methods.random import Random
from squeezed.evaluation.methods.recycled import Recycled
from squeezed.evaluation.methods.retroinfer import RetroInfer
from squeezed.evaluation.methods.squeezed import Squeezed, presets
from squeezed.evaluation.methods.streaming import Streaming
from squeezed.evaluation.methods.tokenselect import TokenSelect

METHODS: dict[str, Method] = {
    "full": Full(),
    **presets(),
    "multipole": Multipole(),
    "retroinfer": RetroInfer(),
    "quest": Quest(),
    "actqkv": ActQKV(),
    "tokenselect": TokenSelect(),
    "recycled": Recycled(),
    "magicpig": MagicPig(),
    "cascade": Cascade(),
    "streaming": Streaming(),
    "random": Random(),
    "oracle": Oracle(),
}


def find_method(spec: str) -> Method:
    """The method of that name, with options: `quest`, `quest:page=32`, `squeezed:clusters=0.1:levels=2`.

    Raises:
        InputError: no such method, option or value.
    """
    name, *options = spec.split(":")
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; choose among {', '.join(METHODS)}")
    method = METHODS[name]
    target: Any = method.config if isinstance(method, Squeezed) else method
    fields = {field.name: field for field in dataclasses.fields(target)}
    changes = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(f"method {name} has no option {key!r}; its options are {known}")
        default = getattr(target, key)
        # Where 0 has a meaning, it is the default: sizes are not 0. BuildConfig checks its own.
        least = 1 if type(default) is int and default > 0 and target is method else 0
        changes[key] = _parse(f"{name}:{key}", value, default, least)
    target = dataclasses.replace(target, **changes)
    return dataclasses.replace(method, config=target) if isinstance(method, Squeezed) else target


def _parse(what: str, value: str, default: Any, least: int) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"option {what} is {value!r}: expected true or false")
        return value.lower() == "true"
    kind = float if default is None else type(default)
    try:
        parsed = kind(value)
    except ValueError as error:
        expected = "an int" if kind is int else f"a {kind.__name__}"
        raise InputError(f"option {what} is {value!r}: expected {expected}") from error
    if kind is not str and not parsed >= least:  # not below it, which nan isn't
        raise InputError(f"option {what} is {value}: expected {least} or more")
    return parsed


def title(spec: str) -> str:
    """What plots and tables call a method: its title, and its options if it has any."""
    method = METHODS.get(spec.partition(":")[0])
    shown = method.name if isinstance(method, Squeezed) else method.title if method else spec
    options = spec.partition(":")[2]
    return f"{shown} {options.replace(':', ', ')}" if options else shown


__all__ = ["METHODS", "Asked", "Choice", "LayerContext", "Method", "Squeezed", "find_method", "title"]
