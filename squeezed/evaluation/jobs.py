"""What there is to do in a run: one job is one fixed context and everything that is asked of it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from squeezed.errors import InputError
from squeezed.evaluation.data import ESSAYS, read_essays
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.settings import RunConfig

QUESTION_ROOM, ANSWER_ROOM = 160, 128  # tokens of a length that are left to question and answer
CONTINUED = 256  # held-out tokens behind each text
MOST_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Questions:
    """Samples that share a context."""

    length: int
    samples: tuple[Sample, ...]

    @property
    def context(self) -> str:
        return self.samples[0].context

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)


@dataclass(frozen=True)
class Passage:
    """A text and how it goes on."""

    length: int
    id: str
    context: str
    continuation: str

    @property
    def ids(self) -> tuple[str, ...]:
        return (self.id,)


Job = Questions | Passage


def make_jobs(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Job]:
    """All jobs of a run, in order.

    Raises:
        InputError: an unknown suite or task, data that is missing or too short.
    """
    return passages(config, tokenizer) if config.is_text else questions(config, tokenizer)


def questions(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Questions]:
    """Jobs of a suite of questions, of all lengths in turn."""
    from squeezed.evaluation.suites import in_turn

    return in_turn([_questions(config, length, tokenizer) for length in config.lengths])


def _questions(config: RunConfig, length: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Questions]:
    from squeezed.evaluation.suites import SuiteOptions, find_suite, token_functions

    suite = find_suite(config.suite)
    count_tokens, truncate_middle = token_functions(tokenizer)
    options = SuiteOptions(
        length=length - template_tokens(tokenizer) - QUESTION_ROOM - ANSWER_ROOM,
        count=config.samples,
        seed=config.seed,
        count_tokens=count_tokens,
        truncate_middle=truncate_middle,
        tasks=config.tasks or None,
        data=Path(config.data) if config.data else None,
    )
    for _, group in itertools.groupby(suite.samples(options), key=lambda sample: sample.context):
        yield Questions(length, tuple(group))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the chat template puts around a text."""
    if not getattr(tokenizer, "chat_template", None):
        return 1
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "."}], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def passages(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    """Jobs of TEXT_SUITES: passages of the text, each with its continuation."""
    from squeezed.evaluation.suites import token_functions
    from squeezed.evaluation.suites.texts import text_pairs

    count_tokens, _ = token_functions(tokenizer)
    with _text_folder(config.data) as path:
        for length in config.lengths:
            held_out = min(CONTINUED, int(MOST_HELD_OUT_SHARE * length))
            inside = length - template_tokens(tokenizer) - held_out
            for pair in text_pairs(path, inside, held_out, config.samples, config.seed, count_tokens):
                yield Passage(length, f"{pair.id}/{length}", pair.context, pair.continuation)


@contextmanager
def _text_folder(data: str) -> Iterator[Path]:
    """The text files that are read. RULER's essays are one JSON file with the text under `text`."""
    if not data:
        from squeezed.demo import manual_path

        yield Path(manual_path())
        return
    path = Path(data)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a text file or a folder of some to --data")
    essays = path if path.suffix == ".json" else path / ESSAYS
    if not essays.is_file():
        yield path
        return
    text = read_essays(essays)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / f"{essays.stem}.txt"
        plain.write_text(text, encoding="utf-8")
        yield plain
