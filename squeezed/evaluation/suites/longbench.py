"""LongBench: the 14 English and code tasks of the Squeezed Attention paper (Bai et al. 2023, arXiv 2308.14508).

Prompts, answer lengths and metrics are the published ones (github.com/THUDM/LongBench, LongBench/config). A prompt is
split where Squeezed Attention splits it: all that stands before the question is the fixed context.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squeezed.errors import InputError
from squeezed.evaluation import data
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Suite, SuiteOptions, drawn
from squeezed.evaluation.suites.longbench_prompts import TASKS, Task

NEEDS = (
    "LongBench's jsonl files (narrativeqa.jsonl ...) or the data.zip that holds them; "
    "without --data it is fetched from the Hugging Face hub"
)
_HUB = "THUDM/LongBench"
_EXTRA = ("passage_retrieval_en",)  # LongBench has it, the paper's table does not


def _samples(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    for name in tasks:
        records = list(_records(name, options.data))
        records = [records[i] for i in drawn(options.count, len(records), f"{options.seed}/{name}")]
        by_context: dict[str, list[Sample]] = {}
        for record in records:
            sample = _sample(name, TASKS[name], record, options)
            by_context.setdefault(sample.context, []).append(sample)
        for samples in by_context.values():
            yield from samples


def _sample(name: str, task: Task, record: dict[str, Any], options: SuiteOptions) -> Sample:
    try:
        question = task.question.format(input=record["input"])
        context = task.context.format(context=record["context"])
        answers, choices, id = tuple(record["answers"]), tuple(record["all_classes"] or ()), record["_id"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"a record of {name} is not in LongBench's format ({error!r}); "
            "expected input, context, answers, all_classes and _id"
        ) from error
    question, room = _share_room(question, options)
    return Sample(
        id=options.id(name, id),
        task=name,
        context=options.truncate_middle(context, room),
        question=question,
        answers=answers,
        metric=task.metric,
        max_new_tokens=task.max_new_tokens,
        choices=choices,
    )


def _share_room(question: str, options: SuiteOptions) -> tuple[str, int]:
    """The question and the tokens left to its context: a question that is longer than foreseen takes from it.

    In repobench-p and triviaqa the user input is a file of code or a passage. It may take up to half.
    """
    over = options.count_tokens(question) - options.question_room
    if over <= 0:
        return question, options.length
    most = options.length // 2
    if over > most:
        question, over = options.truncate_middle(question, options.question_room + most), most
    return question, options.length - over


def _records(task: str, path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None:
        path = _from_hub()
    if path.is_dir():
        file = path / f"{task}.jsonl"
        if not file.exists():
            raise InputError(f"{file} does not exist; expected {NEEDS}")
        yield from data.read_jsonl(file)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == f"{task}.jsonl"), None)
            if member is None:
                raise InputError(f"{path} holds no {task}.jsonl; expected {NEEDS}")
            with archive.open(member) as lines:
                for line in io.TextIOWrapper(lines, "utf-8"):
                    if line.strip():
                        yield json.loads(line)
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); expected {NEEDS}") from error


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_HUB, "data.zip", repo_type="dataset"))
    except Exception as error:  # the hub's client raises many kinds, its HTTP library's own among them
        raise InputError(
            f"LongBench can't be fetched from the hub ({type(error).__name__}); "
            f"fetch data.zip of the data set {_HUB} elsewhere and name it with --data"
        ) from error


LONGBENCH = Suite(
    "longbench",
    tuple(name for name in TASKS if name not in _EXTRA),
    NEEDS,
    _samples,
    "14 English and code tasks on real texts",
    extra=_EXTRA,
)
