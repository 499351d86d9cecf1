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
from squeezed.evaluation.suites import fact_patterns as forms
from squeezed.evaluation.suites.facts import Question, is_sound, spellings
from squeezed.evaluation.suites.prose import Prose, read_prose

Answerer = Callable[[str], str]  # prompt -> answer
WRITTEN = "written"  # the task's name
SUFFIX = ".questions.jsonl"
_PASSAGE = 90  # words, at least
_ASKED = re.compile(r"(?:question:)?\s*(?P<question>[^\n:?][^\n?]+\?)", re.IGNORECASE)
_AMOUNT = re.compile(rf"{forms.FIGURE.pattern}(?: [a-z]+|%)", re.IGNORECASE)  # a number and what is counted

_WRITE = (
    "Read this passage.\n\n{passage}\n\nWrite one question about it whose answer is: {answer}\nThe question has to "
    "name what it is about, so that it is clear to someone who has the whole book before them and not only this "
    "passage. Reply with the question only."
)
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

    It is given the answer, a name, date or number that stands at one place of the document only: even small models can
    ask for that. A question is kept if the model does not answer it without the document, and if it gives this answer
    twice: from the whole document and from the passage alone.

    Args:
        answerer: prompt -> answer. It is called up to four times a passage.
        document: must fit the model's context together with a question.
        seed: of the order in which passages are tried.
        on_progress: called with (passages done, passages).

    Raises:
        InputError: the document has no passage to ask about.
    """
    prose = read_prose(document)
    rng = random.Random(seed)
    passages = [(passage, answers) for passage in _passages(prose) if (answers := _answers(passage, prose))]
    if not passages:
        raise InputError(
            f"the document of {len(document.split())} words has no passage with a name, date or number that stands "
            f"only there; expected prose, and at least {_PASSAGE} words of it"
        )
    rng.shuffle(passages)
    kept: list[WrittenQuestion] = []
    dropped: Counter[str] = Counter()
    for done, (passage, answers) in enumerate(passages, 1):
        if len(kept) == count:
            break
        written = _write(answerer, passage, rng.choice(answers))
        reason = "no question" if written is None else why_dropped(written, prose, answerer)
        if reason:
            dropped[reason] += 1
        elif written:
            kept.append(written)
        on_progress(done, len(passages))
    return Writing(tuple(kept), dict(dropped))


def _write(answerer: Answerer, passage: str, answer: str) -> WrittenQuestion | None:
    asked = _ASKED.search(answerer(_WRITE.format(passage=passage, answer=answer)))
    return WrittenQuestion(asked["question"].strip(), answer, passage) if asked else None


def why_dropped(written: WrittenQuestion, prose: Prose, answerer: Answerer) -> str | None:
    """Why a question is no good, or None if it is."""
    if not is_sound(_question(written, prose), prose):
        return "the question gives the answer away"
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
    return Question(WRITTEN, written.question, spellings(written.answer), max(0, start), written.answer)


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


def _answers(passage: str, prose: Prose) -> list[str]:
    """Dates, names and numbers of the passage that stand nowhere else in the text."""
    taken: list[tuple[int, int]] = []
    for form in (forms.DATE, forms.PERSON, _AMOUNT):
        for found in re.finditer(form, passage):
            if all(found.end() <= begin or end <= found.start() for begin, end in taken):
                taken.append(found.span())
    spans = dict.fromkeys(passage[begin:end] for begin, end in taken)
    return [span for span in spans if prose.occurrences(span) == 1]


def _says(text: str, answer: str) -> bool:
    said = f" {' '.join(plain_words(text))} "
    return any(f" {' '.join(plain_words(spelling))} " in said for spelling in spellings(answer))
