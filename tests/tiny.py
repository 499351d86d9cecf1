"""Small random models of many families, a tokenizer that merges across the seam, and a text to ask about."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.config import BuildConfig

SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!:'-\n"
# A full stop takes the line breaks that follow it, and "?" the exclamation marks: tokens that exist only when both
# sides of the seam stand together.
MERGES = [
    ("\n", "\n"),
    (".", "\n\n"),
    ("a", "n"),
    ("t", "h"),
    ("th", "e"),
    (" ", "the"),
    ("?", "!"),
    ("?!", "?!"),
    ("e", "r"),
    (".", " "),
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Run = Callable[..., tuple[int, str, str]]
BUILD = BuildConfig(clusters=0.1, window=24, chunk=96, iterations=5)
QUESTIONS = ("Who?", "what is the second word of the text, and why?", "list three words.")


def tokenizer(template: str | None = TEMPLATE, bos: bool = False) -> PreTrainedTokenizerFast:
    """Characters and the MERGES; with `bos`, plain text gets <s> in front, as Llama's does."""
    return _wrap(_bpe(ALPHABET, MERGES), template, bos)


def prefix_space_tokenizer(template: str | None = TEMPLATE, bos: bool = False) -> PreTrainedTokenizerFast:
    """Like a sentencepiece model: a space in front of everything, so that no tail tokenises as it does in the whole."""
    spaced = [(left.replace(" ", "▁"), right.replace(" ", "▁")) for left, right in MERGES]
    backend = _bpe(ALPHABET.replace(" ", "▁"), spaced)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return _wrap(backend, template, bos)


def _bpe(alphabet: str, merges: list[tuple[str, str]]) -> Tokenizer:
    tokens = [*SPECIALS, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return backend


def _wrap(backend: Tokenizer, template: str | None, bos: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(SPECIALS))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


VOCABULARY = len(tokenizer())


def text(characters: int = 300, seed: int = 0) -> str:
    """Made-up sentences that end in a full stop."""
    generator = random.Random(seed)
    words = ("the", "than", "anther", "Water", "rant", "net", "Stone", "thereabouts", "42", "lanterns", "of", "an")
    out = ""
    while len(out) < characters:
        out += " ".join(generator.choices(words, k=6)) + ". "
    return out.strip()


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_SLIDES_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _config(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**_COMMON, **changes})


# The longrope of Phi-3-128k: other frequencies once a sequence is longer than the model was first trained for.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(8)],
    "long_factor": [2.0 + 0.2 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config("Llama"),
    "llama-mha": _config("Llama", num_key_value_heads=4),
    "llama-mqa-128": _config("Llama", num_key_value_heads=1, head_dim=128),
    "llama3-rope": _config("Llama", rope_parameters=_LLAMA3_ROPE),
    "qwen2-bias": _config("Qwen2"),
    "qwen3-norm-128": _config("Qwen3", head_dim=128),
    "mistral-64": _config("Mistral", head_dim=64, sliding_window=None),
    "ministral-mixed": _config("Ministral", head_dim=16, sliding_window=20, layer_types=_SLIDES_AND_FULL),
    "gemma-mqa-256": _config("Gemma", num_key_value_heads=1, head_dim=256),
    "gemma3-sliding": _config(
        "Gemma3Text", head_dim=64, sliding_window=20, layer_types=_SLIDES_AND_FULL, query_pre_attn_scalar=16
    ),
    "smollm3-nope": _config("SmolLM3", no_rope_layers=[1, 0, 1], use_sliding_window=False),
    "phi3-fused": _config("Phi3", sliding_window=None),
    "phi3-longrope": _config(
        "Phi3", rope_parameters=_LONG_ROPE, original_max_position_embeddings=128, sliding_window=None
    ),
    "olmo2": _config("Olmo2"),
    "olmo3-sliding": _config("Olmo3", sliding_window=20, layer_types=_SLIDES_AND_FULL),
    "granite": _config("Granite", attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=2.0),
    "starcoder2": _config("Starcoder2", sliding_window=None),
    "cohere": _config("Cohere"),
    "cohere2-sliding": _config("Cohere2", sliding_window=20, layer_types=_SLIDES_AND_FULL),
    "glm4": _config("Glm4", head_dim=16, partial_rotary_factor=0.5),
    "phi": _config("Phi"),
    "seed-oss": _config("SeedOss", head_dim=16),
    "exaone4-sliding": _config("Exaone4", sliding_window=20, layer_types=_SLIDES_AND_FULL),
    "nemotron": _config("Nemotron"),
    "mixtral": _config("Mixtral", num_local_experts=4, sliding_window=None),
    "qwen2-moe": _config("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": _config("Qwen3Moe", **_EXPERTS, head_dim=16),
    "olmoe": _config("Olmoe", num_experts=4, num_experts_per_tok=2),
}


def model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with weights large enough that attention is peaked and greedy tokens vary."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return from_config(config, seed)


def from_config(config: Any, seed: int = 0) -> PreTrainedModel:
    """A random model of any configuration, with attention as `load_model` asks for it."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    made.generation_config.eos_token_id = None
    return made


def generate(lm: PreTrainedModel, new_tokens: int = 16, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens [B, new] and the logits [B, vocabulary] of each step."""
    out = lm.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], list(out.logits)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def tensors(part: object) -> Iterator[Tensor]:
    """All tensors of a context or a part of it, in order."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Tensor):
                yield item
            elif hasattr(item, "__dataclass_fields__"):
                yield from tensors(item)
