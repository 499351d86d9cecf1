"""From logits to the next token, on the device and without a word to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed import ops


@dataclass(frozen=True)
class StepState:
    """What a step leaves on the device for the next one, and for the host to read.

    Attributes:
        token: [B, 1] int64, to be fed next.
        lengths: [n, B] int32, counters that every step moves on by one.
        running: [1] int64, 1 while a question of the batch is unanswered.
        history: [most steps, B] int64, the token that each step chose.
        count: [1] int64, steps so far.
        arrived: [1] int32, zero between steps: where the programs that end a step meet.
    """

    token: Tensor
    lengths: Tensor
    running: Tensor
    history: Tensor
    count: Tensor
    arrived: Tensor

    @classmethod
    def start(cls, batch: int, counters: int, steps: int, device: torch.device) -> StepState:
        """Before the first of at most `steps` steps."""
        return cls(
            token=torch.zeros(batch, 1, dtype=torch.int64, device=device),
            lengths=torch.zeros(counters, batch, dtype=torch.int32, device=device),
            running=torch.ones(1, dtype=torch.int64, device=device),
            history=torch.zeros(steps, batch, dtype=torch.int64, device=device),
            count=torch.zeros(1, dtype=torch.int64, device=device),
            arrived=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def begin(self, lengths: list[list[int]]) -> None:
        """Start over with these counters."""
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.running.fill_(1)
        self.count.zero_()

    def changing(self) -> list[Tensor]:
        """The tensors that a step changes, but for the row of `history` that it writes and `arrived`, zero again."""
        return [self.token, self.lengths, self.running, self.count]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy, above it samples.
        top_p: nucleus to sample from.
        repetition_penalty: what the logits of tokens seen before are divided by, or multiplied if negative; 1 is none.
        stops: tokens that end an answer.
        pad: what a question is fed once its answer has ended.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stops: tuple[int, ...] = ()
    pad: int = 0


class Sampler:
    """Chooses tokens for a batch and remembers what it needs for that in tensors of its own.

    Attributes:
        finished: [B] bool, whether a stop token was chosen.
        stops: [n] int64, tokens that end an answer.
        seen: [B, vocabulary] bool, tokens of questions and answers; None without a repetition penalty.
        in_one_launch: whether a kernel of ours may end a greedy step.
    """

    def __init__(self, sampling: Sampling, batch: int, vocabulary: int, device: torch.device) -> None:
        self.sampling = sampling
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.in_one_launch = True
        self.stops = torch.tensor(sampling.stops, dtype=torch.int64, device=device)
        penalised = sampling.repetition_penalty != 1.0
        self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device) if penalised else None

    def begin(self, ids: Tensor, padding: Sequence[int]) -> None:
        """Start over with questions [B, L], left-padded by `padding` tokens each, which don't count as seen."""
        self.finished.zero_()
        if self.seen is not None:
            self.seen.zero_()
            for seen, row, count in zip(self.seen, ids, padding, strict=True):
                seen[row[count:]] = True

    def changing(self) -> list[Tensor]:
        """The tensors that `choose` changes."""
        return [self.finished] if self.seen is None else [self.finished, self.seen]

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [B, 1] int64, given logits [B, vocabulary]."""
        sampling, scores = self.sampling, logits
        if sampling.temperature > 0 or self.seen is not None:
            scores = logits.float()
        if self.seen is not None:
            penalty = sampling.repetition_penalty
            scores = torch.where(self.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if sampling.temperature > 0:
            scores = nucleus(scores / sampling.temperature, sampling.top_p)
            # The largest of exponentially distributed times, scaled, is a draw: nothing has to be read to make it.
            token = (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1, keepdim=True)
        else:
            token = scores.argmax(-1, keepdim=True)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        if sampling.stops:
            token = token.masked_fill(self.finished[:, None], sampling.pad)
            self.finished |= (token == self.stops).any(-1)
        return token

    def advance(self, logits: Tensor, state: StepState) -> None:
        """End a step: choose as `choose` does, given logits [B, vocabulary], and leave what the next step needs."""
        if self.in_one_launch and self.sampling.temperature == 0 and ops.has_triton(logits):
            from squeezed.decode.choose_triton import choose_largest

            choose_largest(logits, self, state)
            return
        state.token.copy_(self.choose(logits))
        count_step(state, self.finished)


def count_step(state: StepState, finished: Tensor) -> None:
    """What a step leaves besides its token, given the questions that have ended by now, [B] bool."""
    state.lengths.add_(1)
    state.running.copy_((~finished).any()[None])
    state.history.index_copy_(0, state.count, state.token.T)
    state.count.add_(1)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores [B, V] with -inf outside the fewest tokens whose probabilities reach `top_p`."""
    if top_p >= 1.0:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
    return scores.masked_fill(outside, float("-inf"))
