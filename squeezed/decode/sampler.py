"""From logits to the next token, on the device and without a word to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy, above it samples.
        top_p: nucleus to sample from.
        repetition_penalty: what the logits of tokens seen before are divided by, or multiplied if negative; 1 is none.
        stops: tokens that end an answer.
        pad: what a question of a batch is fed once its answer has ended.
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
    """

    def __init__(self, sampling: Sampling, batch: int, vocabulary: int, device: torch.device) -> None:
        self.sampling = sampling
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._stops = torch.tensor(sampling.stops, dtype=torch.int64, device=device)
        penalised = sampling.repetition_penalty != 1.0
        self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device) if penalised else None

    def begin(self, ids: Tensor) -> None:
        """Start over with questions [B, L]."""
        self.finished.zero_()
        if self._seen is not None:
            self._seen.zero_()
            self._seen.scatter_(1, ids, True)

    def state(self) -> list[Tensor]:
        """The tensors that `choose` changes."""
        return [self.finished] if self._seen is None else [self.finished, self._seen]

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [B, 1] int64, given logits [B, vocabulary]."""
        sampling, scores = self.sampling, logits
        if sampling.temperature > 0 or self._seen is not None:
            scores = logits.float()
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if sampling.temperature > 0:
            scores = nucleus(scores / sampling.temperature, sampling.top_p)
            # The largest of exponentially distributed times, scaled, is a draw: nothing has to be read to make it.
            token = (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1, keepdim=True)
        else:
            token = largest(scores)
        if self._seen is not None:
            self._seen.scatter_(1, token, True)
        if sampling.stops:
            if len(token) > 1:
                token = token.masked_fill(self.finished[:, None], sampling.pad)
            self.finished |= (token == self._stops).any(-1)
        return token


def largest(scores: Tensor) -> Tensor:
    """Index [B, 1] of the first of the largest scores [B, V]."""
    piece = next((size for size in (512, 256, 128, 64) if scores.shape[-1] % size == 0), None)
    # A GPU gives one long row to few programs.
    return scores.argmax(-1, keepdim=True) if piece is None or not scores.is_cuda else _in_two_rounds(scores, piece)


def _in_two_rounds(scores: Tensor, piece: int) -> Tensor:
    best, place = scores.unflatten(-1, (-1, piece)).max(-1)
    winner = best.argmax(-1, keepdim=True)
    return winner * piece + place.gather(-1, winner)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores [B, V] with -inf outside the fewest tokens whose probabilities reach `top_p`."""
    if top_p >= 1.0:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
    return scores.masked_fill(outside, float("-inf"))
