"""The asymptotic table follows from exact counts, and from counts of real forward passes alike."""

from __future__ import annotations

from fractions import Fraction

import pytest
import transformers
from tiny_models import FAMILIES, Seen, build, run

from squeezed.analysis.asymptotics import counted, evaluate, interpolate, leading, table
from squeezed.analysis.shape import shape_of

# Worked out by hand from the definitions.
EXPECTED = {
    ("prefill", "linear"): ("O(BSd²)", "O(BSd + d²)", "O(BSd / (BS + d))"),
    ("prefill", "attention"): ("O(BS²d)", "O(BSd)", "O(S)"),
    ("prefill", "aggregate"): ("O(BSd² + BS²d)", "O(BSd + d²)", "O((BSd + BS²) / (BS + d))"),
    ("generation", "linear"): ("O(kBd²)", "O(kd² + kBd)", "O(Bd / (d + B))"),
    ("generation", "attention"): ("O(kBSd)", "O(kBSd)", "O(1)"),
    ("generation", "aggregate"): ("O(kBd² + kBSd)", "O(kBSd + kd²)", "O((Bd + BS) / (BS + d))"),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "mixtral", "gpt-bigcode-mqa"])
def test_the_table_is_the_same_for_every_decoder(name):
    rows = table(shape_of(FAMILIES[name]()))
    assert {(row.phase, row.part): (row.flops, row.memory, row.intensity) for row in rows} == EXPECTED


def test_interpolation_recovers_a_polynomial_exactly():
    def function(x: int, y: int) -> int:
        return 3 * x * y**2 - 7 * y + 5

    polynomial = interpolate(function, (2, 3), start=2)
    assert polynomial == {(1, 2): 3, (0, 1): -7, (0, 0): 5}
    assert evaluate(polynomial, (11, 13)) == function(11, 13)


def test_terms_bounded_by_another_are_dropped():
    one = Fraction(1)
    assert leading({(1, 1, 1, 1): one, (1, 0, 2, 1): one, (0, 0, 0, 2): one}) == {(1, 1, 1, 1), (0, 0, 0, 2)}
    assert leading({(1, 0, 1, 1): one, (1, 0, 2, 1): one}) == {(1, 0, 2, 1)}
    assert leading({(1, 2, 0, 0): one, (2, 1, 0, 0): one}) == {(1, 2, 0, 0), (2, 1, 0, 0)}


def wide_llama(factor: int):
    return transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16 * factor,
        intermediate_size=24 * factor,
        num_hidden_layers=1,
        num_attention_heads=2 * factor,
        num_key_value_heads=factor,
        head_dim=8,
    )


@pytest.fixture(scope="module")
def passes():
    """Counts of real forward passes over (phase, batch, length, generated tokens, width factor), each run once."""
    models = {factor: build(wide_llama(factor)) for factor in (1, 2, 3)}
    known: dict[tuple[int, ...], list[Seen]] = {}

    def sequence(batch: int, length: int, factor: int) -> list[Seen]:
        # Prefill of `length` tokens, then single tokens. Step i attends to length + i cached tokens and to itself.
        if (batch, length, factor) not in known:
            seen, cache = run(models[factor], batch, length, logits=1)
            steps = [seen]
            for _ in range(3):
                seen, cache = run(models[factor], batch, 1, cache, logits=1)
                steps.append(seen)
            known[batch, length, factor] = steps
        return known[batch, length, factor]

    return sequence


MEASURES = {
    ("linear", "flops"): lambda seen: seen.linear_flops,
    ("linear", "bytes"): lambda seen: seen.linear_elements,
    ("attention", "flops"): lambda seen: seen.attention_flops,
    ("attention", "bytes"): lambda seen: seen.attention_elements,
}


@pytest.mark.parametrize(("kind", "what"), MEASURES)
def test_generation_polynomial_equals_that_of_real_forward_passes(passes, kind, what):
    def real(batch: int, length: int, tokens: int, factor: int) -> int:
        return sum(MEASURES[kind, what](seen) for seen in passes(batch, length, factor)[1 : tokens + 1])

    expected = interpolate(real, (1, 2, 2, 2))
    assert counted(shape_of(wide_llama(1)), "generation", kind, lambda cost: getattr(cost, what)) == expected


@pytest.mark.parametrize(("kind", "what"), MEASURES)
def test_prefill_polynomial_equals_that_of_real_forward_passes(passes, kind, what):
    def real(batch: int, length: int, tokens: int, factor: int) -> int:
        return MEASURES[kind, what](passes(batch, length, factor)[0])

    measured = interpolate(real, (1, 2, 0, 2))
    predicted = counted(shape_of(wide_llama(1)), "prefill", kind, lambda cost: getattr(cost, what))
    assert leading(predicted) == leading(measured)
    if (kind, what) == ("attention", "flops"):
        # The eager path computes masked scores too: S² pairs where the mask leaves S (S + 1) / 2.
        assert 2 * predicted[1, 2, 0, 1] == measured[1, 2, 0, 1]
    else:
        assert predicted == measured
