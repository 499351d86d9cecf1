"""PreFixQA, ours: two dozen questions with short, checkable answers on each context, from any folder of texts.

The Squeezed Attention paper (arXiv 2411.09688) announces a data set of this name, questions on arXiv documents with
short answers, and has not released it. Here templates ask for facts that the text states once
(`squeezed.evaluation.suites.facts`). The task `written` has the questions that a model wrote and checked
(`squeezed.evaluation.suites.written`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from squeezed.errors import InputError
from squeezed.evaluation import data
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Suite, SuiteOptions
from squeezed.evaluation.suites.facts import TASKS, Question, find_questions
from squeezed.evaluation.suites.prose import Prose, read_prose
from squeezed.evaluation.suites.windows import windows
from squeezed.evaluation.suites.written import WRITTEN, WrittenQuestion, read_questions, still_sound

NEEDS = "text or Markdown files"
QUESTIONS = 24  # on each context
_WORTHWHILE = 3  # a context with fewer questions is left out
_MOST_TEXTS = 200  # contexts that are searched for questions
_INTRODUCTION = "Read the text below. You will be asked about it.\n\n"
_INSTRUCTION = "Answer with a few words of the text."


def _samples(tasks: tuple[str, ...], options: SuiteOptions) -> Iterator[Sample]:
    path = options.data if options.data and options.data.is_file() else data.folder(options.data, NEEDS)
    length = options.length - options.count_tokens(_INTRODUCTION) - 2  # the seam may cost a token
    texts = list(windows(path, length, options.count_tokens))
    random.Random(options.seed).shuffle(texts)
    written = read_questions(path) if WRITTEN in tasks else []
    missing = dict.fromkeys(tasks, options.count)
    for name, prose, found in _richest_first(texts[:_MOST_TEXTS], tasks, written):
        chosen = _choose(found, missing, random.Random(f"{options.seed}/{name}"))
        if len(chosen) < _WORTHWHILE and any(left < options.count for left in missing.values()):
            continue  # what is still missing is too thinly spread: every context costs a prefill
        for question in chosen:
            missing[question.task] -= 1
            # Which others are chosen depends on how many are asked for, so a place among them would be no name.
            words = f"{zlib.crc32(question.text.encode()):08x}"
            yield _sample(options.id(question.task, name, question.start, words), question, prose)
    if all(left == options.count for left in missing.values()):
        raise InputError(f"{path} has no facts to ask {', '.join(tasks)} about; expected prose with dates, names ...")


def _richest_first(
    texts: list[tuple[str, str]], tasks: tuple[str, ...], written: list[WrittenQuestion]
) -> list[tuple[str, Prose, list[Question]]]:
    """Name, text and questions, those with at least `QUESTIONS` first and otherwise as they come."""
    found = []
    for name, text in texts:
        prose = read_prose(text)
        questions = [question for question in find_questions(prose) if question.task in tasks]
        found.append((name, prose, questions + still_sound(written, prose)))
    return sorted(found, key=lambda text: -min(QUESTIONS, len(text[2])))


def _choose(found: list[Question], missing: dict[str, int], rng: random.Random) -> list[Question]:
    """Up to `QUESTIONS`, as evenly over the tasks as the text allows, plain English first, in the order of the text."""
    left = {
        task: sorted(
            (question for question in found if question.task == task),
            key=lambda question: (question.natural, rng.random()),
        )[-wanted:]
        for task, wanted in missing.items()
        if wanted
    }
    chosen: list[Question] = []
    while any(left.values()) and len(chosen) < QUESTIONS:
        for questions in left.values():
            if questions and len(chosen) < QUESTIONS:
                chosen.append(questions.pop())
    return sorted(chosen, key=lambda question: question.start)


def _sample(id: str, question: Question, prose: Prose) -> Sample:
    return Sample(
        id=id,
        task=question.task,
        context=_INTRODUCTION + prose.text,
        question=f"{question.text}\n{_INSTRUCTION}",
        answers=question.answers,
        metric="short_answer",
        max_new_tokens=32,
        answer_prefix="Answer:",
        depth=min(1.0, question.start / len(prose.text)),
    )


PREFIXQA = Suite(
    "prefixqa",
    TASKS,
    NEEDS,
    _samples,
    f"facts of any texts, {QUESTIONS} questions on each context",
    extra=(WRITTEN,),
)
