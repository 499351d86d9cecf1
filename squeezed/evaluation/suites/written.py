"""Questions that a served model writes and checks itself: generate, then filter.

Anything that turns a prompt into a text can be the model, see `Answerer`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from squeezed.errors import InputError
from squeezed.evaluation import data
from squeezed.evaluation.metrics import plain_words
from squeezed.evaluation.suites.facts import Question, is_sound
from squeezed.evaluation.suites.prose import Prose, read_prose

Answerer = Callable[[str], str]  # prompt -> answer
WRITTEN = "written"  # the task's name
SUFFIX = ".questions.jsonl"
_PASSAGE = 90  # words, at least
_SPOKEN = re.compile(r"question:\s*(?P<question>[^\n]+\?)\s*\n+\s*answer:\s*(?P<answer>[^\n]+)", re.IGNORECASE)

_WRITE = """Read this passage.

{passage}

Write one question about a fact that the passage states, and its answer. The question has to name what it is about, so \
that it is clear to someone who has the whole book before them and not only this passage. The answer has to be at most \
five words, copied from the passage: a name, a number, a date or a term. Write these two lines and nothing else:
Question: ...
Answer: ..."""
_ASK_WITH = "Read the text below.\n\n{text}\n\n{question}\nAnswer with a few words of the text."
_ASK_WITHOUT = "{question}\nAnswer with a few words. If you are not sure, give your best guess."


@dataclass(frozen=True)
class WrittenQuestion:
    """A question, its answer in words of the text, and the passage that it was written about."""

    question: str
    answer: str
    passage: str


@dataclass(frozen=True)
class Writing:
    """What came out: the questions kept, and how many were dropped for what reason."""

    questions: tuple[WrittenQuestion, ...]
    dropped: dict[str, int]


def write_questions(
    answerer: Answerer,
    document: str,
    count: int = 24,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, passages: None,
) -> Writing:
    """Have a model write up to `count` questions about a document, each about another passage, and check them.

    A question is kept if its answer is short and stands at one place of the document only, if the model does not
    answer it without the document, and if it gives the same answer twice: from the whole document and from the passage.

    Args:
        answerer: prompt -> answer. It is called up to four times a passage.
        document: must fit the model's context together with a question.
        seed: of the order in which passages are tried.
        on_progress: called with (passages done, passages).

    Raises:
        InputError: the document has no passage to ask about.
    """
    prose = read_prose(document)
    passages = _passages(prose)
    if not passages:
        raise InputError(f"the document has {len(document.split())} words of prose; expected at least {_PASSAGE}")
    random.Random(seed).shuffle(passages)
    kept: list[WrittenQuestion] = []
    dropped: Counter[str] = Counter()
    for done, passage in enumerate(passages, 1):
        if len(kept) == count:
            break
        found = _SPOKEN.search(answerer(_WRITE.format(passage=passage)))
        if found is None:
            dropped["not in the form asked for"] += 1
        else:
            written = WrittenQuestion(found["question"].strip(), found["answer"].strip().rstrip("."), passage)
            reason = why_dropped(written, prose, answerer)
            if reason:
                dropped[reason] += 1
            elif any(other.answer == written.answer for other in kept):
                dropped["asked before"] += 1
            else:
                kept.append(written)
        on_progress(done, len(passages))
    return Writing(tuple(kept), dict(dropped))


def why_dropped(written: WrittenQuestion, prose: Prose, answerer: Answerer) -> str | None:
    """Why a question is no good, or None if it is."""
    if not _says(written.passage, written.answer):
        return "answer not in the passage"
    if not is_sound(_question(written, prose), prose):
        return "answer long, at several places, or in the question"
    if _says(answerer(_ASK_WITHOUT.format(question=written.question)), written.answer):
        return "answered without the document"
    for text in (prose.text, written.passage):
        if not _says(answerer(_ASK_WITH.format(text=text, question=written.question)), written.answer):
            return "not answered with the document"
    return None


def still_sound(written: Iterable[WrittenQuestion], prose: Prose) -> list[Question]:
    """The questions whose passage is in this text and whose answer stands there once."""
    here = [_question(one, prose) for one in written if prose.occurrences(one.passage)]
    return [question for question in here if is_sound(question, prose)]


def save_questions(path: Path, questions: Iterable[WrittenQuestion]) -> None:
    """Write questions next to their text, so that the task `written` finds them: `manual.questions.jsonl`."""
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
    path.with_name(path.stem + SUFFIX).write_text("\n".join(lines) + "\n", "utf-8")


def read_questions(path: Path) -> list[WrittenQuestion]:
    """All questions that were saved in a folder, or next to a file.

    Raises:
        InputError: there are none, or a record is not as expected.
    """
    files = sorted(path.rglob("*" + SUFFIX)) if path.is_dir() else [path.with_name(path.stem + SUFFIX)]
    found = []
    for file in files:
        if file.exists():
            try:
                found += [WrittenQuestion(**record) for record in data.read_jsonl(file)]
            except TypeError as error:
                raise InputError(f"{file} is not as expected ({error}); write the questions again") from error
    if not found:
        raise InputError(f"{path} has no written questions; expected {SUFFIX[1:]} files, which a model writes first")
    return found


def _question(written: WrittenQuestion, prose: Prose) -> Question:
    start = prose.text.find(written.answer)
    return Question(WRITTEN, written.question, (written.answer,), max(0, start), written.answer)


def _passages(prose: Prose) -> list[str]:
    """Neighbouring sentences of one section, together at least `_PASSAGE` words."""
    passages: list[str] = []
    held: list[str] = []
    section = -1
    for sentence in prose.sentences:
        if sentence.section != section:
            held, section = [], sentence.section
        held.append(sentence.text)
        if sum(len(text.split()) for text in held) >= _PASSAGE:
            passages.append(" ".join(held))
            held = []
    return passages


def _says(text: str, answer: str) -> bool:
    return f" {' '.join(plain_words(answer))} " in f" {' '.join(plain_words(text))} "
