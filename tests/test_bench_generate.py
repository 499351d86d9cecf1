"""The end-to-end benchmark compares what it says it compares; its times are not tested."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.bench import shapes
from squeezed.bench.device_generate import compare_answers, weight_bytes
from squeezed.bench.generate import time_generation_on_device, time_shape
from squeezed.bench.shapes import PlantedContext, random_model
from squeezed.config import PRESETS
from squeezed.context import FixedContext
from squeezed.errors import InputError

TINY = {
    **shapes.SHAPES["llama-3.1-8b"],
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return "tiny"


def test_nothing_left_out_is_no_error(
    llama: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = time_generation_on_device(llama, tokenizer, context, tiny.QUESTIONS[:2], 0.0, 8)
    assert row["squeezed"]["equal_tokens"] == row["squeezed"]["same_top_token"] == 1
    assert row["squeezed"]["logit_error"] < 1e-6
    assert row["squeezed"]["kv_budget"] == row["dense"]["kv_budget"] == 1
    assert row["chosen"] == "dense"


def test_leaving_keys_out_shows_in_error_and_budget(
    llama: PreTrainedModel, context: FixedContext, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = time_generation_on_device(llama, tokenizer, context, tiny.QUESTIONS[:2], 0.9, 8)
    assert row["squeezed"]["logit_error"] > 1e-3
    assert row["squeezed"]["kv_budget"] < 0.5
    assert row["squeezed"]["floor_ms"] < row["dense"]["floor_ms"]


@pytest.mark.parametrize(("levels", "preset"), [(1, "paper"), (2, "paper"), (1, "best")])
def test_a_planted_context_realises_the_sparsity_that_is_asked_for(levels: int, preset: str, tiny_shape: str) -> None:
    config = replace(PRESETS[preset], levels=levels)
    rows = time_shape(tiny_shape, [2000, 3000], 0.9, config, 20, 8, "cpu", torch.float32)
    assert [row["context"] for row in rows] == [2000, 3000]
    for row in rows:
        assert row["squeezed"]["kept_fraction"] == pytest.approx(0.1, abs=0.06)
        assert row["fixed_context"] == "planted keys, not prefilled"


def test_planted_heads_differ_in_sharpness(tiny_shape: str) -> None:
    model = random_model(tiny_shape, "cpu", torch.float32)
    planted = PlantedContext(model, 2000)
    for query, layer in zip(planted._observe(model), planted.layers, strict=True):
        logits = 0.25 * query[0].reshape(2, -1, 16) @ layer.keys[:, : layer.clustered].transpose(1, 2)
        deviation = logits.std(-1).mean(-1)
        assert deviation.max() / deviation.min() > 3


def test_compared_answers_count_up_to_their_first_difference() -> None:
    expected = torch.eye(3)
    logits = expected.clone()
    logits[2] = torch.tensor([1.0, 0.0, 0.0])
    found = compare_answers([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]], logits, expected)
    assert found["equal_tokens"] == 0.75
    assert found["same_top_token"] == pytest.approx(2 / 3)
    assert found["logit_error"] == pytest.approx(2**0.5 / 3)


def test_a_tied_head_is_read_and_an_embedding_is_not() -> None:
    tied, own = tiny.model("llama", tie_word_embeddings=True), tiny.model("llama")
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    assert weight_bytes(own) == sum(p.nbytes for p in own.parameters()) - own.get_input_embeddings().weight.nbytes


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"llama-9: expected one of llama-3\.1-8b|llama-9"):
        random_model("llama-9", "cpu", torch.float32)
