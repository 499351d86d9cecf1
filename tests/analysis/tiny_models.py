"""Small random models of many families, and counts taken from what their forward passes really do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

_COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GQA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GQA),
    "llama-mha-bias": lambda: transformers.LlamaConfig(
        **{**_GQA, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_GQA),
    "qwen3": lambda: transformers.Qwen3Config(**_GQA, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GQA, head_dim=16, sliding_window=6, layer_types=_WINDOWS, **_TOKENS
    ),
    "mistral": lambda: transformers.MistralConfig(**_GQA, sliding_window=5),
    "phi3": lambda: transformers.Phi3Config(**_GQA, **_TOKENS),
    "starcoder2": lambda: transformers.Starcoder2Config(**_GQA),
    "gpt-bigcode-mqa": lambda: transformers.GPTBigCodeConfig(**_GPT2, n_inner=48, multi_query=True),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "mixtral": lambda: transformers.MixtralConfig(**_GQA, num_local_experts=6, num_experts_per_tok=2),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **_GQA,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
}


@dataclass
class Seen:
    """What one forward pass did: FLOPs by kind, elements moved by kind, unmasked query-key pairs per layer."""

    linear_flops: int = 0
    attention_flops: int = 0
    linear_elements: int = 0
    attention_elements: int = 0
    pairs: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)  # distinct experts, per layer that has any


def build(config: Any) -> Any:
    """A random model in evaluation mode whose attention and experts run as plain, countable operations."""
    torch.manual_seed(0)
    config._attn_implementation = "counted"
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()


def run(model: Any, batch: int, tokens: int, cache: Any = None, logits: int = 0) -> tuple[Seen, Any]:
    """One forward pass of random tokens after what `cache` holds; `logits` = 0 sends all positions through the head."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    ids = torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    seen = Seen()
    counter = FlopCounterMode(display=False)
    _watching[:] = [(seen, counter)]
    with torch.no_grad(), _hooks(model, seen), counter:
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=logits)
    counts = counter.get_flop_counts()["Global"]
    # The other products are attention's, counted apart, and the outer product of rotary embedding.
    seen.linear_flops = sum(flops for operation, flops in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    return seen, cache


_watching: list[tuple[Seen, FlopCounterMode]] = []  # the pass that is being run


def _attend(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **_: Any
) -> tuple[Any, None]:
    """Attention as its two products; notes operands, FLOPs and the mask that transformers hands over."""
    groups = query.shape[1] // key.shape[1]
    seen, counter = _watching[-1]
    before = counter.get_total_flops()
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask
    output = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    seen.attention_flops += counter.get_total_flops() - before
    seen.attention_elements += sum(t.numel() for t in (query, key, value, output))
    visible = scores[0, 0] if attention_mask is None else attention_mask[0, 0]
    seen.pairs.append(int((visible > torch.finfo(visible.dtype).min / 2).sum()))
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("counted", _attend)
AttentionMaskInterface.register("counted", eager_mask)


@contextmanager
def _hooks(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Forward hooks on every linear module; products outside one (routers, experts) are caught at F.linear."""
    inside = [0]

    def before(module: nn.Module, inputs: Any) -> None:
        inside[0] += 1

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        inside[0] -= 1
        weights = sum(parameter.numel() for parameter in module.parameters())
        seen.linear_elements += weights + inputs[0].numel() + output.numel()

    experts: dict[int, set[int]] = {}

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is nn.functional.linear and not inside[0]:
                left, weight = args[0], args[1]
                seen.linear_elements += weight.numel() + left.numel() + output.numel()
                base = weight._base if weight._base is not None else weight
                if base.ndim == 3:
                    experts.setdefault(base.data_ptr(), set()).add(weight.data_ptr())
            return output

    modules = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [
        handle for m in modules for handle in (m.register_forward_pre_hook(before), m.register_forward_hook(after))
    ]
    with Products():
        yield
    for handle in handles:
        handle.remove()
    seen.touched = [len(used) for used in experts.values()][::2]
