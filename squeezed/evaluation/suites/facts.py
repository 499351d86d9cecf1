"""Questions by template over facts found in a text: what is asked, the words that answer it, and where they stand.

A question is made in plain English where the sentence has one of a few simple forms ("The X of the Y is Z"); otherwise
the sentence is quoted with a gap. Every question passes :func:`is_sound`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from squeezed.evaluation.metrics import plain_words
from squeezed.evaluation.suites import fact_patterns as forms
from squeezed.evaluation.suites.prose import Prose, Sentence
from squeezed.evaluation.suites.words import NUMBER_WORDS

TASKS = ("dates", "figures", "names", "definitions", "sections", "references")
GAP = "____"
_SHOWN = 16  # words of a quoted sentence on each side of the gap
_LONGEST_ANSWER = 8
_FIRST_WORDS = 5  # of a section
_GUESSABLE = ("0", "1", "2", "3", "4", "zero", "one", "two", "three", "four", "100", "hundred")
_FEW = 5
_CURRENCIES = "$\u20ac\u00a3"
_DAY_FIRST = re.compile(rf"(?P<day>\d{{1,2}}) (?P<month>{forms.MONTH})(?:,? (?P<year>\d{{4}}))?")
_MONTH_FIRST = re.compile(rf"(?P<month>{forms.MONTH}) (?P<day>\d{{1,2}})(?:,? (?P<year>\d{{4}}))?")
_QUOTES = "\"'\u201c\u201d"


@dataclass(frozen=True)
class Question:
    """One question about a text.

    Attributes:
        task: one of `TASKS`.
        start: about where in the text the answer stands (characters).
        key: words of the text that must occur there once, the answer among them.
        natural: asked in plain words, not by a quotation with a gap.
        subject: what a definition defines, otherwise empty.
    """

    task: str
    text: str
    answers: tuple[str, ...]
    start: int
    key: str
    natural: bool = True
    subject: str = ""


def find_questions(prose: Prose) -> list[Question]:
    """All sound questions of a text, in the order of its facts; one for each fact, plain English before gaps."""
    found: dict[str, Question] = {}
    for question in [*_from_sentences(prose), *_from_sections(prose), *_from_references(prose)]:
        if question.key not in found or (question.natural and not found[question.key].natural):
            found[question.key] = question
    sound = [question for question in found.values() if is_sound(question, prose)]
    sound += [question for question in _by_other_names(sound, prose) if is_sound(question, prose)]
    return sorted(sound, key=lambda question: question.start)


def is_sound(question: Question, prose: Prose) -> bool:
    """The answer is short, stands at one place of the text only, and the question does not give it away."""
    asked = f" {' '.join(plain_words(question.text))} "
    return (
        prose.occurrences(question.key) == 1
        and 1 <= len(plain_words(question.answers[0])) <= _LONGEST_ANSWER
        and all(f" {' '.join(plain_words(answer))} " not in asked for answer in question.answers)
    )


def _from_sentences(prose: Prose) -> Iterator[Question]:
    for sentence in prose.sentences:
        if _is_statement(sentence.text):
            yield from _definitions(sentence, prose)
            yield from _dates(sentence, prose)
            yield from _figures(sentence, prose)
            yield from _names(sentence, prose)


def _is_statement(text: str) -> bool:
    words = text.split()
    return (
        6 <= len(words) <= 45
        and text[0].isupper()
        and text.rstrip(_QUOTES)[-1:] in (".", "!")
        and not re.search(r"https?:|[{}<>=|\\@]", text)
        and sum(word[0].isupper() for word in words) <= 0.6 * len(words)
        and not text.startswith(("Thanks to", "Thank you"))
    )


def _definitions(sentence: Sentence, prose: Prose) -> Iterator[Question]:
    called = forms.IS_CALLED.search(sentence.text)
    plain = forms.IS.search(sentence.text)
    if called:
        subject = _inside(called["subject"])
        text = f"What {called['be']} {subject} {called['how']}?"
        yield _plain("definitions", text, sentence, called, subject)
    elif plain and _once(prose, f"{plain['subject']} {plain['be']}") and _is_the_one(sentence, plain, prose):
        subject = _inside(plain["subject"])
        text = f"{_who_or_what(subject, plain['answer'])} {plain['be']} {subject}?"
        yield _plain("definitions", text, sentence, plain, subject)
    else:
        for named in forms.CALLED.finditer(sentence.text):
            yield _gap("definitions", "name or term", sentence, named.span("answer"))


def _dates(sentence: Sentence, prose: Prose) -> Iterator[Question]:
    done, happened = forms.DONE_WHEN.match(sentence.text), forms.HAPPENED_WHEN.match(sentence.text)
    if done and _once(prose, f"{done['subject']} {done['be']} {done['done']}"):
        text = f"When {done['be']} {_inside(done['subject'])} {done['done']}?"
        yield _plain("dates", text, sentence, done)
    if happened and _once(prose, f"{happened['subject']} {happened['verb']}"):
        text = f"When did {_inside(happened['subject'])} {forms.HAPPENED[happened['verb']]}?"
        yield _plain("dates", text, sentence, happened)
    for date in re.finditer(forms.DATE, sentence.text):
        what = "year" if re.fullmatch(forms.YEAR, date.group()) else "date"
        yield _gap("dates", what, sentence, date.span())


def _figures(sentence: Sentence, prose: Prose) -> Iterator[Question]:
    many, high = forms.HOW_MANY.match(sentence.text), forms.HOW_HIGH.match(sentence.text)
    if many and _once(prose, f"{many['subject']} {many['verb']}"):
        helper, verb = forms.VERBS[many["verb"]]
        text = f"How many {many['unit']} {helper} {_inside(many['subject'])} {verb}{many['rest']}?"
        yield _figure(text, sentence, many.span("answer"), natural=True)
    elif high and _once(prose, f"{high['subject']} {high['be']}"):
        text = f"How many {high['unit']} {high['how']} {high['be']} {_inside(high['subject'])}?"
        yield _figure(text, sentence, high.span("answer"), natural=True)
    taken = [found.span() for what in (forms.DATE, forms.REFERENCE) for found in re.finditer(what, sentence.text)]
    for pattern, what in ((forms.FIGURE, "number"), (forms.MONEY, "amount")):
        for found in pattern.finditer(sentence.text):
            inside = any(begin < found.end() and found.start() < end for begin, end in taken)
            if not inside and (what == "amount" or not forms.NOT_A_COUNT.search(sentence.text[: found.start()])):
                text = _with_gap(what, sentence, found.span())
                yield _figure(text, sentence, found.span(), natural=False)


def _names(sentence: Sentence, prose: Prose) -> Iterator[Question]:
    by = forms.DONE_BY.match(sentence.text)
    if by and _once(prose, f"{by['subject']} {by['be']} {by['done']}"):
        done = re.sub(rf" (?:in|on) {forms.DATE}", "", by["done"])
        yield _plain("names", f"Who {by['be']} {_inside(by['subject'])} {done} by?", sentence, by)
    names = list(forms.PERSON.finditer(sentence.text))
    if len(names) > 3:  # a list, in which any other name might stand as well
        return
    for name in names:
        before, after = sentence.text[: name.start()], sentence.text[name.end() :]
        titled = forms.TITLED_BEFORE.search(before)
        part = forms.PART_OF_A_NAME_BEFORE.search(before) and not titled
        person = forms.BEFORE_PERSON.search(before) or forms.AFTER_PERSON.match(after)
        if person and not (part or forms.PART_OF_A_NAME_AFTER.match(after)) and _is_proper(name.group(), prose):
            yield _gap("names", "name", sentence, name.span())


def _from_sections(prose: Prose) -> Iterator[Question]:
    """How a section begins, which section says something, and which section follows which."""
    titles = [heading.title for heading in prose.headings]
    for index, heading in enumerate(prose.headings):
        if titles.count(heading.title) > 1:
            continue
        own = [sentence for sentence in prose.sentences if sentence.section == index and _is_statement(sentence.text)]
        if own and len(own[0].text.split()) > _FIRST_WORDS:
            beginning = " ".join(own[0].text.split()[:_FIRST_WORDS])
            text = f'What are the first five words under the heading "{heading.title}"?'
            yield Question("sections", text, (beginning.rstrip(",;:"),), own[0].start, beginning)
        told = [one for one in own if 8 <= len(one.text.split()) <= 25 and not _alike(one.text, heading.title)]
        if told:
            sentence = max(told, key=lambda told: sum(len(word) > 6 for word in told.text.split()))
            text = f'Which section of the text contains this sentence? Give its heading. "{sentence.text}"'
            yield Question("sections", text, (heading.title,), sentence.start, sentence.text, natural=False)
        earlier = prose.headings[max(0, index - 1)]
        ordinary = index > 0 and min(earlier.level, heading.level) > 1 and titles.count(earlier.title) == 1
        if ordinary and not _alike(earlier.title, heading.title):
            text = f'Which section comes right after the section "{earlier.title}"? Give its heading.'
            key = f"{heading.number} {heading.title}"
            yield Question("sections", text, (heading.title,), heading.start, key, natural=False)


def _from_references(prose: Prose) -> Iterator[Question]:
    """Where the text points to: numbered parts, and the targets of links."""
    numbered = {heading.number: heading for heading in prose.headings if heading.number}
    for sentence in filter(lambda sentence: _is_statement(sentence.text), prose.sentences):
        for found in forms.REFERENCE.finditer(sentence.text):
            kind, number = found.group(1).lower(), found.group(2)
            gap = _with_gap(f"{kind} number", sentence, found.span(2))
            yield Question("references", gap, (number,), sentence.start + found.start(), found.group(), natural=False)
            named = numbered.get(number)
            if named and kind in ("chapter", "section") and not _alike(sentence.text, named.title):
                text = f'What is the title of the {kind} that this sentence points to? "{sentence.text}"'
                yield Question("references", text, (named.title,), sentence.start, found.group())
    links = [link for link in prose.links if prose.headings and ":" not in link[1]]  # within a structured text
    texts = [text for text, _, _ in links]
    for text, target, start in links:
        once = texts.count(text) == 1 and prose.text.count(target) == 1
        if text and target and once and len(target) <= 60 and not _alike(text, target):
            asked = f'Which address or file does the link with the text "{text}" lead to?'
            yield Question("references", asked, (target,), start, text, natural=False)


def _by_other_names(questions: Iterable[Question], prose: Prose) -> Iterator[Question]:
    """Questions that need a second place of the text: what has a name is asked about by that name.

    "The supply ship is called the Marigold" and a question about the supply ship make one about the Marigold.
    """
    questions = [question for question in questions if question.natural and question.task in TASKS[:4]]
    for naming in questions:
        if not naming.subject:
            continue
        pattern = re.compile(rf"\b{re.escape(naming.subject)}\b(?! (?:of|on|in|at|for|that|who|which)\b)")
        name = naming.answers[0]
        name = f"the {name}" if prose.occurrences(f"the {name}") else name
        for question in questions:
            if question.key != naming.key and question.subject != naming.subject and pattern.search(question.text):
                text = pattern.sub(name, question.text)
                yield Question("references", text, question.answers, question.start, question.key)


def _plain(task: str, text: str, sentence: Sentence, found: re.Match[str], subject: str = "") -> Question:
    answer = _bare(found["answer"])
    return Question(task, text, spellings(answer), sentence.start + found.start("answer"), answer, subject=subject)


def _gap(task: str, what: str, sentence: Sentence, span: tuple[int, int]) -> Question:
    answer = _bare(sentence.text[slice(*span)])
    begin = sentence.text.index(answer, span[0])  # articles, titles and quotation marks stay
    text = _with_gap(what, sentence, (begin, begin + len(answer)))
    return Question(task, text, spellings(answer), sentence.start + begin, answer, natural=False)


def _figure(text: str, sentence: Sentence, span: tuple[int, int], natural: bool) -> Question:
    """A number, said in figures or in words; together with its unit it stands at one place only."""
    value = sentence.text[slice(*span)]
    unit = re.match(r"%| ?[\w-]+", sentence.text[span[1] :])
    key = value + (unit.group() if unit and value[0] not in _CURRENCIES else "")
    if value.lower() in _GUESSABLE:
        key = ""  # stands nowhere, so that the question is dropped
    return Question("figures", text, spellings(value), sentence.start + span[0], key, natural)


def spellings(answer: str) -> tuple[str, ...]:
    """The answer, and how else it may be said: small numbers in figures or words, dates with the day or month first."""
    by_value = {str(value): word for word, value in NUMBER_WORDS.items()}
    date = _DAY_FIRST.fullmatch(answer) or _MONTH_FIRST.fullmatch(answer)
    if date:
        day, month, year = date["day"], date["month"], date["year"]
        turned = f"{month} {day}" if answer.startswith(day) else f"{day} {month}"
        other = f"{turned} {year}" if year else turned
    else:
        other = by_value.get(answer) or str(NUMBER_WORDS.get(answer.lower(), ""))
    return (answer, other) if other else (answer,)


def _with_gap(what: str, sentence: Sentence, span: tuple[int, int]) -> str:
    before, after = sentence.text[: span[0]].split(" "), sentence.text[span[1] :].split(" ")
    left = "... " + " ".join(before[-_SHOWN:]) if len(before) > _SHOWN else " ".join(before)
    right = " ".join(after[:_SHOWN]) + " ..." if len(after) > _SHOWN else " ".join(after)
    return f'Which {what} belongs in the gap in this sentence of the text? "{left}{GAP}{right}"'


def _who_or_what(subject: str, answer: str) -> str:
    head = re.split(r" (?:of|on|in|at|for|from|who|that|which|where|responsible)\b", subject)[0].split()[-1]
    person = " who " in subject or (len(answer.split()) > 1 and forms.PERSONS.search(head))
    return "Who" if person and not answer.lower().startswith("the ") else "What"


def _inside(subject: str) -> str:
    """A subject as it stands inside a sentence."""
    return subject[0].lower() + subject[1:] if subject.startswith(("The ", "Our ")) else subject


def _bare(answer: str) -> str:
    answer = re.sub(r"^(?:the|a|an) ", "", answer.strip(_QUOTES + " ,.;"), flags=re.IGNORECASE)
    return forms.TITLE.sub("", answer)


def _once(prose: Prose, cue: str) -> bool:
    return prose.occurrences(cue) == 1


def _is_proper(name: str, prose: Prose) -> bool:
    """No month, and no common words, as in Nobel Prize: such names are known without the text, or guessed."""
    common = any(re.search(rf"\b{word.lower()}\b", prose.text) for word in re.findall(r"[A-Z]\w+", name))
    return not common and not re.search(forms.MONTH, name)


def _is_the_one(sentence: Sentence, found: re.Match[str], prose: Prose) -> bool:
    """The name is not the first of several, and the subject is not one of many that go by so short a name."""
    several = " and " not in found["answer"] and (
        found["be"] in ("are", "were") or re.match(r",? (?:and |or )?[A-Z]", sentence.text[found.end("answer") :])
    )
    vague = len(found["subject"].split()) <= 2 and prose.occurrences(found["subject"]) > _FEW
    return not (several or vague or forms.VAGUE.search(found["subject"]))


def _alike(left: str, right: str) -> bool:
    """A word of more than three letters begins alike in both."""
    stems = [{word[:4] for word in plain_words(text) if len(word) > 3} for text in (left, right)]
    return bool(stems[0] & stems[1])
