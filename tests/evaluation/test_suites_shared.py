"""Many requests on one shared context: the answers are there, once, and every question has its own."""

from __future__ import annotations

import json
import re

import pytest
from suite_options import count_tokens, samples

from squeezed.errors import InputError
from squeezed.evaluation.suites import find_suite

TASKS = find_suite("shared").tasks
LENGTH = 4000


@pytest.mark.parametrize("task", TASKS)
def test_ten_questions_share_a_context_and_come_one_after_another(task: str) -> None:
    found = samples("shared", LENGTH, count=25, tasks=(task,))
    assert [sample.context == found[0].context for sample in found] == [True] * 10 + [False] * 15
    assert len({sample.context for sample in found}) == 3
    assert len({sample.question for sample in found}) == len({sample.id for sample in found}) == 25
    assert all(0.9 * LENGTH < count_tokens(sample.context) <= LENGTH for sample in found)


@pytest.mark.parametrize("task", TASKS)
def test_a_longer_context_asks_the_same(task: str) -> None:
    short, long = samples("shared", LENGTH, tasks=(task,)), samples("shared", 2 * LENGTH, tasks=(task,))
    assert [sample.question for sample in short] == [sample.question for sample in long]
    assert [sample.answers for sample in short] == [sample.answers for sample in long]


def test_values_are_those_of_the_json_object() -> None:
    for sample in samples("shared", LENGTH, count=10, tasks=("kv",)):
        pairs = json.loads(sample.context.split("\n\n", 1)[1])
        key = re.findall(r'"([^"]+)"', sample.question)[0]
        assert (pairs[key],) == sample.answers


def test_one_string_has_the_beginning_and_the_end_and_others_have_one_of_them() -> None:
    for sample in samples("shared", LENGTH, count=10, tasks=("prefix_suffix",)):
        strings = sample.context.split("\n\n", 1)[1].split("\n")
        first, last = re.findall(r'"(\w+)"', sample.question)
        assert [text for text in strings if text.startswith(first) and text.endswith(last)] == list(sample.answers)
        assert sum(text.startswith(first) for text in strings) >= 2
        assert sum(text.endswith(last) for text in strings) >= 2


def test_chains_lead_to_the_answers() -> None:
    found = samples("shared", LENGTH, count=10, tasks=("tracking",))
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", found[0].context)
    for sample in found:
        value = re.findall(r"\d{5}", sample.question)[0]
        reached: list[str] = []
        for name, right in lines:
            if right == value or right in reached:
                reached.append(name)
        assert tuple(reached) == sample.answers
    assert len(lines) == 10 * 5


def test_a_context_too_short_for_its_questions_is_refused() -> None:
    with pytest.raises(InputError, match="kv takes at least"):
        samples("shared", 100, tasks=("kv",))
