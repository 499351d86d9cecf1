"""From a question to its answer: the question in one pass, then step after step until all answers have ended."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from squeezed.attention import attached
from squeezed.cache import SqueezedCache
from squeezed.decode.sampler import Sampling
from squeezed.decode.step import DecodeStep

# Steps under way while the host looks at an earlier one's token: enough that the device never waits for the host.
_AHEAD = 1
_SLOTS = 256  # own tokens are given room in multiples of this
# What a generation configuration may hold and be followed here; anything else needs transformers' own generation.
_FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *(
        "repetition_penalty",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "transformers_version",
        "cache_implementation",
    ),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
}


@dataclass(frozen=True)
class Generated:
    """Answers of a batch.

    Attributes:
        tokens: of each question, up to and with its stop token.
        seconds: `first_token`, from the start to the first token; `setup`, capturing the step, 0 when it is reused;
            `generate`, all after the first token but the setup.
        path: see :class:`DecodeStep`.
    """

    tokens: list[list[int]]
    seconds: dict[str, float]
    path: str


class Steps:
    """Keeps the latest captured step, for more questions to the same context; drop it to free what it holds."""

    def __init__(self, capture: bool = True) -> None:
        self._capture = capture
        self._latest: DecodeStep | None = None

    def find(
        self, model: PreTrainedModel, cache: SqueezedCache, batch: int, needed: int, sampling: Sampling
    ) -> DecodeStep:
        """A step with room for `needed` own tokens, captured before if possible."""
        latest = self._latest
        if latest is not None and latest.model is model and latest.serves(cache, batch, needed, sampling):
            return latest
        self._latest = None  # its memory goes before the next one takes some
        capacity = (needed // _SLOTS + 1) * _SLOTS
        self._latest = DecodeStep(model, cache, batch, capacity, sampling, self._capture)
        return self._latest


def not_followed(config: GenerationConfig) -> list[str]:
    """Settings of a model's generation that only transformers' own `generate` follows."""
    changed = (name for name, value in config.to_diff_dict().items() if value is not None and not name.startswith("_"))
    return sorted(name for name in changed if name not in _FOLLOWED)


def generate(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    sampling: Sampling,
    new_tokens: int,
    steps: Steps,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Answer a batch of questions.

    Args:
        inputs: input_ids [B, L], attention_mask [B, seen + L] (left padding is 0) and past_key_values, a
            :class:`SqueezedCache`, as `FixedContext.inputs` makes them.
        new_tokens: most tokens of an answer.
        steps: where captured steps are kept.
        on_token: called with each token of a single question's answer.
    """
    start = time.perf_counter()
    ids, cache = inputs["input_ids"], inputs["past_key_values"]
    batch, length = ids.shape
    with torch.inference_mode():
        logits = prefill(model, inputs)
        own = cache.fixed_layers[0].own_length
        step = steps.find(model, cache, batch, own + new_tokens, sampling)
        step.begin(cache, ids, _padding(inputs["attention_mask"], length))
        answers = _Answers(batch, sampling.stops, on_token)
        answers.add(step.first(logits)[:, 0])
        first = time.perf_counter()
        if new_tokens > 1 and not answers.ended:
            step.prepare()
            _wait(model.device)
        copying = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        ready = time.perf_counter()
        under_way: deque[_Read] = deque()
        for number in range(new_tokens - 1):
            if answers.ended:
                break
            step.run()
            under_way.append(_Read(step.state.history[number], copying))
            if len(under_way) > _AHEAD:
                answers.add(under_way.popleft().tokens())
        while under_way and not answers.ended:
            answers.add(under_way.popleft().tokens())
        _wait(model.device)
        seconds = {"first_token": first - start, "setup": ready - first, "generate": time.perf_counter() - ready}
        step.end(cache, answers.count - 1)
    return Generated(answers.tokens, seconds, step.path)


def prefill(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Feed the questions; logits [B, vocabulary] after their last tokens."""
    length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with attached(model):
        output = model(**inputs, position_ids=positions, use_cache=True, **options)
    return output.logits[:, -1]


def _padding(mask: Tensor, length: int) -> list[int]:
    """Left padding of each row, in tokens."""
    return [0] if mask.shape[0] == 1 else (length - mask[:, -length:].sum(-1)).tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Read:
    """A step's tokens on their way to the host, by a stream of their own: the next step need not wait for that."""

    def __init__(self, tokens: Tensor, copying: torch.cuda.Stream | None) -> None:
        self._event: torch.cuda.Event | None = None
        if copying is None:
            self._host = tokens.clone()
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        copying.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(copying):
            self._host.copy_(tokens, non_blocking=True)
            self._event = copying.record_event()

    def tokens(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class _Answers:
    """What has been generated so far; each answer ends with its stop token.

    Attributes:
        count: tokens that the longest answer has.
    """

    def __init__(self, batch: int, stops: tuple[int, ...], on_token: Callable[[int], None] | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.count = 0
        self._open = [True] * batch
        self._stops, self._on_token = set(stops), on_token

    @property
    def ended(self) -> bool:
        return not any(self._open)

    def add(self, tokens: Tensor) -> None:
        """One more token for each row, [B]; rows that have ended ignore theirs."""
        self.count += 1
        for row, token in enumerate(tokens.tolist()):
            if self._open[row]:
                self.tokens[row].append(token)
                self._open[row] = token not in self._stops
        if self._on_token is not None:
            self._on_token(self.tokens[0][-1])
