"""The counts are those of real forward passes: FLOPs by torch's counter, bytes by hooks, pairs by the mask itself."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from tiny_models import FAMILIES, build, run

from squeezed.analysis.cost import (
    Matrix,
    Precision,
    Step,
    causal_pairs,
    computed_pairs,
    dense_operations,
    expected_experts,
    linear_cost,
    total,
)
from squeezed.analysis.shape import shape_of

ELEMENTS = Precision(1, 1, 1)
DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen2-moe")]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pass_is_counted_exactly(name):
    config = FAMILIES[name]()
    model, shape = build(config), shape_of(config)
    cache, past, batch = None, 0, 2
    # Prefill, a generated token, user input, a generated token: past the windows of the sliding families.
    for tokens, logits in [(9, 9), (1, 1), (4, 1), (1, 1)]:
        seen, cache = run(model, batch, tokens, cache, logits)
        step = Step(batch, tokens, past, logits=logits)
        operations = dense_operations(shape, step, ELEMENTS, computed_pairs)
        assert total(operations, "linear").flops == seen.linear_flops
        assert total(operations, "attention").flops == seen.attention_flops
        assert total(operations, "attention").bytes == seen.attention_elements
        if name in DENSE:
            assert total(operations, "linear").bytes == seen.linear_elements
        layers = [layer for layer in shape.layers for _ in range(layer.count)]
        assert sorted(causal_pairs(layer, step) for layer in layers) == sorted(seen.pairs)
        past += tokens


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_bytes_of_experts_are_exact_given_how_many_are_touched(name, tokens):
    config = FAMILIES[name]()
    seen, _ = run(build(config), 1, tokens)
    shape = shape_of(config)
    matrices = [m for layer in shape.layers for m in layer.matrices for _ in range(layer.count)]
    plain = sum(linear_cost(m, tokens, ELEMENTS).bytes for m in [*matrices, shape.head] if m.experts == 1)
    per_layer = {(m.inputs, m.outputs): m for m in matrices if m.experts > 1}
    routed = sum(
        linear_cost(m, tokens, ELEMENTS, touched).bytes for touched in seen.touched for m in per_layer.values()
    )
    assert len(seen.touched) == sum(m.experts > 1 for m in matrices) // 2
    assert plain + routed == seen.linear_elements


@pytest.mark.parametrize(("experts", "active", "tokens"), [(4, 1, 3), (4, 2, 2), (5, 2, 3), (3, 3, 2), (6, 2, 1)])
def test_expected_experts_is_the_mean_over_all_routings(experts, active, tokens):
    choices = list(itertools.combinations(range(experts), active))
    routings = list(itertools.product(choices, repeat=tokens))
    mean = sum(len(set().union(*routing)) for routing in routings) / len(routings)
    assert expected_experts(experts, active, tokens) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_kv_cache_are_those_of_the_model(name):
    config = FAMILIES[name]()
    model, shape = build(config), shape_of(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    _, cache = run(model, 1, 4)
    _, cache = run(model, 1, 1, cache)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    # A sliding layer of transformers keeps one token less than its window: the next token brings its own.
    assert abs(held - shape.kv_elements(5)) <= sum(
        layer.count * layer.kv_elements for layer in shape.layers if layer.window
    )
    if all(layer.window is None for layer in shape.layers):
        assert held == shape.kv_elements(5)


def test_weights_of_experts_are_read_once_however_many_tokens_share_them():
    matrix = Matrix("experts", 8, 16, experts=4, active=2)
    many = linear_cost(matrix, 10_000, ELEMENTS)
    activations = 10_000 * 2 * (8 + 16)
    assert many.bytes - activations == pytest.approx(4 * 8 * 16)
    assert many.flops == 2 * 10_000 * 2 * 8 * 16


def test_precision_weighs_weights_cache_and_activations_apart():
    shape = shape_of(FAMILIES["llama"]())
    step = Step(2, 1, 50)

    def moved(*precision: float) -> float:
        return total(dense_operations(shape, step, Precision(*precision))).bytes

    assert moved(4, 2, 1) == 4 * moved(1, 0, 0) + 2 * moved(0, 1, 0) + moved(0, 0, 1)
    assert moved(0, 1, 0) == 2 * shape.kv_elements(51)


def test_multi_query_attention_of_falcon_has_one_kv_head():
    layer = shape_of(transformers.FalconConfig(num_hidden_layers=2)).layers[0]
    assert (layer.q_heads, layer.kv_heads, layer.head_dim, layer.count) == (71, 1, 64, 2)


def test_known_models_have_their_published_sizes():
    llama = shape_of(transformers.LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256))
    assert llama.parameters == 8_030_261_248
    assert llama.kv_elements(131072) * 2 == 16 * 2**30
    mixtral = shape_of(transformers.MixtralConfig())
    assert mixtral.parameters == 46_702_792_704


def test_counting_allocates_nothing():
    config = transformers.LlamaConfig(num_hidden_layers=126, hidden_size=16384, intermediate_size=53248)
    before = torch.get_rng_state()
    assert shape_of(config).parameters > 3e11
    assert torch.equal(before, torch.get_rng_state())
