"""Metrics against examples worked by hand; the working stands next to each."""

from __future__ import annotations

import pytest

from squeezed.evaluation.metrics import METRICS, plain_words
from squeezed.evaluation.sample import Sample


def score(metric: str, prediction: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    sample = Sample("t/0", "t", "context", "question", answers, metric, 16, choices=choices)
    return METRICS[metric](prediction, sample)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("They are 123 and 456.", ("123", "456"), 1.0),
        ("123, 789", ("123", "456"), 0.5),
        ("XYZAB", ("xyzab",), 1.0),  # whatever the case
        ("12\x003", ("123",), 0.0),  # control characters become line breaks
        ("", ("123",), 0.0),
    ],
)
def test_string_match_all_is_the_share_of_answers_found(
    prediction: str, answers: tuple[str, ...], expected: float
) -> None:
    assert score("string_match_all", prediction, *answers) == expected


def test_string_match_part_needs_one_of_the_answers() -> None:
    assert score("string_match_part", "It was in Normandy, France.", "normandy", "Paris") == 1.0
    assert score("string_match_part", "It was in Rouen.", "normandy", "Paris") == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The cat sat.", ("a cat",), 2 / 3),  # cat, sat against cat: precision 1/2, recall 1
        ("the THE dog, dog", ("dog",), 2 / 3),  # dog counts once: precision 1/2, recall 1
        ("red blue green", ("blue red", "green red blue"), 1.0),  # the best answer, whatever the order
        ("nothing", ("dog",), 0.0),
        ("the", ("a",), 0.0),  # only articles: nothing is left on either side
    ],
)
def test_qa_f1(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert score("qa_f1", prediction, *answers) == pytest.approx(expected)


def test_few_shot_tasks_are_scored_on_their_first_line() -> None:
    more = "\n giraffe\nPassage: the okapi"
    assert score("qa_f1_first_line", more, "giraffe") == 1.0
    assert score("qa_f1", more, "giraffe") == pytest.approx(2 * 1 / (3 + 1))  # giraffe, passage, okapi; the is dropped
    assert score("rouge_l_first_line", "a b\nc d", "a b") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # Longest common subsequence "police the gunman": 3 of 4 words said, 3 of 4 different words of the answer.
        ("police kill the gunman", "police ended the gunman", 3 / 4),
        # "the gunman" is common; 5 different words were said, the answer has 4: 2 * 2 / (5 + 4).
        ("the gunman kill police now", "police killed the gunman", 2 * 2 / (5 + 4)),
        # Two sentences: "the cat" of one and "a dog" of the other, 4 words of 4 + 4 different ones.
        ("a dog ran. the cat", "the cat sat. a dog", 2 * 4 / (5 + 5)),
        ("one two one two", "one two", 1.0),  # different words count, not how often
        ("", "one two", 0.0),
        ("Dog", "dog", 0.0),  # case is kept
    ],
)
def test_rouge_l(prediction: str, answer: str, expected: float) -> None:
    assert score("rouge_l", prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Animal", 1.0),
        ("Animal or City", 0.5),
        ("City", 0.0),
        ("Number of something\nAnimal", 0.0),  # the second line is not read
    ],
)
def test_classification_divides_by_the_labels_named(prediction: str, expected: float) -> None:
    choices = ("Food", "City", "Animal", "Number of something")
    assert score("classification_first_line", prediction, "Animal", choices=choices) == expected


def test_a_label_inside_the_right_label_is_not_another_one() -> None:
    choices = ("Other", "Other location")
    assert score("classification_first_line", "Other location", "Other location", choices=choices) == 1.0
    assert score("classification_first_line", "Other location", "Other", choices=choices) == 0.5


@pytest.mark.parametrize(
    ("prediction", "expected"), [("Paragraph 7", 1.0), ("7 or 8 or 9", 1 / 3), ("Paragraph 17", 0.0), ("none", 0.0)]
)
def test_retrieval_is_the_share_of_the_right_number(prediction: str, expected: float) -> None:
    assert score("retrieval", prediction, "Paragraph 7") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("return x", "return x", 1.0),
        ("return x", "return y", 14 / 16),  # one letter out and one in: 1 - 2 / (8 + 8)
        ("```python\n# the area\nreturn x", "return x", 1.0),  # fences and comments are no code
        ("// only a comment", "return x", 0.0),
    ],
)
def test_code_similarity(prediction: str, answer: str, expected: float) -> None:
    assert score("code_similarity", prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It holds 38000 litres of diesel.", ("38,000",), 1.0),
        ("14 June 1931", ("14 June 1931",), 1.0),
        ("June 1931", ("14 June 1931",), 0.0),
        ("It was in 1964.", ("16",), 0.0),  # whole words only
        ("about sixteen", ("16", "sixteen"), 1.0),
        ("Founder\u2019s Day", ("founder's day",), 1.0),
        ("3.59", ("3",), 0.0),
    ],
)
def test_short_answer_finds_whole_words(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert score("short_answer", prediction, *answers) == expected


def test_plain_words_keep_what_is_inside_a_word() -> None:
    assert plain_words('"It\'s 1,234.5 half-past, A.") =') == ["it's", "1234.5", "half-past", "a"]
