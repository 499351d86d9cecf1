"""When a generated token reads every key on a CPU."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed import ask
from squeezed.answer import Decoding
from squeezed.attention import takes_everything
from squeezed.cache import FixedLayer, Selection
from squeezed.calibration import ThresholdCurves
from squeezed.context import FixedContext
from squeezed.ops.cpu import cost
from tests.ops.cases import Case, make_layer

_SELECTING_PAYS = cost.selecting_pays  # what conftest.py replaces


@pytest.fixture
def as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "selecting_pays", _SELECTING_PAYS)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "clusters", "stand_ins", "pays"),
    [
        (5_496, 3, 1_618, True, False),  # 0.57 ms a layer, and 0.30 for everything
        (7_524, 3, 2_000, True, False),  # 13.8 tokens a second, and 16.1 for everything
        (131_072, 8, 6_554, True, True),  # 7.7 ms a layer, and 29.1 for everything
        (131_072, 8, 6_554, False, True),  # 5.2
    ],
)
def test_the_model_decides_as_was_measured(
    tokens: int, kv_heads: int, clusters: int, stand_ins: bool, pays: bool
) -> None:
    assert _SELECTING_PAYS(tokens, kv_heads, [clusters], 0.1, stand_ins) is pays


def test_keeping_more_or_scoring_more_pays_less() -> None:
    assert not _SELECTING_PAYS(131_072, 8, [6_554], 0.6, True)
    assert not _SELECTING_PAYS(131_072, 8, [60_000], 0.1, True)
    assert _SELECTING_PAYS(131_072, 8, [60_000, 3_000], 0.1, False)  # half of the finer level


@pytest.mark.usefixtures("as_measured")
def test_only_single_queries_of_adaptive_selections_take_everything() -> None:
    layer, curves = make_layer(Case()), ThresholdCurves.keep_everything(1)
    heads, dim = layer.keys.shape[0], layer.keys.shape[2]
    for adaptive, queries, expected in ((True, 1, True), (False, 1, False), (True, 2, False)):
        fixed = FixedLayer(layer, Selection(curves, 0.9, adaptive=adaptive), layer.tokens)
        assert takes_everything(torch.zeros(1, heads, queries, dim), fixed) is expected


@pytest.mark.usefixtures("as_measured")
def test_answers_in_a_short_context_are_those_of_full_attention(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: FixedContext
) -> None:
    asked = (llama, tokenizer, context, tiny.QUESTIONS[:1])
    dense = ask(*asked, dense=True, decoding=Decoding(12))[0]
    adaptive = ask(*asked, 0.8, decoding=Decoding(12))[0]
    selecting = ask(*asked, 0.8, decoding=Decoding(12), adaptive=False, whole=True)[0]
    assert adaptive.text == dense.text
    assert adaptive.kept_fraction == adaptive.kv_budget == 1
    assert selecting.kept_fraction < 0.5
    assert selecting.prefill.kept_fraction == 1
