"""The cost model against what was measured on one H100 80GB, 2026-11-21 (docs/results/kernel-notes.md)."""

from __future__ import annotations

import pytest

from squeezed.ops.triton.cost import AttentionShape, dense_microseconds, squeezed_microseconds

MEASURED = [  # tokens, q heads, kv heads, queries, kept share, dense and squeezed microseconds
    (524288, 32, 32, 1, 0.103, 2752.0, 388.7),
    (524288, 32, 8, 1, 0.099, 694.3, 116.5),
    (131072, 32, 32, 1, 0.103, 694.4, 112.2),
    (131072, 32, 8, 1, 0.097, 180.3, 40.5),
    (32768, 32, 32, 1, 0.100, 179.6, 38.7),
    (32768, 32, 8, 1, 0.099, 51.1, 19.0),
    (16384, 32, 8, 1, 0.108, 29.8, 15.4),
    (8192, 32, 8, 1, 0.117, 18.7, 14.6),
    (1048576, 32, 8, 1, 0.099, 1379.5, 208.9),
    (524288, 32, 32, 1, 0.305, 2751.6, 957.1),
    (524288, 32, 32, 1, 0.052, 2751.7, 242.1),
    (524288, 32, 32, 1024, 0.099, 14123.4, 2951.5),
    (131072, 32, 32, 1024, 0.101, 3762.8, 833.6),
    (131072, 32, 8, 1024, 0.110, 3537.4, 924.8),
]


def dense_is_faster(shape: AttentionShape) -> bool:
    return dense_microseconds(shape) <= squeezed_microseconds(shape)


@pytest.mark.parametrize("row", MEASURED)
def test_the_model_is_near_every_measurement(row: tuple[int, int, int, int, float, float, float]) -> None:
    tokens, q_heads, kv_heads, queries, kept, dense, squeezed = row
    shape = AttentionShape(1, q_heads, kv_heads, queries, 128, tokens, (tokens // 20,), kept)
    assert dense_microseconds(shape) == pytest.approx(dense, rel=0.1)
    assert squeezed_microseconds(shape) == pytest.approx(squeezed, rel=0.15)
    assert not dense_is_faster(shape)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "block", "voters", "stand_ins", "squeezed"),
    [
        (524288, 32, 512, 64, False, 2294.0),
        (524288, 32, 512, 512, False, 3155.0),
        (524288, 32, 256, 64, False, 2491.0),
        (131072, 32, 512, 64, False, 755.0),
        (524288, 8, 512, 64, False, 2290.0),
        (131072, 8, 512, 64, False, 703.0),
        (524288, 32, 512, 64, True, 4280.0),
        (131072, 32, 512, 64, True, 1351.0),
        (524288, 8, 512, 64, True, 3857.0),
        (131072, 8, 512, 64, True, 1223.0),
    ],
)
def test_a_question_in_blocks(
    tokens: int, kv_heads: int, block: int, voters: int, stand_ins: bool, squeezed: float
) -> None:
    size = 260 if stand_ins else 0
    shape = AttentionShape(
        1024 // block, 32, kv_heads, block, 128, tokens, (tokens // 20,), 0.1, 2, size, stand_ins, voters
    )
    assert squeezed_microseconds(shape) == pytest.approx(squeezed, rel=0.2)


@pytest.mark.parametrize(("queries", "microseconds"), [(64, 530.0), (128, 1120.0), (256, 1492.2)])
def test_dense_attention_of_few_queries_is_slower_than_its_products(queries: int, microseconds: float) -> None:
    shape = AttentionShape(1, 32, 8, queries, 128, 131072, (6553,), 0.1)
    assert dense_microseconds(shape) == pytest.approx(microseconds, rel=0.1)


def test_bytes_of_centroids_count() -> None:
    small, large = (AttentionShape(1, 32, 8, 1, 128, 131072, (26214,), 0.1, 2, size) for size in (132, 516))
    assert squeezed_microseconds(large) - squeezed_microseconds(small) == pytest.approx(8 * 26214 * 384 / 2.95e6)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "squeezed"),
    [(32768, 8, 27.7), (32768, 32, 46.9), (8192, 8, 20.3), (131072, 8, 53.0), (524288, 32, 391.6)],
)
def test_stand_ins_cost_a_launch(tokens: int, kv_heads: int, squeezed: float) -> None:
    shape = AttentionShape(1, 32, kv_heads, 1, 128, tokens, (tokens // 20,), 0.1, 2, 260, stand_ins=True)
    assert squeezed_microseconds(shape) == pytest.approx(squeezed, rel=0.2)
    assert dense_is_faster(shape) == (tokens == 8192)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "tokens", "clusters", "kept", "saved"),
    [
        (14, 2, 64, 28024, 2000, 0.085, 2.6),
        (12, 2, 128, 28024, 2000, 0.097, 6.5),
        (32, 8, 128, 32768, 1638, 0.1, 37.8),
        (32, 8, 128, 131072, 6553, 0.1, 148.6),
        (32, 8, 128, 262144, 13107, 0.1, 290.0),
    ],
)
def test_what_a_layer_of_a_whole_step_saves(
    q_heads: int, kv_heads: int, head_dim: int, tokens: int, clusters: int, kept: float, saved: float
) -> None:
    """Whole steps of Qwen2.5-Coder 0.5B and 1.5B and of an 8B shape, dense less squeezed, per layer."""
    bytes_each = 2 * head_dim + 4
    shape = AttentionShape(
        1, q_heads, kv_heads, 1, head_dim, tokens, (clusters,), kept, 2, bytes_each, stand_ins=True, with_own=True
    )
    assert dense_microseconds(shape) - squeezed_microseconds(shape) == pytest.approx(saved, rel=0.1, abs=3.0)
    assert not dense_is_faster(shape)


def test_short_contexts_and_dense_selections_are_left_to_dense_attention() -> None:
    assert dense_is_faster(AttentionShape(1, 32, 8, 1, 128, 2048, (102,), 0.1))
    assert dense_is_faster(AttentionShape(1, 32, 8, 1, 128, 131072, (6553,), 0.95))
