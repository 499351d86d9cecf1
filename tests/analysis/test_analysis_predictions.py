"""Predictions against times measured on one H100 80GB SXM, and the limits that follow from them."""

from __future__ import annotations

import pytest
import torch
import transformers

from squeezed.analysis.cost import (
    Cost,
    Matrix,
    Operation,
    Precision,
    Step,
    decode,
    dense_attention,
    dense_operations,
    linear_cost,
    total,
)
from squeezed.analysis.devices import CATALOGUE, find_device
from squeezed.analysis.roofline import (
    crossover,
    floor_seconds,
    largest_context,
    memory_bytes,
    regime,
    seconds,
    smallest,
    token_seconds,
)
from squeezed.analysis.shape import Layer, shape_of
from squeezed.analysis.sparse import hierarchical, one_level
from squeezed.errors import InputError

BF16 = Precision()
H100 = find_device("H100")
# Context in K, query and KV heads, milliseconds of cuDNN attention at head dim 128 in bf16: one query, 1,024 queries.
# CUDA events around eager calls, medians.
MEASURED = [
    (32, 32, 8, 0.064, 0.90),
    (32, 32, 32, 0.193, 0.94),
    (128, 32, 8, 0.193, 3.53),
    (128, 32, 32, 0.709, 3.71),
    (512, 32, 8, 0.708, 15.2),
    (512, 32, 32, 2.77, 14.6),
]
# One query inside a CUDA graph, the same machine type, microseconds, another day.
IN_A_GRAPH = [
    (16, 8, 30.6),
    (32, 8, 52.1),
    (64, 8, 94.8),
    (128, 8, 180.9),
    (32, 32, 180.2),
    (128, 32, 698.4),
    (256, 32, 1382.2),
]
# One token through a linear layer inside a CUDA graph, weights larger than L2 in rotation, microseconds, the same day.
LINEAR = [(4096, 1024, 7.9), (4096, 4096, 16.0), (4096, 14336, 41.8), (14336, 4096, 44.0), (4096, 128256, 372.4)]


def attention_ms(context: int, q_heads: int, kv_heads: int, queries: int, launch: str) -> float:
    layer = Layer(1, q_heads, kv_heads, 128, None, ())
    # The benchmark's keys include the queries' own.
    step = Step(1, queries, context * 1024 - queries)
    return 1e3 * seconds(dense_attention(layer, step, BF16), H100, launch)


@pytest.mark.parametrize(("context", "q_heads", "kv_heads", "one_query", "many"), MEASURED)
def test_dense_attention_on_the_h100_is_predicted_within_15_percent(context, q_heads, kv_heads, one_query, many):
    assert attention_ms(context, q_heads, kv_heads, 1, "eager") == pytest.approx(one_query, rel=0.15)
    assert attention_ms(context, q_heads, kv_heads, 1024, "eager") == pytest.approx(many, rel=0.15)


@pytest.mark.parametrize(("context", "kv_heads", "microseconds"), IN_A_GRAPH)
def test_dense_decode_in_a_graph_is_predicted_within_15_percent(context, kv_heads, microseconds):
    assert 1e3 * attention_ms(context, 32, kv_heads, 1, "graph") == pytest.approx(microseconds, rel=0.15)


@pytest.mark.parametrize(("inputs", "outputs", "microseconds"), LINEAR)
def test_linear_layers_of_one_token_are_predicted_within_15_percent(inputs, outputs, microseconds):
    cost = linear_cost(Matrix("FFN", inputs, outputs), 1, BF16)
    assert 1e6 * seconds(Operation("FFN", "linear", 1, cost), H100) == pytest.approx(microseconds, rel=0.15)


@pytest.mark.parametrize(("context", "q_heads", "kv_heads", "one_query", "many"), MEASURED)
def test_no_measurement_beats_the_floor(context, q_heads, kv_heads, one_query, many):
    layer = Layer(1, q_heads, kv_heads, 128, None, ())
    for queries, measured in ((1, one_query), (1024, many)):
        step = Step(1, queries, context * 1024 - queries)
        assert floor_seconds(dense_attention(layer, step, BF16), H100) < measured / 1e3


@pytest.mark.parametrize(
    ("name", "ridge"),
    [
        ("A6000", 202),
        ("A100-40GB", 201),
        ("A100", 153),
        ("H100", 295),
        ("H200", 206),
        ("B200", 281),
        ("L40S", 419),
        ("RTX4090", 164),
    ],
)
def test_ridge_points_of_the_datasheets(name, ridge):
    assert find_device(name).ridge == pytest.approx(ridge, abs=0.6)


def test_achievable_peaks_lie_below_the_datasheet_and_name_their_source():
    for device in CATALOGUE:
        achievable = device.achievable
        assert 0 < achievable.attention < achievable.matmul < 1
        assert 0 < achievable.bandwidth < 1
        assert 0 < achievable.graph < achievable.eager < 1e-4
        assert "datasheet" in device.source or "whitepaper" in device.source
    assert H100.bandwidth * H100.achievable.bandwidth == pytest.approx(3.02e12)
    assert H100.flops * H100.achievable.attention == pytest.approx(604e12)
    assert "assumed" in find_device("A100").achievable.source


def test_device_names_forgive_case_and_spaces_and_unknown_ones_list_the_known():
    assert find_device("rtx 4090") is find_device("RTX4090")
    with pytest.raises(InputError, match=r"'TPU'.*A6000.*H100.*RTX4090.*cpu"):
        find_device("TPU")


def test_the_cpu_is_measured_on_the_spot():
    cpu = find_device("cpu")
    assert 1e9 < cpu.flops < 1e14
    assert 1e8 < cpu.bandwidth < 1e12
    assert cpu.element_bytes == 4
    assert 0 < cpu.achievable.graph < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_measured_on_the_spot():
    cuda = find_device("cuda")
    assert cuda.element_bytes == 2
    assert 1e12 < cuda.flops < 1e16
    assert 1e10 < cuda.bandwidth < 1e14
    assert 0.2 < cuda.achievable.attention <= 1
    assert 0 < cuda.achievable.graph < cuda.achievable.eager


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_without_a_cuda_device_that_is_said():
    with pytest.raises(InputError, match="torch finds no CUDA device"):
        find_device("cuda")


@pytest.fixture(scope="module")
def llama():
    return shape_of(transformers.LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("setting", [one_level(), hierarchical()])
def test_squeezing_pays_exactly_from_the_crossover(llama, batch, setting):
    start = crossover(llama, H100, BF16, batch, setting)

    def gain(context: int) -> float:
        dense = token_seconds(llama, H100, BF16, batch, context)
        return dense - token_seconds(llama, H100, BF16, batch, context, setting)

    assert start is not None
    assert gain(start) > 0 >= gain(start - 1)


def test_without_sparsity_squeezing_never_pays(llama):
    assert crossover(llama, H100, BF16, 1, one_level(0.0)) is None


@pytest.mark.parametrize("setting", [None, one_level(), hierarchical()])
@pytest.mark.parametrize("batch", [1, 16])
def test_the_largest_context_fits_and_one_more_token_does_not(llama, setting, batch):
    largest = largest_context(llama, H100, BF16, batch, setting)
    assert largest is not None
    room = 0.9 * H100.memory
    assert memory_bytes(llama, BF16, batch, largest, setting) <= room
    assert memory_bytes(llama, BF16, batch, largest + 1, setting) > room


def test_memory_limits_of_extreme_models():
    mixtral = shape_of(transformers.MixtralConfig())
    assert largest_context(mixtral, H100, BF16, 1) == 0  # 93 GB of weights
    sliding = shape_of(transformers.MistralConfig())
    assert largest_context(sliding, H100, BF16, 1) is None


def test_regimes_meet_at_the_ridge():
    assert regime(Cost(flops=295, read=1), H100) == "memory"
    assert regime(Cost(flops=296, read=1), H100) == "compute"


def test_batching_lifts_linear_layers_past_the_ridge_but_never_attention(llama):
    linear, attention = (
        [total(dense_operations(llama, decode(batch, 65536), BF16), kind).intensity for batch in (1, 16, 1024)]
        for kind in ("linear", "attention")
    )
    assert linear[0] < linear[1] < H100.ridge < linear[2]
    assert attention == pytest.approx([attention[0]] * 3)
    assert attention[0] == pytest.approx(4, rel=1e-3)  # a group of four query heads shares a KV head


def test_smallest_is_a_bisection_with_edges():
    assert smallest(lambda n: n >= 7, 0, 100) == 7
    assert smallest(lambda n: True, 3, 100) == 3
    assert smallest(lambda n: False, 3, 100) is None
