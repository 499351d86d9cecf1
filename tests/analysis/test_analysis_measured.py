"""Measured runs are checked at the edge and laid over the prediction."""

from __future__ import annotations

import copy
import json

import pytest
from tiny_models import FAMILIES

from squeezed.analysis.cost import Precision
from squeezed.analysis.devices import find_device
from squeezed.analysis.measured import compare, read_run
from squeezed.analysis.roofline import token_seconds
from squeezed.analysis.shape import shape_of
from squeezed.analysis.sparse import with_budget
from squeezed.errors import InputError

H100 = find_device("H100")
ATTENTION = {
    "device": "NVIDIA H100 80GB HBM3",
    "rows": [
        {
            "context": 524288,
            "q_heads": 32,
            "kv_heads": 32,
            "head_dim": 128,
            "queries": 1,
            "sparsity": 0.9,
            "levels": 1,
            "dtype": "bfloat16",
            "dense": {"name": "cudnn", "ms": 2.77},
            "squeezed": {"ms": 0.598},
            "speedup": 4.63,
            "kv_budget": 0.125,
            "rel_error": 0.1,
        }
    ],
}
GENERATE = {
    "device": "x",
    "rows": [
        {
            "context": 4096,
            "dense": {"tokens_per_second": 100.0},
            "squeezed": {"tokens_per_second": 150.0},
            "kv_budget": 0.2,
        }
    ],
}


def saved(tmp_path, run) -> object:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama():
    return shape_of(FAMILIES["llama"]())


def test_share_of_the_floor_of_an_attention_run(tmp_path, llama):
    (row,) = compare(read_run(saved(tmp_path, ATTENTION)), llama, H100, Precision(), "graph")
    kv_bytes = 524288 * 32 * 2 * 128 * 2
    assert row.dense.measured == pytest.approx(2.77e-3)
    assert row.dense.floor == pytest.approx(kv_bytes / 3.35e12, rel=1e-3)
    assert row.squeezed.floor == pytest.approx(0.125 * kv_bytes / 3.35e12, rel=1e-2)
    assert row.dense.share == pytest.approx(0.926, abs=2e-3)
    assert row.squeezed.share == pytest.approx(0.536, abs=5e-3)
    assert row.dense.floor < row.dense.predicted


def test_the_budget_that_was_read_sets_the_floor_not_the_sparsity_asked_for(tmp_path, llama):
    drifted = copy.deepcopy(ATTENTION)
    drifted["rows"][0]["kv_budget"] = 0.25
    (first,) = compare(read_run(saved(tmp_path, ATTENTION)), llama, H100, Precision(), "graph")
    (second,) = compare(read_run(saved(tmp_path, drifted)), llama, H100, Precision(), "graph")
    assert second.squeezed.floor == pytest.approx(2 * first.squeezed.floor, rel=1e-2)


def test_generation_is_compared_with_the_whole_model(tmp_path, llama):
    (row,) = compare(read_run(saved(tmp_path, GENERATE)), llama, H100, Precision(), "eager")
    assert row.dense.measured == pytest.approx(0.01)
    squeeze = with_budget(0.2, 1)
    assert row.dense.predicted == token_seconds(llama, H100, Precision(), 1, 4096, None, "eager")
    assert row.squeezed.predicted == token_seconds(llama, H100, Precision(), 1, 4096, squeeze, "eager")


def test_everything_missing_is_named(tmp_path):
    run = copy.deepcopy(ATTENTION)
    del run["device"], run["rows"][0]["dense"]["ms"], run["rows"][0]["kv_budget"]
    with pytest.raises(InputError) as caught:
        read_run(saved(tmp_path, run))
    for name in ("device", "rows[0].dense.ms", "rows[0].kv_budget"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"context": 0}, "context"), ({"dtype": "int4"}, "dtype"), ({"squeezed": {"ms": -1}}, "squeezed.ms")],
)
def test_impossible_values_are_refused(tmp_path, change, named):
    run = copy.deepcopy(ATTENTION)
    run["rows"][0].update(change)
    with pytest.raises(InputError, match=named):
        read_run(saved(tmp_path, run))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_run(tmp_path / "absent.json")
    for text in ("", "[1, 2]", '{"device": "x", "rows": []}'):
        (tmp_path / "odd.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="not a run of squeeze bench"):
            read_run(tmp_path / "odd.json")
