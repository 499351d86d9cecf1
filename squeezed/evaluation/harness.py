"""Running a suite: what is done already is skipped, what is found is written at once, work is shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from squeezed.errors import InputError
from squeezed.evaluation.answers import answer_questions
from squeezed.evaluation.fidelity import measure_passage
from squeezed.evaluation.jobs import Job, Questions, make_jobs
from squeezed.evaluation.prepared import Subject
from squeezed.evaluation.settings import Record, RunConfig, RunFolder

OnProgress = Callable[[str, int, int | None], None]  # stage, records there are, records expected
Load = Callable[[int], Subject]  # given the number of the worker
_WAITING = 2  # jobs that are made ahead, per worker


def run(
    config: RunConfig,
    folder: Path,
    load: Load,
    workers: int = 1,
    on_progress: OnProgress = lambda stage, records, expected: None,
) -> int:
    """Run what is missing of `config` in `folder`; returns the number of new records.

    Args:
        load: loads the model; with several workers it is called in each of them, so it has to be picklable.
        workers: processes that share the jobs, each with its own copy of the model.
        on_progress: called with what is being done, the records there are, and those expected in the end.

    Raises:
        InputError: a folder with another run, an unknown suite, data that is missing.
    """
    wanted = [row.key for row in config.rows()]
    new, expected = 0, config.expected()
    with RunFolder(folder).open(config) as (done, add):
        before = len(done)

        def keep(records: list[Record]) -> None:
            nonlocal new
            add(records)
            new += len(records)
            if records:
                on_progress(f"{records[0]['task']} at {records[0]['length']}", before + new, expected)

        def missing(jobs: Iterator[Job]) -> Iterator[Job]:
            return (job for job in jobs if any((i, key) not in done for i in job.ids for key in wanted))

        if workers > 1:
            _share(config, done, load, workers, missing, keep)
        else:
            subject = load(0)
            for job in missing(make_jobs(config, subject.tokenizer)):
                for records in do(subject, config, job, done, lambda stage: on_progress(stage, before + new, expected)):
                    keep(records)
    return new


def do(
    subject: Subject,
    config: RunConfig,
    job: Job,
    done: set[tuple[str, str]],
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Iterator[list[Record]]:
    """One job's records, as they come."""
    rows = config.rows()
    if isinstance(job, Questions):
        yield from answer_questions(subject, job, rows, done, on_stage, config.question == "whole")
    else:
        yield measure_passage(subject, job, rows, done, config.suite, on_stage)


def _share(
    config: RunConfig,
    done: set[tuple[str, str]],
    load: Load,
    workers: int,
    missing: Callable[[Iterator[Job]], Iterator[Job]],
    keep: Callable[[list[Record]], None],
) -> None:
    """Jobs are made here, one after another, and done in `workers` processes."""
    import queue

    import torch.multiprocessing as processes
    from transformers import AutoTokenizer

    from squeezed.models import _source

    context = processes.get_context("spawn")
    jobs: Any = context.Queue()
    results: Any = context.Queue()
    started = [
        context.Process(target=_work, args=(config, done, load, number, jobs, results), daemon=True)
        for number in range(workers)
    ]
    for process in started:
        process.start()
    source, options = _source(config.model)
    waiting = missing(make_jobs(config, AutoTokenizer.from_pretrained(source, **options)))
    under_way, exhausted = 0, False
    try:
        while under_way or not exhausted:
            while not exhausted and under_way < workers * _WAITING:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                    for _ in started:
                        jobs.put(None)
                    break
                jobs.put(job)
                under_way += 1
            try:
                kind, content = results.get(timeout=1.0)
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in started):
                    codes = [process.exitcode for process in started]
                    raise InputError(
                        f"a worker was killed (exit codes {codes}), most likely for memory; try fewer --workers"
                    ) from None
                continue
            if kind == "records":
                keep(content)
            elif kind == "finished":
                under_way -= 1
            elif kind == "refused":
                raise InputError(content)
            else:
                raise RuntimeError(f"a worker failed:\n{content}")
        for process in started:
            process.join(timeout=30)
    finally:
        jobs.cancel_join_thread()  # nobody may be left to take them
        for process in started:
            if process.is_alive():
                process.terminate()


def _work(config: RunConfig, done: set[tuple[str, str]], load: Load, number: int, jobs: Any, results: Any) -> None:
    """A worker's life."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        subject = load(number)
        while (job := jobs.get()) is not None:
            for records in do(subject, config, job, done):
                results.put(("records", records))
            results.put(("finished", None))
    except InputError as error:
        results.put(("refused", str(error)))
    except torch.OutOfMemoryError as error:
        results.put(("refused", f"a worker ran out of GPU memory ({error}); try fewer --workers"))
    except Exception:
        results.put(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """A run that is killed can't end its workers: they would go on with what they have, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
