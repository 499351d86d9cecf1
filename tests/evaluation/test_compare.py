"""What is called a difference is one, and what is chance is called that."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

from squeezed.errors import InputError
from squeezed.evaluation.compare import compare_runs
from squeezed.evaluation.settings import RunConfig, RunFolder
from squeezed.evaluation.stats import bootstrap, holm

Score = Callable[[str, int], float]


def made(
    folder: Path,
    scores: dict[str, Score],
    samples: int = 60,
    suite: str = "ruler",
    seed: int = 0,
    tasks: tuple[str, ...] = ("a", "b"),
    context_tokens: int = 4000,
) -> Path:
    """A run whose row `spec@0.1` scored `scores[spec](task, number)`."""
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).write_config(RunConfig(suite, "m", "float32", ("quest", "squeezed"), (0.1,), seed=seed))
    lines = [
        {
            "id": f"{task}/{number}",
            "row": spec if spec == "full" else f"{spec}@0.1",
            "task": task,
            "length": 4096,
            "method": spec,
            "budget": None if spec == "full" else 0.1,
            "score": score(task, number),
            "kl": score(task, number),
            "context_tokens": context_tokens + number,
        }
        for spec, score in scores.items()
        for task in tasks
        for number in range(samples)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def hard(task: str, number: int) -> float:
    """Half of the samples are too hard for anybody."""
    return float(number % 2)


def test_the_same_answers_do_not_differ(tmp_path: Path) -> None:
    first, second = made(tmp_path / "1", {"quest": hard}), made(tmp_path / "2", {"quest": hard})
    (found,) = compare_runs(first, second)
    assert (found.difference, found.differing, found.p_holm, found.verdict) == (0, 0, 1.0, "within chance")


def test_a_difference_is_found_sample_by_sample(tmp_path: Path) -> None:
    """12 of 120 lost, none gained: far from chance when paired, well within it when not."""
    first = made(tmp_path / "1", {"quest": hard})
    second = made(tmp_path / "2", {"quest": lambda task, n: 0.0 if n % 10 == 1 else hard(task, n)})
    (found,) = compare_runs(first, second)
    assert found.verdict == "worse"
    assert found.difference == pytest.approx(-10.0)
    assert found.differing == 12
    assert found.p == pytest.approx(2 * 0.5**12, rel=0.01)  # the sign test's p value, exactly
    assert found.low < -10 < found.high < 0
    (other,) = compare_runs(second, first)
    assert other.verdict == "better"


def test_a_single_sample_is_chance(tmp_path: Path) -> None:
    first = made(tmp_path / "1", {"quest": hard})
    second = made(tmp_path / "2", {"quest": lambda task, n: 0.0 if (task, n) == ("a", 1) else hard(task, n)})
    (found,) = compare_runs(first, second)
    assert (found.differing, found.p, found.verdict) == (1, 1.0, "within chance")


def test_as_many_won_as_lost_is_chance(tmp_path: Path) -> None:
    coin = random.Random(0)
    flips = {(task, n): float(coin.random() < 0.5) for task in "ab" for n in range(60)}
    first = made(tmp_path / "1", {"quest": hard})
    second = made(tmp_path / "2", {"quest": lambda task, n: flips[task, n]})
    (found,) = compare_runs(first, second)
    assert found.differing > 40
    assert found.verdict == "within chance"


def test_more_comparisons_ask_for_more_evidence(tmp_path: Path) -> None:
    """Six lost, none gained: enough by itself (p = 0.03), not as one of several comparisons."""
    lost = {1, 11, 21, 31, 41, 51}
    first = made(tmp_path / "1", {"quest": hard, "squeezed": hard})
    second = made(
        tmp_path / "2",
        {"quest": lambda task, n: 0.0 if task == "a" and n in lost else hard(task, n), "squeezed": hard},
    )
    alone = next(one for one in compare_runs(first, second) if one.second == "quest@0.1")
    assert alone.p < 0.05 < alone.p_holm
    assert alone.verdict == "within chance"
    assert len(compare_runs(first, second, by_task=True)) == 6


def test_one_run_with_itself_holds_its_methods_against_full_attention(tmp_path: Path) -> None:
    folder = made(tmp_path, {"full": lambda *_: 1.0, "quest": hard, "squeezed": lambda *_: 1.0})
    found = {one.second: one for one in compare_runs(folder, folder)}
    assert found["quest@0.1"].verdict == "worse"
    assert found["squeezed@0.1"].verdict == "within chance"
    (against,) = [one for one in compare_runs(folder, folder, "quest@0.1") if one.second == "squeezed@0.1"]
    assert (against.first, against.verdict) == ("quest@0.1", "better")


def test_of_divergences_less_is_better(tmp_path: Path) -> None:
    first = made(tmp_path / "1", {"quest": lambda *_: 0.5}, suite="fidelity")
    second = made(tmp_path / "2", {"quest": lambda task, n: 0.25 + n / 1000}, suite="fidelity")
    (found,) = compare_runs(first, second)
    assert found.verdict == "better"
    assert found.first_mean == 0.5


def test_runs_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    first, second = made(tmp_path / "1", {"quest": hard}), made(tmp_path / "2", {"squeezed": hard})
    with pytest.raises(InputError, match="no answers to compare"):
        compare_runs(first, second)
    with pytest.raises(InputError, match="no row 'full'"):
        compare_runs(first, second, "full")
    with pytest.raises(InputError, match="holds no run"):
        compare_runs(first, tmp_path / "3")
    with pytest.raises(InputError, match="different suites"):
        compare_runs(first, made(tmp_path / "4", {"quest": hard}, suite="fidelity"))


def test_runs_of_other_samples_are_refused(tmp_path: Path) -> None:
    """A sample's name says its task and number: with another seed or data it is of another text."""
    first = made(tmp_path / "1", {"quest": hard})
    with pytest.raises(InputError, match="drawn with seeds 0 and 5"):
        compare_runs(first, made(tmp_path / "2", {"quest": hard}, seed=5))
    with pytest.raises(InputError, match="a/0 has a context of 4000 tokens in one and of 4100 in the other"):
        compare_runs(first, made(tmp_path / "3", {"quest": hard}, context_tokens=4100))
    with pytest.raises(InputError, match="no sample is in both"):
        compare_runs(first, made(tmp_path / "4", {"quest": hard}, tasks=("c",)))


@pytest.mark.parametrize("line", [b'{"a": 1}', b"[1]", b"{", b'{"id": "\xff"}'])
def test_a_damaged_record_is_refused_naming_its_line(line: bytes, tmp_path: Path) -> None:
    with (made(tmp_path, {"full": hard}, samples=1) / "predictions.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"predictions\.jsonl:3 is damaged: expected JSON with id, row, task"):
        compare_runs(tmp_path, tmp_path)


def test_a_run_without_answers_is_refused_as_that(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no answers yet"):
        compare_runs(made(tmp_path, {}), tmp_path)
    with pytest.raises(InputError, match="no other row"):
        compare_runs(made(tmp_path, {"full": hard}), tmp_path)


def test_what_is_compared_is_named_and_small_differences_are_shown(tmp_path: Path, run_squeeze: tiny.Run) -> None:
    scores: dict[str, Score] = {"full": lambda *_: 3.0, "quest": lambda *_: 3.03}
    text, questions = made(tmp_path / "1", scores, suite="fidelity"), made(tmp_path / "2", scores)
    _, out, _ = run_squeeze("compare", text, text)
    assert out.startswith("kl: KL divergence")
    assert "| mean kl |" in out
    assert "| 3.0000 | quest@0.1 | 3.0300 | +0.0300 |" in out
    _, out, _ = run_squeeze("compare", questions, questions)
    assert "| mean score |" in out
    assert "| 300.0 | quest@0.1 | 303.0 | +3.0 |" in out


def test_holms_correction_is_that_of_the_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    generator = random.Random(1)
    inside = 0
    for number in range(200):
        values = [generator.gauss(0.0, 1.0) for _ in range(40)]
        estimate = bootstrap([values], seed=number)
        inside += estimate.low <= 0.0 <= estimate.high
    assert 0.88 <= inside / 200 <= 0.99


def test_tasks_count_alike_in_an_average() -> None:
    assert bootstrap([[1.0] * 10, [0.0] * 90]).mean == 0.5


def test_labels_are_moved_apart_and_no_further() -> None:
    from squeezed.evaluation.plots import _apart

    assert _apart([0.1, 0.5, 0.9], [0.05] * 3) == pytest.approx([0.1, 0.5, 0.9])
    assert _apart([0.5, 0.5, 0.5], [0.1] * 3) == pytest.approx([0.4, 0.5, 0.6])
    assert _apart([0.2, 0.98, 1.0], [0.1] * 3)[-1] <= 1.0
    found = _apart([0.1, 0.12, 0.13, 0.8], [0.05] * 4)
    assert all(above - below >= 0.05 - 1e-9 for below, above in pairwise(found))
    assert found[-1] == pytest.approx(0.8)
    assert _apart([], []) == []
    # Of two lines: half of each below it and above it is its own.
    assert _apart([0.5, 0.5, 0.5], [0.1, 0.2, 0.1]) == pytest.approx([0.35, 0.5, 0.65])


def test_rows_of_one_method_are_told_apart_by_their_dashes() -> None:
    from squeezed.evaluation.plots import _styles

    rows = {name: {"method": name} for name in ("squeezed", "squeezed:recall=0", "squeezed:copying=false", "quest")}
    styles = _styles(rows)
    assert list(styles) == list(rows)
    assert styles["squeezed:recall=0"]["color"] == styles["squeezed:copying=false"]["color"]
    lines = [styles[name].get("linestyle", "-") for name in rows]
    assert lines[0] == lines[1] == lines[3] == "-"
    assert lines[2] != "-"
