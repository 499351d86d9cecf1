"""Models that can't be squeezed are refused by name, before or right after loading, with the reason in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.models import load_model, plan_layers

_GPT = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_COMMON = tiny._COMMON
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (lambda: transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1), "encoder-decoder"),
    "mamba": (lambda: transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1), "linear_attention"),
    "qwen3_next": (lambda: transformers.Qwen3NextConfig(**_COMMON, num_experts=2), "linear_attention"),
    "jamba": (lambda: transformers.JambaConfig(**_COMMON, num_experts=2), "linear_attention"),
    "gemma2": (lambda: transformers.Gemma2Config(**_COMMON, head_dim=16), "caps its attention logits"),
    "gpt_oss": (lambda: transformers.GptOssConfig(**_COMMON, **_EXPERTS), "attention sinks"),
    "deepseek_v3": (lambda: transformers.DeepseekV3Config(**_COMMON, n_routed_experts=8), "compressed latent"),
    "llama4_text": (lambda: transformers.Llama4TextConfig(**_COMMON, attention_chunk_size=64), "within chunks"),
    "gemma3n_text": (lambda: transformers.Gemma3nTextConfig(num_kv_shared_layers=2), "shares keys and values"),
    "bloom": (lambda: transformers.BloomConfig(**_GPT), "ALiBi"),
    "mpt": (lambda: transformers.MptConfig(vocab_size=60, d_model=32, n_layers=1, n_heads=4), "ALiBi"),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
        ),
        "ALiBi",
    ),
    "diffllama": (lambda: transformers.DiffLlamaConfig(**_COMMON), "subtracts one attention"),
    "doge": (lambda: transformers.DogeConfig(**_COMMON), "masks keys"),
    "mistral": (lambda: transformers.MistralConfig(**_COMMON, sliding_window=64), "sliding window of 64 tokens"),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4), "no self_attn"),
    "stablelm": (lambda: transformers.StableLmConfig(**_COMMON), "transformers' interface"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_of_an_unsupported_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    if kind in ("mistral", "gpt2", "stablelm"):  # these show only once the model is there
        (tmp_path / "model.safetensors").unlink()
        tiny.from_config(make()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_model(str(tmp_path))
    assert kind in str(refusal.value)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "stablelm", "diffllama"])
def test_a_model_in_memory_is_refused_likewise(kind: str) -> None:
    make, reason = REFUSED[kind]
    lm = tiny.from_config(make())
    with pytest.raises(InputError, match=reason):
        FixedContext.from_text(lm, tiny.tokenizer(), tiny.text(), tiny.BUILD)
    with pytest.raises(InputError, match=reason), attached(lm):
        pass


def test_a_sliding_window_that_no_sequence_outgrows_is_no_window() -> None:
    lm = tiny.from_config(transformers.MistralConfig(**_COMMON, sliding_window=4096))
    assert plan_layers(lm).squeezed == (0, 1, 2)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny.FAMILIES["llama"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no weights"):
        load_model(str(tmp_path))


def test_a_folder_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="can't be loaded"):
        load_model(str(tmp_path))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(InputError, match="can't be loaded"):
        load_model(str(tmp_path))


def test_a_folder_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing.gguf"])
def test_a_path_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_model(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    with pytest.raises(InputError, match=r"is a file and no \.gguf"):
        load_model(str(tmp_path / "a.md"))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_dynamic_rope_is_refused_beyond_its_original_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    short = transformers.LlamaConfig(**{**_COMMON, "max_position_embeddings": 200}, rope_parameters=rope)
    with pytest.raises(InputError, match=r"dynamic RoPE|tokens long"):
        FixedContext.from_text(tiny.from_config(short), tiny.tokenizer(), tiny.text(), tiny.BUILD)
