"""Loading a causal language model and its tokenizer, and saying which ones can be squeezed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from squeezed.errors import InputError

_SQUEEZED, _SLIDING = "full_attention", "sliding_attention"
# What the configuration of a type does not say in any field of its own.
_REFUSED_TYPES = {
    "bloom": "adds ALiBi biases to its attention logits",
    "mpt": "adds ALiBi biases to its attention logits",
    "gpt_oss": "has learned attention sinks",
    "diffllama": "subtracts one attention from another",
    "doge": "masks keys by their values",
}
# What `model_identity` tells, in the order in which a difference is named: dtype before weights, whose fingerprint is
# another in float16.
_IDENTITY = {
    "type": "model type",
    "config": "model configuration (hash)",
    "dtype": "dtype",
    "weights": "model weights (fingerprint)",
}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of each decoder layer.

    Attributes:
        squeezed: indices of the full-attention layers.
        sliding: index -> window in tokens, for layers that stay dense.
    """

    squeezed: tuple[int, ...]
    sliding: dict[int, int]

    @property
    def num_layers(self) -> int:
        return len(self.squeezed) + len(self.sliding)


def load_model(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    expected: Mapping[str, str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a local folder, a .gguf file, a hub name, or `demo`.

    Args:
        name: which model.
        device: where to put it.
        dtype: None is float32 on CPU (half precision is slower there) and the checkpoint's own elsewhere.
        expected: a context's `model`, where the model is loaded for that context.

    Raises:
        InputError: not found, no weights, an architecture that can't be squeezed, or a configuration that shows that
            it is not the model of `expected`; that is known before the weights are read.
    """
    source, options = _source(name)
    precision: Any = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_config(config)
        if expected is not None:
            check_identity(expected, _identity_by_config(config))
        loading = dict(options)
        if "gguf_file" in options:
            from transformers import GgufConfig

            loading["quantization_config"] = GgufConfig(dequantize=True)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=precision, attn_implementation="sdpa", output_loading_info=True, **loading
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise InputError(
            f"model {name!r} can't be loaded: {reason}; expected a transformers folder with weights and a tokenizer, "
            "a .gguf file, a hub name that can be reached, or demo"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {name!r} lacks {len(missing)} weights of its architecture ({missing[0]} is the first); "
            "get the whole checkpoint"
        )
    plan_layers(model)
    return model.to(device).eval(), tokenizer


def _source(name: str) -> tuple[str, dict[str, str]]:
    if name == "demo":
        from squeezed.demo.fetch import demo_model

        return str(demo_model()), {}
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model file {name!r} does not exist; give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json; give a transformers model folder")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise InputError(f"model folder {name!r} has no weights; expected *.safetensors beside config.json")
        return str(path), {}
    if path.exists():
        raise InputError(f"model {name!r} is a file and no .gguf; give a transformers folder, a .gguf file or demo")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r} does not exist; give a transformers folder, a .gguf file, a hub name or demo")
    return name, {}


def _check_config(config: Any) -> None:
    """Refuse by name what shows in the configuration, before any weights are read."""
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder; expected a decoder-only language model")
    if kind in _REFUSED_TYPES:
        raise InputError(f"{kind} {_REFUSED_TYPES[kind]}, which is not supported; try Qwen3 or Llama")
    text = config.get_text_config()
    for field, why in (
        ("alibi", "adds ALiBi biases to its attention logits"),
        ("attn_logit_softcapping", "caps its attention logits"),
        ("kv_lora_rank", "keeps a compressed latent instead of keys and values"),
        ("num_kv_shared_layers", "shares keys and values between layers"),
        ("attention_chunk_size", "attends within chunks"),
    ):
        if getattr(text, field, None):
            raise InputError(
                f"{kind} {why} ({field} = {getattr(text, field)}), which is not supported; try Qwen3 or Llama"
            )
    others = sorted(set(_layer_types(text)) - {_SQUEEZED, _SLIDING})
    if others:
        raise InputError(f"{kind} has layers of type {', '.join(others)}; expected softmax attention in every layer")


def _layer_types(text_config: Any) -> list[str]:
    """Each layer's type, by the same rules as transformers' own DynamicCache."""
    listed = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    if listed is None:
        listed = [_SLIDING if window else _SQUEEZED] * text_config.num_hidden_layers
    # A window that no sequence can outgrow (Phi-3) is no window.
    if window and window >= getattr(text_config, "max_position_embeddings", 0) > 0:
        listed = [_SQUEEZED if kind == _SLIDING else kind for kind in listed]
    return list(listed)


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The attention module of each decoder layer, in order."""
    decoder = model.get_decoder()
    modules = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", [])]
    if not modules or any(module is None for module in modules):
        raise InputError(
            f"{model.config.model_type} has no self_attn in each decoder layer; expected softmax attention"
        )
    return modules  # type: ignore[return-value]


def plan_layers(model: PreTrainedModel) -> LayerPlan:
    """Which layers are squeezed and which stay dense.

    Raises:
        InputError: the model can't be squeezed; says by name what stands against it.
    """
    _check_config(model.config)
    kind, text = model.config.model_type, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        raise InputError(f"{kind} has recurrent layers; expected softmax attention in every layer")
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{kind} does not take its attention from transformers' interface; expected a rotary decoder")
    for module in attention_modules(model):
        if hasattr(module, "sinks"):
            raise InputError(f"{kind} has learned attention sinks, which are not supported; try Qwen3 or Llama")
    types = _layer_types(text)
    squeezed = tuple(i for i, layer_type in enumerate(types) if layer_type == _SQUEEZED)
    if not squeezed:
        raise InputError(
            f"every layer of {kind} attends to a sliding window of {text.sliding_window} tokens only; "
            "nothing grows with the context, so there is nothing to squeeze"
        )
    return LayerPlan(squeezed, {i: text.sliding_window for i, t in enumerate(types) if t == _SLIDING})


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens that the model was made for; None if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def rope_switch(model: PreTrainedModel) -> tuple[str, int | None]:
    """RoPE type, and the length beyond which it rotates every token otherwise, if it does so at all."""
    text = model.config.get_text_config()
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", "default") if isinstance(scaling, dict) else "default"
    if kind not in ("dynamic", "longrope"):
        return kind, None
    original = scaling.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    return kind, original or (max_positions(model) if kind == "dynamic" else None)


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """What tells this model's keys from another's: type, dtype, hash of the architecture, fingerprint of the weights.

    The fingerprint covers 64 values of every parameter, rounded to bfloat16 so that it is the same for a model loaded
    in float32 and in bfloat16; float16 rounds otherwise.
    """
    digest = hashlib.sha256()
    for name, parameter in model.get_decoder().named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to(torch.bfloat16).float().cpu()
        digest.update(name.encode())
        digest.update(sample.numpy().tobytes())
    return {
        "type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _hash_of(model.config),
        "weights": digest.hexdigest(),
    }


def _identity_by_config(config: Any) -> dict[str, str]:
    """As much of `model_identity` as a configuration tells for sure before its model is loaded."""
    text, found = config.get_text_config(), {}
    if text is config:  # of a model of text and images transformers may load the text's part alone, by its own type
        found["type"] = config.model_type
    if not any(getattr(part, "quantization_config", None) for part in (config, text)):  # rewritten by loading
        found["config"] = _hash_of(config)
    return found


def _hash_of(config: Any) -> str:
    text = config.get_text_config().to_dict()
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    settled = {k: v for k, v in text.items() if k not in volatile and not k.endswith(("_token_id", "_implementation"))}
    return hashlib.sha256(json.dumps(settled, sort_keys=True, default=str).encode()).hexdigest()


def check_identity(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare a model with the one that a context was built with, by all that `found` tells of it.

    Raises:
        InputError: they differ; names in what.
    """
    for key, what in _IDENTITY.items():
        if key in found and found[key] != expected[key]:
            raise InputError(
                f"the context was built with another {what}: {expected[key][:16]}, and this model has "
                f"{found[key][:16]}; load the model it was built with, or build it again with this one"
            )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides how text becomes token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content.pop("padding", None)  # both change with use, not with the tokenizer
        content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that one token adds to the squeezed layers."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return len(plan_layers(model).squeezed) * 2 * kv_heads * head_dim * torch.empty(0, dtype=model.dtype).element_size()
