"""Options for suites in tests, with tokens of up to four letters, and RULER's texts in its formats, made up."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import SuiteOptions, find_suite

_TOKEN = re.compile(r"\w{1,4}|\W")
DATA = Path(__file__).parent / "data"
WORDS = (
    "harbour", "lamp", "oats", "river", "window", "copper", "slate", "gannet", "piano", "letter", "spring", "wheel",
    "garden", "cellar", "bread", "rope",
)  # fmt: skip


def count_tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def truncate_middle(text: str, tokens: int) -> str:
    found = _TOKEN.findall(text)
    half = tokens // 2
    return text if len(found) <= tokens else "".join(found[:half] + found[-half:])


def options(length: int, count: int = 3, seed: int = 0, **changes: Any) -> SuiteOptions:
    return SuiteOptions(length, count, seed, count_tokens, truncate_middle, **changes)


def samples(suite: str, length: int, count: int = 3, seed: int = 0, **changes: Any) -> list[Sample]:
    return list(find_suite(suite).samples(options(length, count, seed, **changes)))


def write_ruler_texts(folder: Path) -> Path:
    """Essays, SQuAD and HotpotQA of random sentences."""
    rng = random.Random(0)

    def prose(words: int) -> str:
        sentences = [" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(words // 8)]
        return " ".join(sentences)

    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": prose(4000)}))
    articles = []
    for article in range(6):
        paragraphs = []
        for number in range(4):
            name = f"Q{article}{number}x"
            asked = {
                "question": f"What is {name}?",
                "answers": [{"text": name}, {"text": name}],
                "is_impossible": False,
            }
            never = {"question": "What is not there?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": f"{prose(16)} {name} is here. {prose(16)}", "qas": [asked, never]})
        articles.append({"title": f"Article {article}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    records = []
    for number in range(12):
        context = [[f"Title {number} {part}", [prose(16), f" Part {part} of {number}."]] for part in range(3)]
        records.append({"question": f"Who is {number}?", "answer": f"Part 1 of {number}", "context": context})
    (folder / "hotpotqa.json").write_text(json.dumps(records))
    return folder
