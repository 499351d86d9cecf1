"""A progress bar for each stage of a build, with a time estimate."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_UNITS = {
    "prefill": "tokens",
    "cluster": "layers",
    "questions": "layers",
    "calibrate": "passes",
    "save": "files",
}


class Stages:
    """Shows (stage, done, total) updates; a stage's bar appears with its first update.

    The seconds before an update, since the one before that, count for its stage.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}  # on a GPU, what a stage leaves running counts for the next

    def __enter__(self) -> Stages:
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        if not self._tasks:  # until there is something to show, a refusal should be all there is on the screen
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, unit=_UNITS.get(stage, ""))
        self._progress.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        return "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())


class Answers:
    """One bar over all answers of an evaluation, with what is being done; it appears with the first update."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int | None) -> None:
        if self._task is None:
            self._task = self._progress.add_task(stage, total=total)
            self._progress.start()
        self._progress.update(self._task, description=stage, completed=done, total=total)
