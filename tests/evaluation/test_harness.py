"""A run: continued where it stopped, refused where it is another one, shared by processes, reported."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import torch

from squeezed.errors import InputError
from squeezed.evaluation import harness, suites
from squeezed.evaluation.harness import run
from squeezed.evaluation.prepared import Subject
from squeezed.evaluation.report import write_report
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.settings import RunConfig, RunFolder
from squeezed.evaluation.suites import Suite, SuiteOptions
from squeezed.template import encode_prefix

CONFIG = RunConfig(
    "words", "tiny", "float32", ("full", "quest", "squeezed"), (0.3,), lengths=(512,), samples=2, tasks=("first",)
)


def made_up(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    """Two questions about each of `count` contexts."""
    for task in tasks:
        for number in range(options.count):
            context = tiny.text(800, seed=number)
            for part in "ab":
                yield Sample(
                    id=f"{task}/{options.length}/{number}{part}",
                    task=task,
                    context=context,
                    question="Who?" if part == "a" else "list three words.",
                    answers=("the",),
                    metric="string_match_all",
                    max_new_tokens=4,
                    depth=number / options.count,
                )


@pytest.fixture(autouse=True)
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "words", Suite("words", ("first", "second"), "nothing", made_up))


def load(worker: int = 0) -> Subject:
    return Subject.of(tiny.model("llama"), tiny.tokenizer())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_every_sample_is_answered_under_every_row(tmp_path: Path) -> None:
    assert run(CONFIG, tmp_path / "run", load) == 4 * 3
    found = records(tmp_path / "run")
    assert {record["row"] for record in found} == {"full", "quest@0.3", "squeezed@0.3"}
    assert len({(record["id"], record["row"]) for record in found}) == 12
    for record in found:
        assert record["kv_budget"] == 1.0 if record["row"] == "full" else 0.15 < record["kv_budget"] < 0.4
        assert record["score"] == float("the" in record["answer"].lower())


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(CONFIG, whole, load)
    asked: list[str] = []
    answer = harness.answer_questions

    def interrupted(*args: object) -> Iterator[list[dict]]:
        for found in answer(*args):  # type: ignore[arg-type]
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(found[0]["id"])
            yield found

    monkeypatch.setattr(harness, "answer_questions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, broken, load)
    monkeypatch.setattr(harness, "answer_questions", answer)
    assert len(records(broken)) == 9
    with (broken / "predictions.jsonl").open("a") as file:
        file.write('{"id": "first/')  # as a kill leaves it
    assert run(CONFIG, broken, load) == 3
    assert records(broken) == records(whole)
    assert run(CONFIG, broken, load) == 0


def test_a_run_can_be_continued_with_more(tmp_path: Path) -> None:
    run(CONFIG, tmp_path, load)
    more = replace(CONFIG, methods=("random",), budgets=(0.5,), tasks=("second",), samples=1)
    assert run(more, tmp_path, load) == 2 * 2
    merged = RunFolder(tmp_path).config()
    assert (merged.methods, merged.budgets) == (("full", "quest", "squeezed", "random"), (0.3, 0.5))
    assert (merged.tasks, merged.samples) == (("first", "second"), 2)


def test_a_folder_that_can_not_be_made_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"/proc/run can't be written: .+; choose another folder"):
        run(replace(CONFIG, methods=("full",), samples=1), Path("/proc/run"), load)


@pytest.mark.parametrize("change", [{"seed": 1}, {"model": "other"}, {"dtype": "bfloat16"}, {"data": "elsewhere"}])
def test_another_run_in_the_folder_is_refused_in_one_line(tmp_path: Path, change: dict) -> None:
    run(replace(CONFIG, methods=("full",), samples=1), tmp_path, load)
    with pytest.raises(InputError, match=next(iter(change))) as caught:
        run(replace(CONFIG, **change), tmp_path, load)
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_before_its_first_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    def refused(number: int) -> Subject:
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        run(replace(CONFIG, data="nope"), tmp_path / "run", refused)
    assert not (tmp_path / "run").exists()
    assert run(replace(CONFIG, samples=1), tmp_path / "run", load) == 2 * 3


def test_only_one_process_adds_to_a_run_and_readers_leave_it_as_it_is(tmp_path: Path) -> None:
    run(replace(CONFIG, samples=1), tmp_path, load)
    with RunFolder(tmp_path).open(CONFIG) as (done, add):
        add([{**records(tmp_path)[0], "id": "x"}])
        half = '{"id": "half'
        with (tmp_path / "predictions.jsonl").open("a") as file:
            file.write(half)
        assert len(list(RunFolder(tmp_path).records())) == len(done) + 1
        assert (tmp_path / "predictions.jsonl").read_text().endswith(half)
        with pytest.raises(InputError, match="another squeeze eval"):
            run(CONFIG, tmp_path, load)
    assert not (tmp_path / ".lock").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        run(CONFIG, tmp_path, load)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"budgets": (0.0,)}, "budget is 0"),
        ({"budgets": (1.5,)}, "budget is 1.5"),
        ({"budgets": (0.1, 0.1)}, "twice"),
        ({"lengths": (100,)}, "length is 100"),
        ({"samples": 0}, "samples is 0"),
        ({"methods": ("nonsense",)}, "no method"),
        ({"methods": ()}, "no method was given"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        replace(CONFIG, **change)


def test_contexts_are_prepared_once_for_all_their_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from squeezed.evaluation import answers

    made: list[str] = []
    prepared = answers.Prepared

    class Counted(prepared):  # type: ignore[misc, valid-type]
        def __init__(self, subject: Subject, text: str, *args: object) -> None:
            made.append(text)
            super().__init__(subject, text, *args)

    monkeypatch.setattr(answers, "Prepared", Counted)
    run(CONFIG, tmp_path, load)
    assert len(made) == 2


def test_a_question_too_long_for_the_model_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.model("llama")
    tokens = len(encode_prefix(tiny.tokenizer(), tiny.text(800), chat=True)[0].ids)
    monkeypatch.setattr(lm.config, "max_position_embeddings", tokens + 4)
    with pytest.raises(InputError, match="positions"):
        run(CONFIG, tmp_path, lambda worker: Subject.of(lm, tiny.tokenizer()))


def test_the_report_has_means_intervals_table_and_pictures(tmp_path: Path) -> None:
    run(replace(CONFIG, tasks=("first", "second")), tmp_path, load)
    metrics = write_report(tmp_path)
    rows = metrics["lengths"]["512"]["rows"]
    assert list(rows) == ["full", "squeezed@0.3", "quest@0.3"]
    found = records(tmp_path)
    for key, row in rows.items():
        for task, cell in row["tasks"].items():
            scores = [100 * r["score"] for r in found if r["row"] == key and r["task"] == task]
            assert cell["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-3)
            assert cell["low"] <= cell["mean"] <= cell["high"]
            assert cell["n"] == 4
        assert row["average"]["mean"] == pytest.approx(
            sum(cell["mean"] for cell in row["tasks"].values()) / 2, abs=1e-2
        )
    table = (tmp_path / "table.md").read_text()
    assert "| method | KV budget | first | second | average | 95% |" in table
    assert table.count("\n| ") == 4
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for picture in ("accuracy.png", "tasks.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_report_has_tasks_in_the_order_of_the_suite(tmp_path: Path) -> None:
    run(replace(CONFIG, tasks=("first", "second")), tmp_path, load)
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(reversed(predictions.read_text().splitlines(keepends=True))))
    assert write_report(tmp_path)["tasks"] == ["first", "second"]
    assert "| first | second |" in (tmp_path / "table.md").read_text()


def test_a_report_of_a_run_without_answers_is_empty(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(CONFIG)
    assert write_report(tmp_path)["lengths"] == {}


_KILLED = """
import multiprocessing, os, time
from squeezed.evaluation import harness

def load(number):
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=harness._work, args=(None, set(), load, 0, None, None))
    worker.start()
    worker.join()
"""


def test_a_worker_without_memory_says_so_in_one_line() -> None:
    def load_too_much(worker: int) -> Subject:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    results: queue.SimpleQueue = queue.SimpleQueue()
    harness._work(CONFIG, set(), load_too_much, 0, queue.SimpleQueue(), results)
    kind, line = results.get_nowait()
    assert kind == "refused"
    assert line == "a worker ran out of GPU memory (Tried to allocate 2 GiB); try fewer --workers"


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    given_up = time.monotonic() + 30
    while _goes_on(worker):
        assert time.monotonic() < given_up, "the worker goes on"
        time.sleep(0.1)


def _goes_on(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
