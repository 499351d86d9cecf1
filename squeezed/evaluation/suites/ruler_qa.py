"""RULER's question answering: the documents with the answer among other documents of SQuAD or HotpotQA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from squeezed.errors import InputError
from squeezed.evaluation import data
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites.base import Fitted, SuiteOptions

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class _Question:
    """A question, its answers, the documents it needs, and others of the same article (numbers of documents)."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Corpus:
    documents: tuple[str, ...]
    questions: tuple[_Question, ...]


def qa_samples(task: str, options: SuiteOptions, file: str) -> Iterator[Sample]:
    """`qa_1` (squad.json) and `qa_2` (hotpotqa.json); questions in an order drawn from the seed."""
    path = data.folder(options.data, f"RULER's {file}") / file
    corpus = _squad(path) if file == "squad.json" else _hotpot(path)
    order = random.Random(f"{options.seed}/{task}").sample(range(len(corpus.questions)), len(corpus.questions))
    fitted = Fitted(task, options)
    index = 0
    refusal: InputError | None = None
    for place in order:
        if index == options.count:
            return
        question = corpus.questions[place]
        fitted.smallest = len(question.needed)
        try:
            context = fitted.build(_Contexts(corpus, question, f"{options.seed}/{task}/{place}").make)
        except InputError as error:  # this question's own documents are too long
            refusal = error
            continue
        needed = corpus.documents[question.needed[0]]
        yield Sample(
            id=options.id(task, index),
            task=task,
            context=context,
            question=f"{_INSTRUCTION}\n\nQuestion: {question.text}",
            answers=question.answers,
            metric="string_match_part",
            max_new_tokens=32,
            answer_prefix="Answer:",
            depth=context.index(needed) / len(context) if len(question.needed) == 1 else None,
        )
        index += 1
    if index < options.count:
        raise refusal or InputError(f"{path} has {index} questions, but {options.count} were asked for; ask for fewer")


class _Contexts:
    """One question's contexts of any number of documents; a longer one holds all documents of a shorter one."""

    def __init__(self, corpus: _Corpus, question: _Question, name: str) -> None:
        rng = random.Random(name)
        related = rng.sample(question.related, len(question.related))
        taken = {*question.needed, *related}
        others = [i for i in rng.sample(range(len(corpus.documents)), len(corpus.documents)) if i not in taken]
        self._documents = corpus.documents
        self._pool = [*question.needed, *related, *others]
        self._order = rng.getrandbits(64)

    def make(self, size: int) -> str:
        chosen = (self._pool * -(-size // len(self._pool)))[:size]
        random.Random(self._order).shuffle(chosen)
        listed = "\n\n".join(f"Document {i}:\n{self._documents[number]}" for i, number in enumerate(chosen, 1))
        return f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}"


@lru_cache(maxsize=1)
def _squad(path: Path) -> _Corpus:
    try:
        articles: list[dict[str, Any]] = data.read_json(path)["data"]
        texts = sorted({part["context"] for article in articles for part in article["paragraphs"]})
        numbers = {text: number for number, text in enumerate(texts)}
        questions = []
        for article in articles:
            own = [numbers[part["context"]] for part in article["paragraphs"]]
            for part in article["paragraphs"]:
                number = numbers[part["context"]]
                related = tuple(other for other in dict.fromkeys(own) if other != number)
                for asked in part["qas"]:
                    if not asked["is_impossible"]:
                        answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                        questions.append(_Question(asked["question"], answers, (number,), related))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not in the format of SQuAD 2.0 ({error!r}); fetch it again") from error
    return _Corpus(tuple(texts), tuple(questions))


@lru_cache(maxsize=1)
def _hotpot(path: Path) -> _Corpus:
    try:
        records = data.read_json(path)
        own = [[f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]] for record in records]
        texts = sorted({text for documents in own for text in documents})
        numbers = {text: number for number, text in enumerate(texts)}
        questions = [
            _Question(
                record["question"], (record["answer"],), tuple(dict.fromkeys(numbers[text] for text in documents))
            )
            for record, documents in zip(records, own, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not in the format of HotpotQA ({error!r}); fetch it again") from error
    return _Corpus(tuple(texts), tuple(questions))
