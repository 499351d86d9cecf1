"""Answering a suite's questions under every row, and scoring the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from squeezed.errors import InputError
from squeezed.evaluation.greedy import Guesses, answer_rows, dense_answer
from squeezed.evaluation.jobs import Questions
from squeezed.evaluation.metrics import METRICS
from squeezed.evaluation.prepared import Prepared, Subject, in_order
from squeezed.evaluation.rows import Row
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.settings import Record


def answer_questions(
    subject: Subject,
    job: Questions,
    rows: Sequence[Row],
    done: set[tuple[str, str]],
    on_stage: Callable[[str], None] = lambda stage: None,
    whole: bool = True,
) -> Iterator[list[Record]]:
    """Records of each sample in turn; rows that are done already are left out. `whole`: see `answer_rows`.

    Raises:
        InputError: a question that does not fit the model behind its context.
    """
    prepared: Prepared | None = None
    for sample in job.samples:
        missing = in_order([row for row in rows if (sample.id, row.key) not in done])
        if not missing:
            continue
        prepared = prepared or Prepared(subject, job.context, on_stage)
        on_stage(f"answering {sample.task}")
        yield answer_sample(prepared, sample, rows, missing, job.length, whole)


def answer_sample(
    prepared: Prepared, sample: Sample, rows: Sequence[Row], missing: Sequence[Row], length: int, whole: bool = True
) -> list[Record]:
    """One record for each missing row."""
    subject = prepared.subject
    question = prepared.encode(sample.question, sample.answer_prefix)
    room = prepared.room()
    most = sample.max_new_tokens if room is None else min(sample.max_new_tokens, room - len(question[1]))
    if most < 1:
        raise InputError(
            f"sample {sample.id} takes {prepared.tokens + len(question[1])} tokens, more than the model has positions "
            "for; choose a smaller --length"
        )
    full = next(row for row in rows if row.budget is None)
    dense = dense_answer(prepared, full, question, most, whole)
    others = [row for row in missing if row.budget is not None]
    guesses = Guesses()
    guesses.add([*prepared.prefix.ids, *question[1], *dense])
    found = answer_rows(prepared, others, question, most, dense, guesses, whole=whole) if others else []
    answers = {row.key: (answer.tokens, answer.kv_budget) for row, answer in zip(others, found, strict=True)}
    answers[full.key] = (dense, 1.0)
    records = []
    for row in missing:
        tokens, budget = answers[row.key]
        text = subject.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        records.append(
            {
                "id": sample.id,
                "row": row.key,
                "task": sample.task,
                "length": length,
                "method": row.spec,
                "budget": row.budget,
                "kv_budget": round(budget, 6),
                "answer": text,
                "score": METRICS[sample.metric](text, sample),
                "same_as_full": tokens == dense,
                "tokens": len(tokens),
                "context_tokens": prepared.tokens,
                "depth": sample.depth,
            }
        )
    return records
