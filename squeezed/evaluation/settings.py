"""What a run was asked for, and the folder that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from squeezed.artifact import check_place, naming
from squeezed.errors import InputError
from squeezed.evaluation.methods import find_method
from squeezed.evaluation.rows import Row

TEXT_SUITES = ("fidelity", "perplexity", "longppl")
DEFAULT_METHODS = ("full", "squeezed", "squeezed-paper", "quest", "streaming", "random", "oracle")
DEFAULT_BUDGETS = (0.1, 0.2)
_PREDICTIONS, _CONFIG, _LOCK = "predictions.jsonl", "config.yaml", ".lock"
_OURS = (_PREDICTIONS, _CONFIG, _LOCK, "metrics.json", "table.md")  # what a run without a record may hold
_FIELDS = ("id", "row", "task", "length", "method", "budget")  # of every record, besides what it found
Record = dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run finds; kept beside its results.

    Attributes:
        suite: a suite's name, or one of TEXT_SUITES.
        model: as named on the command line.
        dtype: the model's.
        methods: specs, see `squeezed.evaluation.methods.find_method`.
        budgets: shares of the full KV's bytes that a query token may read.
        lengths: tokens of template, context, question and answer together.
        samples: per task and length; texts for TEXT_SUITES.
        tasks: empty is all of the suite's.
        data: folder or file of the suite's texts.
        seed: of the samples.
        question: `whole`, read with all of the fixed context in one pass, as `ask` does and as the methods' papers do,
            so that a budget is that of the answer's tokens; or `selects`, where each of its tokens is attended by the
            method. TEXT_SUITES have no questions: there all that is scored is attended by the method.
    """

    suite: str
    model: str
    dtype: str
    methods: tuple[str, ...] = DEFAULT_METHODS
    budgets: tuple[float, ...] = DEFAULT_BUDGETS
    lengths: tuple[int, ...] = (4096,)
    samples: int = 10
    tasks: tuple[str, ...] = ()
    data: str = ""
    seed: int = 0
    question: str = "whole"

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"budget is {budget:g}: expected a share of the KV above 0 and at most 1, try 0.1")
        for length in self.lengths:
            if length < 512:
                raise InputError(f"length is {length}: expected at least 512 tokens")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}: expected at least 1")
        if self.question not in ("whole", "selects"):
            raise InputError(f"question is {self.question!r}: expected whole or selects")
        for spec in self.methods:
            find_method(spec)
        for name, given in (("method", self.methods), ("budget", self.budgets), ("length", self.lengths)):
            if not given:
                raise InputError(f"no {name} was given; name at least one")
            if len(set(given)) < len(given):
                raise InputError(f"a {name} was given twice in {', '.join(map(str, given))}")

    @property
    def is_text(self) -> bool:
        return self.suite in TEXT_SUITES

    def expected(self) -> int | None:
        """Records of the whole run, if the suite's number of tasks is known."""
        if self.is_text:
            tasks = 1
        else:
            from squeezed.evaluation.suites import find_suite

            tasks = len(self.tasks) or len(find_suite(self.suite).tasks)
        return tasks * self.samples * len(self.lengths) * len(self.rows())

    def rows(self) -> list[Row]:
        """All methods under all budgets; always with full attention, the base of all comparisons."""
        rows = [Row("full", find_method("full"), None)]
        for spec in self.methods:
            if spec != "full":
                rows += [Row(spec, find_method(spec), budget) for budget in self.budgets]
        return rows


class RunFolder:
    """A run's folder: configuration, answers so far, and what is made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def predictions(self) -> Path:
        return self.path / _PREDICTIONS

    @contextmanager
    def open(self, config: RunConfig) -> Iterator[tuple[set[tuple[str, str]], Callable[[list[Record]], None]]]:
        """Begin or continue a run: the (sample id, row key) pairs that are there already, and what adds records.

        A run may be continued with more methods, budgets, lengths, tasks or samples: those there are stay. Nothing is
        written before the first record; from then on, or from the start if there are some, nobody else may add any.

        Raises:
            InputError: the folder holds another run or can't be written, or another process adds to it.
        """
        self._merged(config)
        check_place(self.path, self.path.absolute())
        lock, file = FileLock(self.path / _LOCK, timeout=0), None

        @naming(self.path)
        def begin() -> TextIO:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise InputError(
                    f"another squeeze eval is writing to {self.path}; wait for it, or give another folder to -o"
                ) from None
            self.write_config(self._merged(config))  # another run may have come and gone
            whole = self._whole_lines()
            if self.predictions.exists() and len(whole) < self.predictions.stat().st_size:
                self.predictions.write_bytes(whole)  # a last line that was cut off by an interrupt is asked again
            return self.predictions.open("a", encoding="utf-8")

        @naming(self.path)
        def add(records: list[Record]) -> None:
            nonlocal file
            file = file or begin()
            for record in records:
                file.write(json.dumps(record) + "\n")
            file.flush()

        try:
            if self._whole_lines():
                file = begin()
            yield {(record["id"], record["row"]) for record in self.records()}, add
        finally:
            if file is not None:
                file.close()
            if lock.is_locked:
                (self.path / _LOCK).unlink(missing_ok=True)
                lock.release()

    def _merged(self, config: RunConfig) -> RunConfig:
        """What the folder holds after it was continued; a run without a record is none."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder to -o")
        merged = config
        if (self.path / _CONFIG).exists() and self._whole_lines():
            before = self.config()
            merged = _union(before, config)
            for name in ("suite", "model", "dtype", "data", "seed", "question"):
                if getattr(before, name) != getattr(config, name):
                    raise InputError(
                        f"{self.path} holds a run with {name} {getattr(before, name)!r}, not "
                        f"{getattr(config, name)!r}; give another folder to -o"
                    )
        elif self.path.exists() and any(path.name not in _OURS for path in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and holds no run; give another folder to -o")
        return merged

    def write_config(self, config: RunConfig) -> None:
        """As YAML; JSON values are YAML too, so nothing is needed to write or read it."""
        lines = [f"{name}: {json.dumps(value)}" for name, value in asdict(config).items()]
        (self.path / _CONFIG).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def config(self) -> RunConfig:
        """Of the run in this folder.

        Raises:
            InputError: there is none, or it can't be read.
        """
        path = self.path / _CONFIG
        if not path.is_file():
            raise InputError(f"{self.path} holds no run of squeeze eval (no {_CONFIG}); give the folder of one")
        try:
            pairs = [line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line.strip()]
            values = {name: json.loads(value) for name, value in pairs}
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            # Runs of before there was a choice.
            return RunConfig(**{"question": "selects", **values, **lists})
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} can't be read ({error}); it was written by another version or changed") from error

    def records(self) -> Iterator[dict[str, Any]]:
        """All answers so far, but for a last line that is not whole: just being written, or cut off by an interrupt."""
        for number, line in enumerate(self._whole_lines().splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not all(name in record for name in _FIELDS):
                raise InputError(
                    f"{self.predictions}:{number} is damaged: expected JSON with {', '.join(_FIELDS)}; take the line "
                    "out, and squeeze eval asks that again"
                )
            yield record

    def _whole_lines(self) -> bytes:
        text = self.predictions.read_bytes() if self.predictions.exists() else b""
        return text[: text.rfind(b"\n") + 1]


def _union(before: RunConfig, now: RunConfig) -> RunConfig:
    """What a folder holds after it was continued."""

    def both(name: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys((*getattr(before, name), *getattr(now, name))))

    tasks = both("tasks") if before.tasks and now.tasks else ()
    return replace(
        now,
        methods=both("methods"),
        budgets=tuple(sorted(both("budgets"))),
        lengths=tuple(sorted(both("lengths"))),
        tasks=tasks,
        samples=max(before.samples, now.samples),
    )
