"""Another model than a context's is refused before its weights are read, wherever its configuration shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel

from squeezed.artifact import read_manifest
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.models import load_model, model_identity

_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _save_folder(lm: PreTrainedModel, path: Path) -> Path:
    lm.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def _save_gguf(lm: PreTrainedModel, path: Path) -> Path:
    """One file with a Llama and a tokenizer of bytes."""
    config, path = lm.config, path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny.tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        [t.replace(" ", "Ġ").replace("\n", "Ċ") for t in sorted(vocabulary, key=vocabulary.__getitem__)]
    )
    writer.add_token_merges(["a n", "t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.TEMPLATE)
    for name, parameter in lm.model.named_parameters():
        layer, _, part = name.removeprefix("layers.").removesuffix(".weight").partition(".")
        known = f"blk.{layer}.{_GGUF_NAMES[part]}" if part else _GGUF_NAMES[layer]
        writer.add_tensor(f"{known}.weight", parameter.detach().numpy())
    writer.add_tensor("output.weight", lm.lm_head.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SAVED: dict[str, Callable[[PreTrainedModel, Path], Path]] = {"folder": _save_folder, "gguf": _save_gguf}
OTHERS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 2},
    "KV heads": {"num_key_value_heads": 4},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.fixture
def weights_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **options: object) -> None:
        raise AssertionError("the weights were to be read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)


@pytest.fixture(scope="module", params=SAVED)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(kind: str, llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of a model that was loaded from its files, as `squeeze build` writes it."""
    folder = tmp_path_factory.mktemp("contexts")
    source = SAVED[kind](llama, folder / "model")
    context = FixedContext.from_text(*load_model(str(source)), tiny.text(), tiny.BUILD)
    replace(context, model={**context.model, "source": str(source)}).save(folder / "manual")
    return folder / "manual"


@pytest.mark.parametrize("options", [[], ["--batch"]])
@pytest.mark.parametrize("case", OTHERS)
def test_it_is_refused_by_its_configuration_alone(
    case: str,
    options: list[str],
    kind: str,
    built: Path,
    tmp_path: Path,
    run_squeeze: tiny.Run,
    weights_forbidden: None,
) -> None:
    other = SAVED[kind](tiny.model("llama", **OTHERS[case]), tmp_path / "other")
    status, out, said = run_squeeze("ask", built, "Who?", "--model", other, *options)
    assert (status, out) == (2, "")
    (line,) = said.splitlines()
    assert line.startswith("squeeze: the context was built with another model configuration")
    assert line.endswith("load the model it was built with, or build it again with this one")


def test_it_is_refused_by_its_weights_where_the_configuration_is_the_same(
    kind: str, built: Path, tmp_path: Path, run_squeeze: tiny.Run
) -> None:
    other = SAVED[kind](tiny.model("llama", seed=1), tmp_path / "other")
    status, out, said = run_squeeze("ask", built, "Who?", "--model", other)
    assert (status, out) == (2, "")
    assert "another model weights (fingerprint)" in said


def test_the_model_of_the_context_answers(built: Path, run_squeeze: tiny.Run) -> None:
    assert run_squeeze("ask", built, "Who?", "--max-new-tokens", 1)[0] == 0


def test_another_type_is_named_as_such(built: Path, tmp_path: Path, weights_forbidden: None) -> None:
    other = _save_folder(tiny.model("qwen2-bias"), tmp_path / "other")
    with pytest.raises(InputError, match="another model type: llama, and this model has qwen2;"):
        load_model(str(other), expected=read_manifest(built).model)


def test_a_folder_that_holds_another_model_by_now_says_how_to_name_the_old_one(
    context: FixedContext, tmp_path: Path, run_squeeze: tiny.Run, weights_forbidden: None
) -> None:
    source = _save_folder(tiny.model("llama", num_hidden_layers=2), tmp_path / "model")
    replace(context, model={**context.model, "source": str(source)}).save(tmp_path / "manual")
    (tmp_path / "more.txt").write_text(tiny.text())
    status, _, said = run_squeeze("extend", tmp_path / "manual", tmp_path / "more.txt")
    assert status == 2
    assert "another model configuration" in said
    assert "if the model has moved, pass --model" in said


def _emu3() -> transformers.Emu3Config:
    """Of text and images; transformers loads the text's part alone, whose type is another."""
    sizes = {"hidden_dim": 32, "embed_dim": 8, "latent_channels": 8, "z_channels": 8, "codebook_size": 16}
    images = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, **sizes}
    return transformers.Emu3Config(text_config=tiny._COMMON, vq_config=images, vocabulary_map={"<image>": 1})


_ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the weights would have to be in 8 bits")


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "emu3", pytest.param("fp8", marks=_ON_A_CPU)])
def test_no_model_is_taken_for_another_before_it_is_loaded(family: str, tmp_path: Path) -> None:
    config = {"emu3": _emu3, "fp8": tiny.FAMILIES["llama"], **tiny.FAMILIES}[family]()
    folder = _save_folder(tiny.from_config(config), tmp_path / "model")
    if family == "emu3":
        config.save_pretrained(folder)
    if family == "fp8":  # which is dequantized on a CPU, and then says nothing of it
        fields = json.loads((folder / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
        (folder / "config.json").write_text(json.dumps(fields))
    identity = model_identity(load_model(str(folder))[0])
    again, _ = load_model(str(folder), expected=identity)
    assert model_identity(again) == identity
