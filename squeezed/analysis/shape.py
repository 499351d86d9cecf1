"""The sizes of a decoder that decide its cost, read from any transformers configuration.

The model is built on torch's meta device, which allocates nothing, and its real parameters are read. Fused projections,
biases, ungated feed-forward blocks, shared experts and tied embeddings are therefore counted as they are, not guessed
from the names of configuration fields.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from squeezed.analysis.source import one_line
from squeezed.errors import InputError

Part = Literal["attention projections", "FFN", "router", "experts", "LM head"]

_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_KEYS, _VALUES = ("k_proj",), ("v_proj",)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that every token is multiplied by; with experts, by `active` of the `experts` copies."""

    part: Part
    inputs: int
    outputs: int
    bias: int = 0  # elements
    experts: int = 1
    active: int = 1  # copies a token passes through

    @property
    def elements(self) -> int:
        """Parameters of one copy, bias included."""
        return self.inputs * self.outputs + self.bias


@dataclass(frozen=True)
class Layer:
    """`count` identical decoder layers; a query sees `window` tokens, its own included, or all of them if None."""

    count: int
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    matrices: tuple[Matrix, ...]

    @property
    def kv_elements(self) -> int:
        """Elements of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelShape:
    """Everything that the cost of a decoder depends on."""

    name: str
    family: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    head: Matrix
    tied: bool
    parameters: int  # elements, a tied matrix once
    max_positions: int | None

    @property
    def depth(self) -> int:
        return sum(layer.count for layer in self.layers)

    def kv_elements(self, context: int) -> int:
        """Elements of the whole KV cache of one sequence; a sliding-window layer never holds more than its window."""
        return sum(layer.count * layer.kv_elements * min(context, layer.window or context) for layer in self.layers)


def shape_of(config: Any, name: str = "") -> ModelShape:
    """Read the shape of the decoder that `config` (a transformers configuration) describes."""
    config = config.get_text_config(decoder=True)
    _refuse_other_attention(config)
    model = _meta_model(config)
    depth = config.num_hidden_layers
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not stacks:
        raise InputError(f"{config.model_type}: no stack of {depth} layers in the model; expected a decoder")
    windows = _windows(config, depth)
    layers = Counter(_layer(config, block, window) for block, window in zip(stacks[0], windows, strict=True))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    _refuse_stray_matrices(config, model, stacks[0], head)
    return ModelShape(
        name=name or getattr(config, "name_or_path", "") or config.model_type,
        family=config.model_type,
        hidden=embedding.shape[1],
        vocabulary=embedding.shape[0],
        layers=tuple(_counted(layer, count) for layer, count in layers.items()),
        head=Matrix("LM head", head.weight.shape[1], head.weight.shape[0], _size(getattr(head, "bias", None))),
        tied=head.weight is embedding,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises anything from AttributeError to its own types for odd sizes
        raise InputError(
            f"a configuration of type {config.model_type!r} does not build a causal language model "
            f"({one_line(error)}); give the configuration of a decoder that transformers knows"
        ) from error


def _refuse_other_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "attention_types", None):
        kinds.add("local attention")
    if getattr(config, "kv_lora_rank", None):
        kinds.add("multi-head latent attention")
    if kinds:
        raise InputError(
            f"{config.model_type}: layers of type {', '.join(sorted(kinds))} are not modelled; "
            "expected softmax attention over all tokens or over a sliding window"
        )


def _windows(config: Any, depth: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * depth
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _layer(config: Any, block: nn.Module, window: int | None) -> Layer:
    parameters = dict(block.named_parameters())
    q_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    matrices = tuple(
        _matrix(config, name, weight, parameters) for name, weight in parameters.items() if _is_matrix(name, weight)
    )
    return Layer(1, q_heads, _kv_heads(config, parameters, q_heads, head_dim), head_dim, window, _ordered(matrices))


def _is_matrix(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim >= 2 and not name.endswith("bias")


def _matrix(config: Any, name: str, weight: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Matrix:
    # Only the product and the sum of the two sides matter, so Conv1D's transposed storage needs no special case.
    inputs, outputs = weight.shape[-1], weight.shape[-2]
    bias = parameters.get(name.removesuffix("weight") + "bias", parameters.get(name + "_bias"))
    if weight.ndim == 3:
        active: int = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
        return Matrix("experts", inputs, outputs, _size(bias) // weight.shape[0], weight.shape[0], active)
    path = name.lower()
    part: Part = "FFN"
    if "attn" in path or "attention" in path:
        part = "attention projections"
    elif "router" in path or re.search(r"(^|\.)(shared_expert_)?gate\.weight$", path):
        part = "router"
    return Matrix(part, inputs, outputs, _size(bias))


def _ordered(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """Sort, so that two layers that differ only in the order of their parameters count as one kind."""
    return tuple(sorted(matrices, key=lambda m: (m.part, m.inputs, m.outputs, m.bias, m.experts)))


def _kv_heads(config: Any, parameters: Mapping[str, torch.Tensor], q_heads: int, head_dim: int) -> int:
    """KV heads from the projections themselves: families disagree on how a configuration says it."""
    widths = {}
    for name, weight in parameters.items():
        if _is_matrix(name, weight) and weight.ndim == 2:
            widths[name.removesuffix(".weight").rsplit(".", 1)[-1]] = weight.numel() // config.hidden_size
    keys = next((widths[name] for name in _KEYS if name in widths), None)
    values = next((widths[name] for name in _VALUES if name in widths), keys)
    fused = next((widths[name] for name in _FUSED_QKV if name in widths), None)
    if keys is None and fused is not None:
        keys = values = (fused - q_heads * head_dim) // 2
    if not keys or keys != values or keys % head_dim:
        raise InputError(
            f"{config.model_type}: key and value projections of {q_heads} heads of {head_dim} not recognised in "
            f"{sorted(widths)}; the cost of this attention is not modelled"
        )
    return keys // head_dim


def _refuse_stray_matrices(config: Any, model: nn.Module, stack: nn.Module, head: nn.Module) -> None:
    known = {id(p) for p in [*stack.parameters(), *head.parameters()]}
    known |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    stray = [name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in known]
    if stray:
        raise InputError(f"{config.model_type}: matrices outside the layers are not modelled: {', '.join(stray)}")


def _counted(layer: Layer, count: int) -> Layer:
    return Layer(count, layer.q_heads, layer.kv_heads, layer.head_dim, layer.window, layer.matrices)


def _size(parameter: torch.Tensor | None) -> int:
    return 0 if parameter is None else parameter.numel()
