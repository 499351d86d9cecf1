"""Squeezed Attention costs what the paper says, and what the products it is made of do."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from squeezed.analysis.cost import Precision, Step, attention_cost, decode, dense_operations, total
from squeezed.analysis.shape import Layer, shape_of
from squeezed.analysis.sparse import (
    Squeeze,
    hierarchical,
    kv_budget,
    one_level,
    squeezed_attention,
    squeezed_operations,
    with_budget,
)

ELEMENTS = Precision(1, 1, 1)
LAYER = Layer(1, 8, 2, 16, None, ())


def test_budgets_of_the_paper():
    assert kv_budget(one_level(0.9)) == pytest.approx(0.125)
    assert kv_budget(one_level(0.7)) == pytest.approx(0.325)
    # The paper quotes 0.112 for two levels: the exact count less the level-1 centroids (1% of the keys, keys only).
    assert kv_budget(hierarchical(0.9)) == pytest.approx(0.1175)
    assert kv_budget(hierarchical(0.9)) - 0.01 / 2 == pytest.approx(0.1125)


@pytest.mark.parametrize("setting", [one_level(0.9), hierarchical(0.9), one_level(0.5)])
@pytest.mark.parametrize("context", [2_100, 100_100])
def test_bytes_of_a_decode_step_are_the_kv_budget(setting, context):
    operations = squeezed_attention(LAYER, decode(1, context), Precision(1, 1, 0), setting)
    own_token = LAYER.kv_elements
    share = (total(operations).bytes - own_token) / (context * LAYER.kv_elements)
    assert share == pytest.approx(kv_budget(setting, context), rel=1e-12)


def test_a_budget_is_turned_back_into_a_setting():
    for setting, levels in ((one_level(0.9), 1), (hierarchical(0.8), 2)):
        assert with_budget(kv_budget(setting), levels).sparsity == pytest.approx(setting.sparsity)
    assert with_budget(0.001, 1).sparsity == 1


def test_flops_are_those_of_the_products_it_is_made_of():
    setting, clustered, own, queries = Squeeze(0.75, centroids=0.25, window=20), 80, 5, 3
    step = Step(1, queries, clustered + setting.window + own, fixed=clustered + setting.window)
    query = torch.randn(LAYER.q_heads, queries, LAYER.head_dim)
    keys = {"centroids": clustered // 4, "important": clustered // 4 + setting.window}
    with FlopCounterMode(display=False) as lookup:
        query @ torch.randn(LAYER.q_heads, LAYER.head_dim, keys["centroids"])
    with FlopCounterMode(display=False) as sparse:
        query @ torch.randn(LAYER.q_heads, LAYER.head_dim, keys["important"])
        torch.randn(LAYER.q_heads, queries, keys["important"]) @ torch.randn(
            LAYER.q_heads, keys["important"], LAYER.head_dim
        )
    centroid_lookup, sparse_attention = squeezed_attention(LAYER, step, ELEMENTS, setting)
    assert centroid_lookup.cost.flops == lookup.get_total_flops()
    pairs = queries * own + math.comb(queries + 1, 2)
    own_flops = 4 * LAYER.q_heads * LAYER.head_dim * pairs
    assert sparse_attention.cost.flops == sparse.get_total_flops() + own_flops


def test_with_no_sparsity_and_no_centroids_it_is_dense_attention():
    step = Step(3, 7, 500, fixed=480)
    squeezed = total(squeezed_attention(LAYER, step, ELEMENTS, Squeeze(0, centroids=0, block=7)))
    dense = attention_cost(LAYER, step, ELEMENTS)
    extra_queries = 3 * 7 * LAYER.q_heads * LAYER.head_dim  # the lookup reads the queries too
    assert squeezed.flops == dense.flops
    assert squeezed.bytes == dense.bytes + extra_queries


def test_a_block_of_queries_shares_one_selection():
    cache_only = Precision(0, 1, 0)

    def moved(queries: int) -> float:
        step = Step(1, queries, 10_000)
        own = attention_cost(LAYER, Step(1, queries), cache_only).bytes
        return total(squeezed_attention(LAYER, step, cache_only, Squeeze(block=128))).bytes - own

    assert moved(128) == moved(1)
    assert moved(129) == moved(256) == 2 * moved(128)


def test_sliding_layers_and_short_contexts_stay_dense():
    gemma = shape_of(FAMILIES["gemma3"]())
    names = [
        op.name for op in squeezed_operations(gemma, decode(1, 4096), ELEMENTS, one_level()) if op.kind == "attention"
    ]
    assert sorted(names) == ["centroid lookup", "sparse attention", "window attention"]
    short = decode(1, 100)
    assert squeezed_operations(gemma, short, ELEMENTS, one_level()) == dense_operations(gemma, short, ELEMENTS)


def test_linear_layers_do_not_change():
    llama = shape_of(FAMILIES["llama"]())
    step = decode(4, 9000)
    dense, squeezed = (
        total(operations, "linear")
        for operations in (
            dense_operations(llama, step, ELEMENTS),
            squeezed_operations(llama, step, ELEMENTS, hierarchical()),
        )
    )
    assert dense == squeezed
