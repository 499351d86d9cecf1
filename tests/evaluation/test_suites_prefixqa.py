"""PreFixQA: questions that a careful reader of the text can answer, and nobody else; by template and by a model."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from suite_options import count_tokens, samples

from squeezed.demo import manual_path
from squeezed.errors import InputError
from squeezed.evaluation.metrics import METRICS, plain_words
from squeezed.evaluation.suites import find_suite
from squeezed.evaluation.suites.facts import GAP, Question, find_questions, spellings
from squeezed.evaluation.suites.prose import read_prose, split_sentences
from squeezed.evaluation.suites.written import (
    WrittenQuestion,
    save_questions,
    still_sound,
    write_questions,
)

MANUAL = Path(manual_path())
FOLDER = MANUAL.parent


def asked_of(text: str) -> dict[str, tuple[str, ...]]:
    return {question.text: question.answers for question in find_questions(read_prose(text))}


@pytest.mark.parametrize(
    ("sentence", "question", "answers"),
    [
        ("The captain of the ferry is Ada Lunt, a former baker.", "Who is the captain of the ferry?", "Ada Lunt"),
        ('The motto of the club is "Row on.", and it is old.', "What is the motto of the club?", "Row on"),
        ("The grey mule is called Bertram and was bought late.", "What is the grey mule called?", "Bertram"),
        ("The east tower was finished in 1874 by two masons.", "When was the east tower finished?", "1874"),
        ("The long drought began in May 1921, as all say.", "When did the long drought begin?", "May 1921"),
        ("The tower holds 52,000 litres in summer.", "How many litres does the tower hold in summer?", "52,000"),
        ("The old mast is 31 metres high and painted red.", "How many metres high is the old mast?", "31|thirty-one"),
        ("The organ was built by the joiner Emil Brask, who sang.", "Who was the organ built by?", "Emil Brask"),
    ],
)
def test_simple_sentences_become_plain_questions(sentence: str, question: str, answers: str) -> None:
    found = asked_of(f"Nothing else is said here.\n\n{sentence}\n\nNor there.")
    assert found[question] == tuple(answers.split("|"))


@pytest.mark.parametrize(
    ("what", "quoted", "answer"),
    [
        ("date", "They landed on ____ with a crate of lemons.", "3 June 1907"),
        ("year", "The hens came back in ____ and never left again.", "1907"),
        ("number", "It took them ____ days to come back home.", "seventeen"),
        ("amount", "We paid them ____ for a month of hard work.", "$12,500"),
        ("name", "My old friend ____ told me about the well.", "Vera Moss"),
        ("name or term", "On the charts this rock is called the ____.", "Long Tooth"),
    ],
)
def test_other_sentences_are_quoted_with_a_gap(what: str, quoted: str, answer: str) -> None:
    found = asked_of(quoted.replace(GAP, answer))
    assert found[f'Which {what} belongs in the gap in this sentence of the text? "{quoted}"'][0] == answer


@pytest.mark.parametrize(
    "sentence",
    [
        "The three big firms were Alder, Birch and Cedar at the time.",  # the first of several
        "The company is Alder. The company sold. The company rose. The company fell. The company ran. The company is.",
        "Thanks to Vera Moss, who told me about the well by the church.",  # a list of thanks
        "In the next years he drank 3 cups of tea every day.",  # too easily guessed
        "She ran the mile in 4:37 minutes when she was young.",  # a part of a number
        "I wrote it on Windows 95 machines with a friend of mine.",  # a part of a name
        "They asked us to come, and we came, for 8 or 9 months.",  # a range
        "The paper was published by Oxford University Press of London.",  # part of a longer name
    ],
)
def test_doubtful_sentences_become_no_question(sentence: str) -> None:
    assert asked_of(sentence) == {}


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("3 June 1907", "June 3 1907"),
        ("June 3, 1907", "3 June 1907"),
        ("12 August", "August 12"),
        ("31", "thirty-one"),
        ("Eleven", "11"),
    ],
)
def test_dates_and_small_numbers_have_two_spellings(answer: str, other: str) -> None:
    assert spellings(answer) == (answer, other)
    assert spellings("1907") == ("1907",)
    assert spellings("Ada Lunt") == ("Ada Lunt",)


def test_what_stands_twice_is_not_asked() -> None:
    fact = "The east tower was finished in 1874 by two masons."
    assert asked_of(fact)
    assert not asked_of(fact + " In 1874 the river froze over as well.")


def test_what_has_a_name_is_asked_about_by_it() -> None:
    text = "The supply ship is called the Marigold. The captain of the supply ship is Josef Lindqvist."
    assert asked_of(text)["Who is the captain of the Marigold?"] == ("Josef Lindqvist",)


def test_references_lead_to_headings_and_links_to_their_targets() -> None:
    text = (
        "# Book\n\n## 1. Rowing\n\nHow to hold the oars is explained in chapter 2 with many drawings.\n\n"
        "## 2. Posture and grip\n\nSit upright. See [the drawings](figures/all.svg) for more than words can say.\n"
    )
    found = asked_of(text)
    assert found['Which address or file does the link with the text "the drawings" lead to?'] == ("figures/all.svg",)
    pointing = next(question for question in found if question.startswith("What is the title of the chapter that"))
    assert found[pointing] == ("Posture and grip",)
    assert found['What are the first five words under the heading "Rowing"?'] == ("How to hold the oars",)
    assert found['Which section comes right after the section "Rowing"? Give its heading.'] == ("Posture and grip",)


def test_every_question_of_the_manual_is_sound() -> None:
    prose = read_prose(MANUAL.read_text())
    questions = find_questions(prose)
    assert len(questions) > 100
    assert {question.task for question in questions} == set(find_suite("prefixqa").tasks)
    text = " ".join(plain_words(prose.text))
    for question in questions:
        answer = " ".join(plain_words(question.answers[0]))
        assert f" {answer} " in f" {text} "
        assert not any(
            f" {' '.join(plain_words(a))} " in f" {' '.join(plain_words(question.text))} " for a in question.answers
        )
        near = prose.text[max(0, question.start - 300) : question.start + 300]
        assert question.task in ("sections", "references") or plain_words(question.answers[0])[-1] in plain_words(near)


def test_a_quoted_sentence_with_its_gap_filled_stands_in_the_text() -> None:
    prose = read_prose(MANUAL.read_text())
    quoted = [question for question in find_questions(prose) if GAP in question.text]
    assert len(quoted) > 40
    for question in quoted:
        sentence = re.findall(r'"(.+)"', question.text)[0].replace(GAP, question.answers[0])
        for part in sentence.split("... "):
            assert part.removesuffix(" ...") in " ".join(prose.text.split())


def test_samples_share_their_context_and_are_solved_by_their_answers() -> None:
    found = samples("prefixqa", 6000, count=4, data=FOLDER)
    assert len({sample.context for sample in found}) == 1
    assert MANUAL.read_text().strip()[:200] in found[0].context
    counts = Counter(sample.task for sample in found)
    assert counts["dates"] == counts["figures"] == counts["names"] == counts["definitions"] == 4
    assert [sample.depth for sample in found] == sorted(sample.depth or 0 for sample in found)
    for sample in found:
        assert METRICS[sample.metric](f"It is {sample.answers[0]}.", sample) == 1
        assert METRICS[sample.metric](sample.question, sample) == 0
        assert sample.question.endswith("\nAnswer with a few words of the text.")


def test_two_dozen_questions_on_each_context_and_no_context_longer_than_asked() -> None:
    found = samples("prefixqa", 2000, count=50, data=MANUAL)
    assert max(Counter(sample.context for sample in found).values()) == 24
    assert all(count_tokens(sample.context) <= 2000 for sample in found)
    order = [sample.context for sample in found]
    assert len(set(order)) > 2
    assert [a != b for a, b in itertools.pairwise(order)].count(True) == len(set(order)) - 1


def test_the_seed_draws_the_questions() -> None:
    first, again = (samples("prefixqa", 6000, count=2, data=MANUAL) for _ in range(2))
    assert first == again
    assert first != samples("prefixqa", 6000, count=2, seed=1, data=MANUAL)


def test_only_the_tasks_asked_for() -> None:
    assert {sample.task for sample in samples("prefixqa", 6000, tasks=("dates", "names"), data=MANUAL)} == {
        "dates",
        "names",
    }


def test_a_text_without_facts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("nothing of note, and then nothing again.")
    with pytest.raises(InputError, match="has no facts to ask dates about"):
        samples("prefixqa", 500, tasks=("dates",), data=tmp_path)
    with pytest.raises(InputError, match="no data folder was given; expected --data with text or Markdown files"):
        samples("prefixqa", 500)


def test_prose_is_read_without_its_marks() -> None:
    prose = read_prose(
        "Title\n=====\n\n## 2.1 Use `it`\n\nSome *very* **bold** claim, see [here](x.md).\n- One item of a list.\n\n"
        "```\ncode here. And More.\n```\n\n| a | b |\n\n"
        'Mr. Smith left. Dr. A. Jones stayed, e.g. for tea. "Why?" They asked.\n'
    )
    assert [(heading.title, heading.number, heading.level) for heading in prose.headings] == [
        ("Title", "", 1),
        ("Use it", "2.1", 2),
    ]
    assert [sentence.text for sentence in prose.sentences] == [
        "Some very bold claim, see here.",
        "One item of a list.",
        "Mr. Smith left.",
        "Dr. A. Jones stayed, e.g. for tea.",
        '"Why?"',
        "They asked.",
    ]
    assert prose.links == (("here", "x.md", prose.text.index("[here]")),)
    assert split_sentences("One. Two.") == [("One.", 0), ("Two.", 5)]


class Reader:
    """Stands in for a served model: asks as it is told, and answers with the first date that it sees."""

    def __init__(self, knows: str = "", blind: bool = False, question: str = "When did it happen?") -> None:
        self.knows, self.blind, self.question = knows, blind, question
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        dates = re.findall(r"\d{1,2} [A-Z]\w+ \d{4}", prompt)
        if "Write one question" in prompt:
            return f"Question: {self.question}\nI hope that helps."
        if not dates:
            return self.knows
        return "unknown" if self.blind else f"It was on {dates[0]}."


def test_a_model_writes_questions_that_pass_its_own_check() -> None:
    text = f"The bell rang on 5 May 1931. {'Then it was quiet for a long time. ' * 12}"
    reader = Reader()
    writing = write_questions(reader, text + "\n\nThe end.")
    (written,) = writing.questions
    assert (written.question, written.answer) == ("When did it happen?", "5 May 1931")
    assert "The bell rang on 5 May 1931." in written.passage
    assert writing.dropped == {}
    assert [text[:28] in prompt for prompt in reader.prompts] == [True, False, True, True]


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (Reader(knows="5 May 1931, of course"), "answered without the document"),
        (Reader(blind=True), "not answered with the document"),
        (Reader(question="What rang on 5 May 1931?"), "the question gives the answer away"),
        (Reader(question="No question at all"), "no question"),
    ],
)
def test_written_questions_that_fail_the_check_are_dropped(reader: Reader, reason: str) -> None:
    text = f"The bell rang on 5 May 1931. {'Then it was quiet for a long time. ' * 12}"
    writing = write_questions(reader, text)
    assert writing.questions == ()
    assert writing.dropped == {reason: 1}


def test_only_what_stands_once_is_asked_for() -> None:
    text = f"The bell rang on 5 May 1931. {'Then it was quiet for a long time. ' * 12}"
    with pytest.raises(InputError, match="has no passage with a name, date or number that stands only there"):
        write_questions(Reader(), f"{text}\n\nAgain it rang. It was 5 May 1931 that they spoke of.")


def test_saved_questions_are_asked_where_their_passage_is(tmp_path: Path) -> None:
    text = tmp_path / "bells.txt"
    passage = "The bell rang on 5 May 1931, and the ferry did not come."
    text.write_text(f"{passage}\n\n" + "\n\n".join(f"Line {i} of no interest." for i in range(200)))
    written = WrittenQuestion("When did the bell ring?", "5 May 1931", passage)
    gone = WrittenQuestion("When did it snow?", "6 June 1944", "It snowed on 6 June 1944.")
    save_questions(text, [written, gone])
    found = samples("prefixqa", 400, tasks=("written",), data=tmp_path)
    assert [(sample.question.split("\n")[0], sample.answers) for sample in found] == [
        (written.question, ("5 May 1931", "May 5 1931"))
    ]
    assert passage in found[0].context
    assert samples("prefixqa", 400, tasks=("written",), data=text) == found
    assert still_sound([gone], read_prose(passage)) == []
    with pytest.raises(InputError, match="has no written questions"):
        samples("prefixqa", 400, tasks=("written",), data=MANUAL)


def test_a_document_without_passages_is_refused() -> None:
    with pytest.raises(InputError, match="the document of 3 words has no passage"):
        write_questions(Reader(), "Too short anyway.")


def test_questions_know_what_they_are_keyed_by() -> None:
    question = Question("dates", "When?", ("1874",), 0, "1874")
    assert question.natural
    assert question.subject == ""
