"""Configurations are found wherever models live, and refused by naming what they lack."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import transformers
from tiny_models import FAMILIES

from squeezed.analysis.shape import shape_of
from squeezed.analysis.source import load_config, missing_fields
from squeezed.errors import InputError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def write(path, fields) -> str:
    path.write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in LLAMA.items() if name not in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_is_read_back_unchanged(name, tmp_path):
    config = FAMILIES[name]()
    config.save_pretrained(tmp_path)
    expected = shape_of(config, "x")
    assert shape_of(load_config(str(tmp_path)), "x") == expected
    assert shape_of(load_config(str(tmp_path / "config.json")), "x") == expected


def test_every_missing_field_is_named(tmp_path):
    path = write(tmp_path / "config.json", without("hidden_size", "num_hidden_layers", "vocab_size"))
    with pytest.raises(InputError, match="lacks vocab_size, hidden_size, num_hidden_layers;"):
        load_config(path)
    with pytest.raises(InputError, match="lacks model_type, num_attention_heads;"):
        load_config(write(tmp_path / "bare.json", without("model_type", "num_attention_heads")))


def test_a_null_size_is_missing():
    assert missing_fields({**LLAMA, "intermediate_size": None}) == ["intermediate_size"]


def test_fields_that_transformers_derives_may_be_left_out(tmp_path):
    # Llama 1 and 2 state no KV heads: every head has its own.
    config = load_config(write(tmp_path / "config.json", without("num_key_value_heads")))
    assert shape_of(config).layers[0].kv_heads == 32
    assert shape_of(config).layers[0].head_dim == 128


@pytest.mark.parametrize(
    ("family", "lost", "named"),
    [
        ("mixtral", "num_experts_per_tok", "num_experts_per_tok"),
        ("qwen2-moe", "moe_intermediate_size", "moe_intermediate_size"),
        ("gemma3", "sliding_window", "sliding_window"),
        ("gpt2", "n_layer", "n_layer"),
        ("mistral", "num_key_value_heads", "num_key_value_heads"),
    ],
)
def test_sizes_of_every_family_are_checked(family, lost, named):
    fields = FAMILIES[family]().to_dict()
    assert missing_fields(fields) == []
    del fields[lost]
    assert missing_fields(fields) == [named]


def test_an_unused_window_may_be_absent():
    fields = {**LLAMA, "model_type": "qwen2"}
    assert missing_fields(fields) == []
    assert missing_fields({**fields, "use_sliding_window": True}) == ["sliding_window"]


@pytest.mark.parametrize("family", [transformers.Qwen2Config, transformers.Qwen2MoeConfig, transformers.Qwen3MoeConfig])
def test_a_window_counts_only_where_it_is_used(family):
    sizes = {"num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 2}
    unused = shape_of(family(**sizes, use_sliding_window=False))
    used = shape_of(family(**sizes, use_sliding_window=True))
    assert {layer.window for layer in unused.layers} == {None}
    assert 8 in {layer.window for layer in used.layers}


def test_nested_sections_keep_the_defaults_that_transformers_drops_when_saving(tmp_path):
    whole = transformers.Gemma3Config(text_config={"hidden_size": 64, "num_hidden_layers": 2})
    whole.save_pretrained(tmp_path)
    shape = shape_of(load_config(str(tmp_path)))
    assert (shape.hidden, shape.depth, shape.layers[0].q_heads) == (64, 2, 8)


def test_a_gguf_file_is_read(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(61)
    writer.add_tensor("token_embd.weight", np.zeros((61, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = shape_of(load_config(str(path)))
    assert (shape.depth, shape.hidden, shape.vocabulary) == (2, 32, 61)
    assert (shape.layers[0].q_heads, shape.layers[0].kv_heads, shape.layers[0].head_dim) == (4, 2, 8)


def test_bad_places_and_contents_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "fake.gguf").write_bytes(b"not a gguf file")
    cases = {
        str(tmp_path / "nowhere"): "no such file",
        str(tmp_path / "nowhere.gguf"): "no such file",
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "broken.json"): "not JSON",
        str(tmp_path / "list.json"): "JSON list",
        str(tmp_path / "fake.gguf"): "no configuration found",
        write(tmp_path / "unknown.json", {**LLAMA, "model_type": "nonesuch"}): "'nonesuch' is unknown",
        write(tmp_path / "bad.json", {**LLAMA, "hidden_size": "wide"}): "refuses.*hidden_size",
        write(tmp_path / "odd.json", {**LLAMA, "num_attention_heads": 3}): "refuses.*not a multiple",
    }
    for model, complaint in cases.items():
        with pytest.raises(InputError, match=complaint) as caught:
            load_config(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (transformers.DeepseekV2Config(), "multi-head latent attention"),
        (transformers.Llama4TextConfig(), "chunked_attention"),
        (transformers.T5Config(), "does not build a causal language model"),
        (transformers.BertConfig(is_decoder=True), "not recognised"),
    ],
)
def test_models_that_are_not_modelled_are_refused(config, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        shape_of(config)
    assert "\n" not in str(caught.value)
