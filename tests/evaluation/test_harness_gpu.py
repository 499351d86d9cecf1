"""On a GPU a recorded pass, replayed, answers like the same pass launched kernel by kernel."""

from __future__ import annotations

import pytest
import tiny
import torch

from squeezed.evaluation import greedy
from squeezed.evaluation.greedy import answer_rows
from squeezed.evaluation.methods import METHODS, find_method
from squeezed.evaluation.prepared import Prepared, Subject
from squeezed.evaluation.rows import Row

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(Subject.of(tiny.model("llama").to("cuda"), tiny.tokenizer()), tiny.text(1500))


@pytest.mark.parametrize("spec", [*METHODS, "squeezed:copying=false", "squeezed-compact:levels=2"])
def test_a_replayed_pass_answers_like_a_launched_one(
    spec: str, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = prepared.encode("what is the second word?")
    rows = [Row(spec, find_method(spec), budget) for budget in ((None,) if spec == "full" else (0.2, 0.4))]
    found = answer_rows(prepared, rows, question, 16)
    monkeypatch.setattr(greedy, "_Recorded", greedy._Launched)
    for answer, expected in zip(found, answer_rows(prepared, rows, question, 16), strict=True):
        assert answer.tokens == expected.tokens
        assert answer.kv_budget == pytest.approx(expected.kv_budget)


def test_nothing_was_left_unrecorded(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row(spec, METHODS[spec], 0.3) for spec in METHODS if not spec.startswith("squeezed") and spec != "full"]
    answer_rows(prepared, rows, prepared.encode("what is the second word?"), 8)
    assert not caplog.records
