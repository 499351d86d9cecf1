"""Find and read the configuration of a model: a folder, a config.json, a .gguf file or a hub name.

transformers fills fields that a file leaves out with the defaults of *some* model of the family, so a truncated file
would be analysed as another model without a word. Files are therefore checked before transformers sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from squeezed.errors import InputError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
)
# A null window means "no window", so only its absence is a fault.
_MAY_BE_NULL = {"sliding_window"}


def load_config(model: str) -> Any:
    """The transformers configuration of `model`, refused if sizes are missing that transformers would invent."""
    fields = _read_fields(model)
    missing = missing_fields(fields)
    if missing:
        raise InputError(
            f"{model}: the configuration lacks {', '.join(missing)}; add them (transformers would silently use the "
            "defaults of another model)"
        )
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except Exception as error:
        raise InputError(f"{model}: transformers refuses the configuration ({one_line(error)})") from error


def missing_fields(fields: dict[str, Any]) -> list[str]:
    """Sizes that the model type declares with a fixed default and the file does not state, in a stable order.

    A field whose default is None is derived by transformers (head_dim = hidden_size / heads, say) and may be left out.
    So may the fields of a nested `text_config`: transformers itself drops those that equal the defaults when it saves.
    """
    from transformers import CONFIG_MAPPING

    known = fields.get("model_type")
    if not known:
        basic = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return ["model_type", *(name for name in basic if fields.get(name) is None)]
    if known not in CONFIG_MAPPING:
        raise InputError(f"model_type {known!r} is unknown to the installed transformers; correct it or upgrade")
    config_class = CONFIG_MAPPING[known]
    if any(isinstance(value, dict) and "model_type" in value for value in fields.values()):
        return []
    aliases = dict(config_class.attribute_map)
    absent = []
    for name in dict.fromkeys((*_SIZES, *aliases.values())):
        names = {name, aliases.get(name, name), *(key for key, value in aliases.items() if value == name)}
        if name in aliases or not (name in _SIZES or names & set(_SIZES)):
            continue
        if getattr(config_class, name, None) is None:
            continue
        windowed = fields.get("use_sliding_window", getattr(config_class, "use_sliding_window", True))
        if name == "sliding_window" and not windowed:
            continue
        stated = [key for key in names if key in fields]
        if not stated or (all(fields[key] is None for key in stated) and name not in _MAY_BE_NULL):
            absent.append(name)
    return absent


def _read_fields(model: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    if model == "demo":
        from squeezed.demo.fetch import demo_model

        model = str(demo_model())
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{model}: no such file; give the path of a .gguf file")
        return _through_transformers(model, PreTrainedConfig, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(entry.name for entry in path.glob("*.gguf"))
            hint = f"give the file itself: {path / found[0]}" if found else "expected a transformers model folder"
            raise InputError(f"{model}: the folder holds no config.json; {hint}")
        return _read_json(path / "config.json")
    if path.is_file():
        return _read_json(path)
    if path.suffix == ".json" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such file or folder; give a model folder, a config.json, a .gguf or a hub name")
    return _through_transformers(model, PreTrainedConfig, model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error)}); expected a transformers config.json") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a JSON {type(fields).__name__}, expected an object of configuration fields")
    return fields


def _through_transformers(model: str, config_class: Any, source: str, **keywords: str) -> dict[str, Any]:
    try:
        fields, _ = config_class.get_config_dict(source, **keywords)
    except Exception as error:  # network, parsing and hub errors share no base class
        raise InputError(
            f"{model}: no configuration found there ({one_line(error)}); give a model folder, a config.json, "
            "a .gguf file or the name of a model on the hub"
        ) from error
    if not fields:
        raise InputError(f"{model}: no config.json found under that name; check the spelling, or give a local path")
    return dict(fields)


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not longer than three."""
    return " ".join(str(error).split()).rstrip(".")[:240] or type(error).__name__
