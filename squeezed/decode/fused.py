"""A decode step of a standard decoder (Llama and those built alike) in a tenth of the launches.

transformers runs some forty kernels per layer for one token, most of them shorter than the gap before the next. Here
a layer is four products, which take norms, activation and residual sums along, and attention. It computes what the
model's own code computes, with fewer roundings in between; `DecodeStep` compares the two before it relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from squeezed.attention import attend_step, own_beside
from squeezed.cache import FixedLayer
from squeezed.decode.own import Rope

_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer; matrices are [rows, columns]."""

    attention: Any
    qkv: tuple[Tensor, ...]
    qkv_bias: tuple[Tensor, ...] | None
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    before_attention: Any
    before_mlp: Any


class FusedModel:
    """The model's weights, arranged for steps of one question; see :func:`why_not`.

    Args:
        first: position of the first own token.
        capacity: number of own tokens at most.
    """

    def __init__(self, model: PreTrainedModel, first: int, capacity: int) -> None:
        decoder = model.get_decoder()
        self._embedding = decoder.embed_tokens
        positions = torch.arange(first, first + capacity, device=model.device)[None]
        cos, sin = decoder.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._norm = _norm(decoder.norm)
        self._head = model.lm_head.weight
        self._layers = [_gather(layer) for layer in decoder.layers]
        config = model.config.get_text_config()
        self._q_heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads

    def __call__(self, token: Tensor, layers: Sequence[FixedLayer]) -> Tensor:
        """Logits [1, vocabulary] of one token.

        Args:
            token: [1, 1] int64.
            layers: with their `own` buffers in place.
        """
        from squeezed.decode.linear_triton import gated, project
        from squeezed.decode.qkv_triton import project_rotated

        x = self._embedding(token).view(-1)
        for layer, fixed in zip(self._layers, layers, strict=True):
            attention = layer.attention
            assert fixed.own is not None
            rope = Rope(self._cos, self._sin, *_head_norms(attention))
            if rope.query_norm is None and own_beside(q_heads=self._q_heads, layer=fixed):
                q = project_rotated(x, layer.qkv, layer.qkv_bias, layer.before_attention, rope, fixed.own)
                mixed = attend_step(q, fixed, attention.scaling, ahead=layer.o)
            else:
                q, k, v = self._split(project(x, layer.qkv, layer.qkv_bias, layer.before_attention))
                fixed.own.hold(k, v)
                mixed = attend_step(q, fixed, attention.scaling, rope)
            x = project(mixed.view(-1), (layer.o,), residual=x)
            x = project(gated(x, layer.gate, layer.up, layer.before_mlp), (layer.down,), residual=x)
        return project(x, (self._head,), norm=self._norm)[None]

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = qkv.shape[0] // (self._q_heads + 2 * self._kv_heads)
        sizes = [count * dim for count in (self._q_heads, self._kv_heads, self._kv_heads)]
        q, k, v = (part.view(1, -1, 1, dim) for part in qkv.split(sizes))
        return q, k, v


def why_not(model: PreTrainedModel, layers: Sequence[object], batch: int) -> str | None:
    """What stands against fused steps for this model and cache; None if nothing does."""
    text = model.config.get_text_config()
    kind = text.model_type
    if batch != 1:
        return f"a batch of {batch}"
    if kind not in _TYPES:
        return f"{kind} is not among {', '.join(_TYPES)}"
    if not all(isinstance(layer, FixedLayer) for layer in layers):
        return "layers with a sliding window"
    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linear = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        if any(type(module) is not nn.Linear or not module.weight.is_contiguous() for module in linear):
            return "weights that are not plain matrices"
        if attention.o_proj.bias is not None or any(module.bias is not None for module in linear[4:]):
            return "biases beyond those of queries, keys and values"
        if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
            return f"activation {type(mlp.act_fn).__name__}"
        if attention.head_dim not in (16, 32, 64, 128, 256):
            return f"head_dim {attention.head_dim}"
    if type(model.lm_head) is not nn.Linear or model.lm_head.bias is not None:
        return "an output head that is not a plain matrix"
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return None if len(devices) == len(dtypes) == 1 else "weights of several devices or dtypes"


def _gather(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biased = all(module.bias is not None for module in projections)
    return _Layer(
        attention=attention,
        qkv=tuple(module.weight for module in projections),
        qkv_bias=tuple(module.bias for module in projections) if biased else None,
        o=attention.o_proj.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
        before_attention=_norm(layer.input_layernorm),
        before_mlp=_norm(layer.post_attention_layernorm),
    )


def _norm(module: Any) -> Any:
    from squeezed.decode.linear_triton import Norm

    return Norm(module.weight, module.variance_epsilon)


def _head_norms(attention: Any) -> tuple[Tensor | None, Tensor | None, float]:
    norm = getattr(attention, "q_norm", None)
    if norm is None:
        return None, None, 0.0
    return norm.weight, attention.k_norm.weight, norm.variance_epsilon


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by no more than the order of roundings of their dtype explains."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < (1e-3 if expected.dtype == torch.float32 else 5e-2))
