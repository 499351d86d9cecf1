"""What a suite hands to the harness, and what the harness hands to a metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One question about one fixed context.

    Attributes:
        id: unique within a suite, stable over runs, for example `niah_single_1/4096/17`.
        task: its task within the suite.
        context: the fixed context, template not included. Samples that share a context hold the same string and come
            one after another, so that a context is prepared once.
        question: the user input.
        answers: accepted answers, or all strings that must be found, as the metric has it.
        metric: a key of `squeezed.evaluation.metrics.METRICS`.
        max_new_tokens: longest answer.
        answer_prefix: text the answer starts with, put after the generation prompt; not part of what is scored.
        choices: all labels of a classification task, otherwise empty.
        depth: where in the context the one needed passage stands, 0 first to 1 last; None if there are several or
            nobody knows.
    """

    id: str
    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""
    choices: tuple[str, ...] = ()
    depth: float | None = None
