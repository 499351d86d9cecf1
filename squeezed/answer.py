"""Asking: from questions to answers, with what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from squeezed.attention import attached
from squeezed.cache import SqueezedCache, Usage
from squeezed.context import FixedContext, check_questions, pad_left, shortened
from squeezed.decode import loop
from squeezed.decode.sampler import Sampling
from squeezed.errors import InputError
from squeezed.template import Message, common_prefix

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer in tokens; less if the model has no positions left.
        temperature: 0 is greedy, above it samples.
        top_p: nucleus to sample from.
        seed: of the sampling; None leaves torch's generator alone.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {self.max_new_tokens}: expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: expected above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: expected 0 to {2**63 - 1}")

    def sow(self) -> None:
        """Seed torch's generator, if asked to."""
        if self.seed is not None and self.temperature > 0:
            torch.manual_seed(self.seed)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        self.sow()
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def sampling(self, model: PreTrainedModel, stops: Sequence[int], pad: int) -> Sampling:
        """The same for our own steps, with what the model's own configuration adds."""
        penalty = model.generation_config.repetition_penalty
        top_p = self.top_p if self.temperature > 0 else 1.0
        return Sampling(self.temperature, top_p, 1.0 if penalty is None else penalty, tuple(stops), pad)


@dataclass(frozen=True)
class Answer:
    """One question's answer.

    Attributes:
        tokens: number of generated tokens.
        prefill, decode: what the question's and the generated tokens read of the fixed context. In a batch a short
            answer goes on reading until the longest has ended.
        seconds: `first_token`, from the question to its first token; `generate`, the rest; `total`; on a GPU also
            `setup`, preparing the steps, which later questions to the same context use again.
        path: what generated it: `transformers`, or how a step runs, see :class:`squeezed.decode.step.DecodeStep`.
    """

    question: str
    text: str
    tokens: int
    prefill: Usage
    decode: Usage
    seconds: dict[str, float] = field(default_factory=dict)
    path: str = "transformers"

    @property
    def _typical(self) -> Usage:
        """What generated tokens read; the question's, where it was answered by one token."""
        return self.decode if self.tokens > 1 else self.prefill

    @property
    def kept_fraction(self) -> float:
        """Share of the clustered keys that a generated token attended to."""
        return self._typical.kept_fraction

    @property
    def kv_budget(self) -> float:
        """Bytes that a generated token read over bytes of the full KV."""
        return self._typical.kv_budget

    def to_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answer": self.text,
            "tokens": self.tokens,
            "kept_fraction": round(self.kept_fraction, 5),
            "kv_budget": round(self.kv_budget, 5),
            "kept_fraction_prefill": round(self.prefill.kept_fraction, 5),
            "kv_budget_prefill": round(self.prefill.kv_budget, 5),
            "kept_fraction_decode": round(self.decode.kept_fraction, 5) if self.tokens > 1 else None,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "path": self.path,
        }


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    questions: Sequence[str],
    sparsity: float = 0.9,
    dense: bool = False,
    decoding: Decoding | None = None,
    on_text: OnText | None = None,
    steps: loop.Steps | None = None,
    adaptive: bool = True,
    whole: bool | None = None,
) -> list[Answer]:
    """Answer several questions at once, each as if alone, in a left-padded batch over the one context.

    Args:
        on_text: called with each new piece of the answer as it is generated; for a single question only.
        steps: where to keep what is captured on a GPU, by default with the context. On a CPU, generation is
            transformers' own unless this is given.
        adaptive: attend to everything where selecting would take longer than it saves: for a question of ordinary
            length, and in short contexts.
        whole: of that, only whether a question of ordinary length is read whole; None: as `adaptive` says.

    Raises:
        InputError: an empty question, one that is not UTF-8 or does not fit the model's positions, sparsity outside 0
            to 1.
    """
    check_questions(questions)
    answers: dict[int, Answer] = {}
    alike = _same_seam(check_room(model, tokenizer, context, questions)) if len(questions) > 1 else [[0]]
    whole = adaptive if whole is None else whole
    for rows in alike:
        batch = [questions[row] for row in rows]
        inputs = context.inputs(tokenizer, batch, sparsity, dense, model.device, adaptive, whole=whole)
        found, _ = _generate(model, tokenizer, context, batch, inputs, decoding or Decoding(), on_text, steps)
        answers |= zip(rows, found, strict=True)
    return [answers[row] for row in range(len(questions))]


def check_room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: FixedContext, questions: Sequence[str]
) -> list[int]:
    """Refuse questions too long to be answered, each by itself, before any is.

    Returns:
        how many fixed tokens each question gives up.

    Raises:
        InputError: a question does not fit the model's positions.
    """
    found = []
    for question in questions:
        given_up, (ids,) = context.encode(tokenizer, [[{"role": "user", "content": question}]])
        _positions_left(model, context, context.tokens - given_up + len(ids), f"question {shortened(question)!r}")
        found.append(given_up)
    return found


def _same_seam(given_up: Sequence[int]) -> list[list[int]]:
    """Rows of questions that give up the same number of fixed tokens; one batch of chats, seldom more of plain text.

    In a mixed batch some would take fixed tokens for their own, and select otherwise than alone.
    """
    groups: dict[int, list[int]] = {}
    for row, tokens in enumerate(given_up):
        groups.setdefault(tokens, []).append(row)
    return list(groups.values())


class Conversation:
    """Follow-up questions on one context: each turn reads the earlier ones from its own small cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: FixedContext,
        sparsity: float = 0.9,
        dense: bool = False,
        decoding: Decoding | None = None,
        steps: loop.Steps | None = None,
        adaptive: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.sparsity, self.dense, self.decoding = sparsity, dense, decoding or Decoding()
        self.adaptive = adaptive
        self._steps = steps
        self.turns: list[Message] = []
        self._cache: SqueezedCache | None = None
        self._own: list[int] = []  # the tokens in the cache's own part
        self._given_up = 0

    def ask(self, question: str, on_text: OnText | None = None) -> Answer:
        """Answer the next turn; see :func:`ask`."""
        check_questions([question])
        turns = [*self.turns, {"role": "user", "content": question}]
        given_up, (ids,) = self.context.encode(self.tokenizer, [turns])
        cache, seen = self._continue(given_up, ids)
        inputs = pad_left([ids[seen:]], cache.fixed_tokens + seen, self.tokenizer, self.model.device)
        before = (cache.prefill_usage, cache.decode_usage)
        self._cache = None  # a turn that fails half-way leaves tokens in it that nothing accounts for
        answers, generated = _generate(
            self.model,
            self.tokenizer,
            self.context,
            [question],
            {**inputs, "past_key_values": cache},
            self.decoding,
            on_text,
            self._steps,
            before,
        )
        # The last generated token was never fed back, so it is not in the cache.
        self._cache, self._given_up = cache, given_up
        self._own = (ids + generated[0])[: cache.get_seq_length() - cache.fixed_tokens]
        self.turns = [*turns, {"role": "assistant", "content": answers[0].text}]
        return answers[0]

    def _continue(self, given_up: int, ids: list[int]) -> tuple[SqueezedCache, int]:
        """The cache cut back to the tokens that still agree, and their number; at least one token is left to feed."""
        if self._cache is None or given_up != self._given_up or any(layer.is_sliding for layer in self._cache.layers):
            return self.context.cache(self.sparsity, self.dense, given_up, self.adaptive, whole=self.adaptive), 0
        seen = min(common_prefix(self._own, ids), len(ids) - 1)
        if seen < len(self._own):
            for layer in self._cache.layers:
                layer.crop(seen - len(self._own))
        return self._cache, seen


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: FixedContext,
    questions: Sequence[str],
    inputs: dict[str, Any],
    decoding: Decoding,
    on_text: OnText | None,
    steps: loop.Steps | None,
    before: tuple[Usage, Usage] | None = None,
) -> tuple[list[Answer], list[list[int]]]:
    cache: SqueezedCache = inputs["past_key_values"]
    used = inputs["input_ids"].shape[1] + cache.get_seq_length()
    new_tokens = _new_tokens(model, context, questions, used, decoding)
    streamer = _Streamer(tokenizer, on_text) if on_text and len(questions) == 1 else None
    if steps is None and model.device.type == "cuda":
        steps = context.steps
    unusual = loop.not_followed(model.generation_config)
    if steps is None or unusual:
        made = _by_transformers(model, tokenizer, inputs, decoding, new_tokens, streamer)
        if steps is not None:
            made = replace(made, path=f"transformers, for the model's {', '.join(unusual)}")
    else:
        made = _by_steps(model, tokenizer, inputs, decoding, new_tokens, streamer, steps)
    prefill, decode = cache.prefill_usage, cache.decode_usage
    if before is not None:
        prefill, decode = prefill - before[0], decode - before[1]
    answers = [
        Answer(
            question=question,
            text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            tokens=len(tokens),
            prefill=prefill.question(row),
            decode=decode.question(row),
            seconds=made.seconds,
            path=made.path,
        )
        for row, (question, tokens) in enumerate(zip(questions, made.tokens, strict=True))
    ]
    return answers, made.tokens


def _by_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    decoding: Decoding,
    new_tokens: int,
    streamer: _Streamer | None,
) -> loop.Generated:
    """The model's own `generate`."""
    clock = _Clock()
    start = time.perf_counter()
    stops = _stop_tokens(model, tokenizer)
    with torch.inference_mode(), attached(model):
        output = model.generate(
            **inputs,
            **decoding.arguments(),
            max_new_tokens=new_tokens,
            eos_token_id=stops or None,
            pad_token_id=_pad_token(tokenizer, stops),
            logits_processor=LogitsProcessorList([clock]),
            streamer=streamer,
        )
        generated = [_until_stop(row[inputs["input_ids"].shape[1] :].tolist(), stops) for row in output]
    end = time.perf_counter()
    seconds = {"first_token": clock.first - start, "generate": end - clock.first, "total": end - start}
    return loop.Generated(generated, seconds, "transformers")


def _by_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    decoding: Decoding,
    new_tokens: int,
    streamer: _Streamer | None,
    steps: loop.Steps,
) -> loop.Generated:
    """Our own loop of steps in fixed shapes."""
    decoding.sow()
    stops = _stop_tokens(model, tokenizer)
    if streamer is not None:
        streamer.put(inputs["input_ids"][0].cpu())  # which it skips
    made = loop.generate(
        model,
        inputs,
        decoding.sampling(model, stops, _pad_token(tokenizer, stops)),
        new_tokens,
        steps,
        None if streamer is None else lambda token: streamer.put(torch.tensor([token])),
    )
    if streamer is not None:
        streamer.end()
    return replace(made, seconds={**made.seconds, "total": sum(made.seconds.values())})


def timed_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    new_tokens: int,
    plug_in: bool = True,
) -> tuple[float, float]:
    """Seconds to the first token and for the other `new_tokens` - 1, greedy, whatever the answer says.

    Args:
        inputs: input_ids, attention_mask and past_key_values for `generate`.
        plug_in: False leaves the model as it is, for a cache of transformers' own.
    """
    clock = _Clock()
    start = time.perf_counter()
    with torch.inference_mode(), attached(model) if plug_in else nullcontext():
        model.generate(
            **inputs,
            **Decoding().arguments(),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            eos_token_id=_stop_tokens(model, tokenizer) or None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
    return clock.first - start, time.perf_counter() - clock.first


class _Clock(LogitsProcessor):
    """Notes when the first token's logits were there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.first:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.first = time.perf_counter()
        return scores


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found = model.generation_config.eos_token_id
    listed = found if isinstance(found, list) else [] if found is None else [found]
    return sorted({*listed, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def _pad_token(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1]
    return tokens


def _new_tokens(
    model: PreTrainedModel, context: FixedContext, questions: Sequence[str], used: int, decoding: Decoding
) -> int:
    left = _positions_left(model, context, used, "the question")
    return decoding.max_new_tokens if left is None else min(decoding.max_new_tokens, left)


def _positions_left(model: PreTrainedModel, context: FixedContext, used: int, asked: str) -> int | None:
    """Positions for generated tokens after `used`; None without limit."""
    room = context.room(model)
    if room is None:
        return None
    left = context.tokens + room - used
    if left < 1:
        raise InputError(
            f"the context and {asked} take {used} tokens, {1 - left} more than fit the model's "
            f"{context.tokens + room} positions; ask something shorter, or begin a new conversation"
        )
    return left
