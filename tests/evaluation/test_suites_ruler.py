"""RULER's samples: as long as asked, answerable from the context, with the published parameters."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from suite_options import count_tokens, options, samples, write_ruler_texts

from squeezed.errors import InputError
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import find_suite
from squeezed.evaluation.suites.ruler_niah import NOISE

TASKS = find_suite("ruler").tasks
NEEDLES = [task for task in TASKS if task.startswith("niah")]
LENGTH = 5000
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ruler_texts(tmp_path_factory.mktemp("ruler"))


def one(task: str, texts: Path, length: int = LENGTH) -> Sample:
    return samples("ruler", length, count=1, tasks=(task,), data=texts)[0]


def needles(context: str) -> list[tuple[str, str]]:
    return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)


def test_there_are_thirteen_tasks() -> None:
    assert len(TASKS) == 13


@pytest.mark.parametrize("task", TASKS)
def test_contexts_are_nearly_as_long_as_asked(task: str, texts: Path) -> None:
    for sample in samples("ruler", LENGTH, tasks=(task,), data=texts):
        tokens = count_tokens(sample.context)
        assert tokens <= LENGTH
        assert tokens > 0.9 * LENGTH


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_seed_and_index_only(task: str, texts: Path) -> None:
    few = samples("ruler", LENGTH, count=2, tasks=(task,), data=texts)
    assert few == samples("ruler", LENGTH, count=4, tasks=(task,), data=texts)[:2]
    assert few[0].context != few[1].context
    assert few[0].answers != samples("ruler", LENGTH, count=1, seed=1, tasks=(task,), data=texts)[0].answers


@pytest.mark.parametrize("task", [*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2"])
def test_answers_are_in_the_context_and_not_in_the_question(task: str, texts: Path) -> None:
    for sample in samples("ruler", LENGTH, tasks=(task,), data=texts):
        assert all(answer in sample.context for answer in sample.answers)
        # RULER's HotpotQA and SQuAD are real questions, which may name their answer; ours are made up.
        asked = sample.question + sample.answer_prefix
        assert task == "qa_1" or not any(answer in asked for answer in sample.answers)


def test_ids_are_unique_over_tasks_and_lengths(texts: Path) -> None:
    found = [sample.id for length in (LENGTH, LENGTH + 500) for sample in samples("ruler", length, data=texts)]
    assert len(set(found)) == len(found) == 2 * 13 * 3


@pytest.mark.parametrize(
    ("task", "haystack", "key", "value", "keys", "answers"),
    [
        ("niah_single_1", "noise", r"\S+-\S+", r"\d{7}", 1, 1),
        ("niah_single_2", "essay", r"\S+-\S+", r"\d{7}", 1, 1),
        ("niah_single_3", "essay", r"\S+-\S+", UUID, 1, 1),
        ("niah_multikey_1", "essay", r"\S+-\S+", r"\d{7}", 4, 1),
        ("niah_multikey_2", "needles", r"\S+-\S+", r"\d{7}", None, 1),
        ("niah_multikey_3", "needles", UUID, UUID, None, 1),
        ("niah_multivalue", "essay", r"\S+-\S+", r"\d{7}", 1, 4),
        ("niah_multiquery", "essay", r"\S+-\S+", r"\d{7}", 4, 4),
    ],
)
def test_needles_have_the_published_parameters(
    task: str, haystack: str, key: str, value: str, keys: int | None, answers: int, texts: Path
) -> None:
    sample = one(task, texts)
    found = needles(sample.context.replace("ad hoc", "ad-hoc"))  # the one adjective with a space
    assert all(re.fullmatch(key, name) and re.fullmatch(value, number) for name, number in found)
    assert len(sample.answers) == answers
    lines = Counter(sample.context.split("\n"))
    assert (lines[NOISE] > 10) == (haystack == "noise")
    if keys is None:
        assert len(found) > 15
    else:
        assert len({name for name, _ in found}) == keys
        assert len(found) == max(keys, answers)
    asked = {name for name, number in found if number in sample.answers}
    assert all(name in sample.question.replace("ad hoc", "ad-hoc") for name in asked)


def test_needles_stand_at_all_depths(texts: Path) -> None:
    found = samples("ruler", 3000, count=60, tasks=("niah_single_2",), data=texts)
    for sample in found:
        assert sample.depth is not None
        assert sample.context[round(sample.depth * len(sample.context)) :].startswith(sample.answers[0])
    parts = Counter(int(4 * sample.depth) for sample in found if sample.depth is not None and sample.depth < 1)
    assert all(parts[quarter] >= 5 for quarter in range(4))


def test_the_chain_of_variables_leads_to_the_answers(texts: Path) -> None:
    sample = one("vt", texts)
    example, asked = sample.context.rsplit("Memorize and track", 1)
    value = re.search(r"assigned the value (\d{5}) in", sample.question)
    assert value
    reached: list[str] = []
    for name, right in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", asked):
        if right == value.group(1) or right in reached:
            reached.append(name)
    assert tuple(reached) == sample.answers
    assert len(reached) == 5  # 4 hops
    assert value.group(1) not in example


def test_the_worked_example_of_variables_is_right(texts: Path) -> None:
    context = one("vt", texts).context
    pairs = re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", context)
    assert [right for _, right in pairs[1:]] == [name for name, _ in pairs[:-1]]
    answer = " ".join(name for name, _ in pairs)
    assert f"5 variables are assigned the value {pairs[0][1]}, they are: {answer}\n" in context


@pytest.mark.parametrize(("length", "common", "others"), [(LENGTH, 30, 3), (2500, 6, 1)])
def test_common_words_come_as_often_as_published(length: int, common: int, others: int, texts: Path) -> None:
    sample = one("cwe", texts, length)
    listed = sample.context.rsplit("Memorize the ones that appear most often.\n", 1)[1]
    counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\.|$)", listed))
    assert {word for word, count in counts.items() if count == common} == set(sample.answers)
    assert set(counts.values()) == {common, others}
    assert len(sample.answers) == 10


def test_frequent_words_follow_the_zeta_distribution(texts: Path) -> None:
    sample = one("fwe", texts)
    counts = Counter(sample.context.split("coded words. ")[1].split())
    ranked = counts.most_common(6)
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.answers
    first = ranked[0][1]
    assert [count for _, count in ranked] == pytest.approx([first / rank**2 for rank in range(1, 7)], abs=1.5)


def test_questions_come_with_the_documents_that_answer_them(texts: Path) -> None:
    single, several = one("qa_1", texts), one("qa_2", texts)
    assert len(re.findall(r"^Document \d+:$", single.context, re.MULTILINE)) > 5
    number = re.search(r"Who is (\d+)\?", several.question)
    assert number
    assert all(f"Title {number.group(1)} {part}\n" in several.context for part in range(3))
    assert single.answers == (re.findall(r"What is (\w+)\?", single.question)[0],)  # named once
    assert single.depth is not None


def test_what_comes_before_the_haystack_is_fixed_and_the_question_is_not(texts: Path) -> None:
    sample = one("niah_multivalue", texts)
    assert sample.context.startswith("Some special magic numbers are hidden within the following text.")
    assert sample.question.startswith("What are all the special magic numbers for ")
    assert sample.answer_prefix.startswith("The special magic numbers for ")
    single = one("niah_single_1", texts)
    assert single.context.startswith("A special magic number is hidden within the following text.")
    assert single.question.startswith("What is the special magic number for ")


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "qa_2"])
def test_too_short_a_length_is_refused_in_one_line(task: str, texts: Path) -> None:
    with pytest.raises(
        InputError, match="tokens of fixed context, and the length asked for leaves 60 beside"
    ) as refusal:
        samples("ruler", 60, tasks=(task,), data=texts)
    assert "\n" not in str(refusal.value)


def test_refusals_say_what_to_do(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ruler has no task niah; choose among niah_single_1"):
        samples("ruler", LENGTH, tasks=("niah",), data=texts)
    with pytest.raises(InputError, match="no data folder was given; expected --data with RULER's"):
        samples("ruler", LENGTH, tasks=("niah_single_2",))
    with pytest.raises(InputError, match=r"squad\.json does not exist"):
        samples("ruler", LENGTH, tasks=("qa_1",), data=tmp_path)
    (tmp_path / "squad.json").write_text('{"data": [1]}')
    with pytest.raises(InputError, match="not in the format of SQuAD"):
        samples("ruler", LENGTH, tasks=("qa_1",), data=tmp_path)
    with pytest.raises(InputError, match="there is no suite rule; choose among ruler"):
        find_suite("rule")
    with pytest.raises(InputError, match="0 samples were asked for"):
        options(LENGTH, count=0)


def test_synthetic_tasks_need_no_data() -> None:
    tasks = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    assert len(samples("ruler", LENGTH, count=1, tasks=tasks)) == len(tasks)


def test_a_run_that_is_stopped_has_seen_all_tasks_alike(texts: Path) -> None:
    assert [sample.task for sample in samples("ruler", LENGTH, count=2, data=texts)] == [*TASKS, *TASKS]
