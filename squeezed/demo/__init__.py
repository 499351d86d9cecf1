"""The demo's material: one long text, questions about it, and (in `fetch`) a small model that can answer them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Question", "manual_path", "more_questions", "questions"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """A question about the manual and the strings of which an answer has to contain one."""

    question: str
    answers: tuple[str, ...]

    def is_answered_by(self, text: str) -> bool:
        """Whether `text` contains one of the accepted answers, in any case of letters."""
        return any(answer.casefold() in text.casefold() for answer in self.answers)


def manual_path() -> Path:
    """The text that the demo asks about, as a Markdown file."""
    return _HERE / "manual.md"


def questions() -> list[Question]:
    """The demo's five questions, in the order in which the manual answers them."""
    return list(_load()["questions"])


def more_questions() -> list[Question]:
    """Ten further questions that the demo model answers with dense attention, for tests and benchmarks."""
    return list(_load()["more"])


@cache
def _load() -> dict[str, tuple[Question, ...]]:
    data = json.loads((_HERE / "questions.json").read_text(encoding="utf-8"))
    return {key: tuple(Question(row["question"], tuple(row["answer"])) for row in rows) for key, rows in data.items()}
