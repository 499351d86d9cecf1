"""What there is to do in a run: one job is one fixed context and everything that is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from squeezed.errors import InputError
from squeezed.evaluation.data import read_json, read_text, text_files
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.settings import RunConfig
from squeezed.template import encode_prefix

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
    """Jobs of a suite of questions."""
    from squeezed.evaluation.suites import SuiteOptions, find_suite, token_functions

    suite = find_suite(config.suite)
    count_tokens, truncate_middle = token_functions(tokenizer)
    for length in config.lengths:
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
    """Jobs of TEXT_SUITES: evenly spaced passages of the text, each with its continuation."""
    text = _text(config.data)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    chat = bool(getattr(tokenizer, "chat_template", None))
    head = len(encode_prefix(tokenizer, ".", chat)[0].ids)
    for length in config.lengths:
        held_out = min(CONTINUED, int(MOST_HELD_OUT_SHARE * length))
        inside = length - head - held_out
        needed = inside + held_out
        if len(spans) < needed:
            raise InputError(
                f"the text has {len(spans)} tokens, {needed - len(spans)} fewer than a length of {length} takes; "
                "give more text to --data or a smaller --length"
            )
        last = len(spans) - needed
        for number in range(config.samples):
            first = round(last * number / max(1, config.samples - 1))
            begin, middle, end = spans[first][0], spans[first + inside][0], spans[first + needed - 1][1]
            # A fixed context loses the blanks at its end; they belong to the continuation then.
            middle -= len(text[begin:middle]) - len(text[begin:middle].rstrip())
            identity = f"{config.suite}/{length}/{number}"
            yield Passage(length, identity, text[begin:middle], text[middle:end])


def _text(data: str) -> str:
    """All text of a file or folder. RULER's essays are one JSON file with the text under `text`."""
    if not data:
        from squeezed.demo import manual_path

        return read_text(Path(manual_path()))
    path = Path(data)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a text file or a folder of some to --data")
    essays = path if path.suffix == ".json" else path / "PaulGrahamEssays.json"
    if essays.is_file():
        content = read_json(essays)
        if not isinstance(content, dict) or not isinstance(content.get("text"), str):
            raise InputError(f"{essays} has no text: expected an object with a string under text")
        return str(content["text"])
    return "\n\n".join(read_text(file) for file in text_files(path))
