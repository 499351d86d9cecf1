"""Greedy answers of many rows at once, token for token those of generating one after another, in few forward passes.

Every query token selects for itself, so what a row attends to at a position does not depend on how many positions one
pass covers. A guessed continuation can therefore be checked in one pass: as long as the row's own highest token equals
the guess, the guess is the row's greedy answer. The guess is the dense answer first, and where a row has left it, what
followed the same last tokens in the context, the question or another row's answer. Wrong guesses cost a pass nothing
but width; they never change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.evaluation.prepared import Prepared, RowsCache
from squeezed.evaluation.rows import Row, scoring

_CHECKED = 32  # guessed tokens checked in one pass while a row follows the dense answer
_GUESSED = 8  # and where it has left it
_NGRAM = 3  # last tokens that have to agree with a place for its continuation to be guessed
_LOGITS = 2**31  # bytes of vocabulary logits held at once


@dataclass(frozen=True)
class RowAnswer:
    """One row's greedy answer.

    Attributes:
        tokens: up to and including the stop token, if one came.
        kv_budget: bytes read over bytes of the full KV, mean over the query tokens (question and answer).
    """

    tokens: list[int]
    kv_budget: float


class Guesses:
    """Continuations seen so far of every few tokens."""

    def __init__(self) -> None:
        self._texts: list[list[int]] = []
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a text; it takes precedence over earlier ones."""
        number, text = len(self._texts), list(tokens)
        self._texts.append(text)
        for length in range(1, _NGRAM + 1):
            for at in range(length, len(text)):
                self._places[tuple(text[at - length : at])] = (number, at)

    def propose(self, recent: Sequence[int], count: int) -> list[int]:
        """What followed the last tokens of `recent` most lately, at most `count` tokens."""
        for length in range(min(_NGRAM, len(recent)), 0, -1):
            found = self._places.get(tuple(recent[-length:]))
            if found is not None:
                return self._texts[found[0]][found[1] : found[1] + count]
        return []


def answer_rows(
    prepared: Prepared,
    rows: Sequence[Row],
    question: tuple[int, list[int]],
    max_new_tokens: int,
    dense: Sequence[int] = (),
    guesses: Guesses | None = None,
    together: int = 64,
) -> list[RowAnswer]:
    """Greedy answers of all rows to one question.

    Args:
        rows: as `in_order` puts them.
        question: fixed tokens given up and the question's tokens, see `Prepared.encode`.
        max_new_tokens: longest answer.
        dense: the dense answer if it is known; guessed first.
        guesses: more places to look for continuations; answers are added.
        together: most rows in one pass; bounds memory.
    """
    guesses = guesses if guesses is not None else Guesses()
    answers: list[RowAnswer] = []
    for first in range(0, len(rows), together):
        batch = _Batch(prepared, rows[first : first + together], question, max_new_tokens, dense, guesses)
        answers += batch.run()
    return answers


class _Batch:
    """The state of one batch of rows."""

    def __init__(
        self,
        prepared: Prepared,
        rows: Sequence[Row],
        question: tuple[int, list[int]],
        max_new_tokens: int,
        dense: Sequence[int],
        guesses: Guesses,
    ) -> None:
        given_up, self.ids = question
        self.subject = prepared.subject
        self.most = max_new_tokens
        self.dense, self.guesses = list(dense), guesses
        capacity = len(self.ids) + max_new_tokens + _CHECKED + _GUESSED
        self.cache: RowsCache = prepared.rows(rows, given_up, capacity)
        self.answers: list[list[int]] = [[] for _ in rows]
        self.done = [False] * len(rows)
        self.read: list[list[Tensor]] = [[] for _ in rows]
        self.fed: list[tuple[list[int], int, dict[int, int]]] = []  # rows, width, accepted of each

    def run(self) -> list[RowAnswer]:
        with torch.inference_mode(), scoring(self.subject.model):
            self._pass(list(range(len(self.answers))), first=True)
            while pending := [row for row, done in enumerate(self.done) if not done]:
                self._pass(pending, first=False)
            budgets = self._budgets()
        return [RowAnswer(answer, budget) for answer, budget in zip(self.answers, budgets, strict=True)]

    def _guess(self, row: int) -> list[int]:
        """Tokens that may follow what the row has answered so far."""
        answer = self.answers[row]
        left = self.most - len(answer) - 1
        if answer == self.dense[: len(answer)] and len(self.dense) > len(answer):
            return self.dense[len(answer) : len(answer) + min(left, _CHECKED)]
        return self.guesses.propose([*self.ids, *answer], min(left, _GUESSED))

    def _pass(self, rows: list[int], first: bool) -> None:
        """Feed each row what it has decided on and a guess; keep what it would have said itself."""
        guesses = {row: self._guess(row) for row in rows}
        known = {row: self.ids if first else self.answers[row][-1:] for row in rows}
        keep = 1 + max(len(guess) for guess in guesses.values())
        width = len(known[rows[0]]) + keep - 1
        fed = torch.zeros(len(rows), width, dtype=torch.int64)
        for at, row in enumerate(rows):
            tokens = [*known[row], *guesses[row]]
            fed[at, : len(tokens)] = torch.tensor(tokens)
        said = self._forward(rows, fed, keep)
        taken: dict[int, int] = {}
        for at, row in enumerate(rows):
            accepted = self._take(row, guesses[row], said[at])
            taken[row] = len(known[row]) + accepted
            self.cache.place.accept(row, taken[row])
            if self.done[row]:
                self.guesses.add([*self.ids[-_NGRAM:], *self.answers[row]])
        self.fed.append((rows, width, taken))
        bytes_read = self.cache.place.bytes
        for at, row in enumerate(rows):
            self.read[row].append(bytes_read[at, : taken[row]])
        self.cache.place.settle()

    def _take(self, row: int, guess: list[int], said: list[int]) -> int:
        """Extend the answer by what was confirmed and the token after it; the number of guessed tokens confirmed."""
        for place, token in enumerate(said[: len(guess) + 1]):
            self.answers[row].append(token)
            if token in self.subject.stops or len(self.answers[row]) == self.most:
                self.done[row] = True
                return place
            if place == len(guess) or token != guess[place]:
                return place
        return len(guess)

    def _forward(self, rows: list[int], fed: Tensor, keep: int) -> list[list[int]]:
        """The highest token behind each of the last `keep` fed ones, by row."""
        place, model = self.cache.place, self.subject.model
        place.begin(rows, fed.shape[1])
        fed = fed.to(place.device)
        output = model.get_decoder()(
            input_ids=fed,
            position_ids=place.places + self.cache.fixed_tokens,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -keep:]
        head = model.get_output_embeddings()
        step = max(1, _LOGITS // (keep * head.weight.shape[0] * hidden.element_size()))
        return torch.cat([head(part).argmax(-1) for part in hidden.split(step)]).tolist()

    def _budgets(self) -> list[float]:
        total = self.cache.full_bytes
        ours = {at for layer in self.cache.scored_layers for at in layer.ours}
        budgets = []
        for row in range(len(self.answers)):
            if row not in ours:
                budgets.append(float(torch.cat(self.read[row]).mean()) / total)
                continue
            read = torch.stack([layer.ours_bytes(row) for layer in self.cache.scored_layers]).sum(0)
            # Every pass recorded all tokens fed; only those that were accepted belong to the answer.
            valid, at = [], 0
            for _, width, taken in self.fed:
                if row in taken:
                    valid.append(read[at : at + taken[row]])
                    at += width
            budgets.append(float(torch.cat(valid).mean()) / total)
        return budgets


def dense_answer(prepared: Prepared, full: Row, question: tuple[int, list[int]], max_new_tokens: int) -> list[int]:
    """Full attention's greedy answer."""
    guesses = Guesses()
    guesses.add(prepared.prefix.ids)
    return answer_rows(prepared, [full], question, max_new_tokens, guesses=guesses)[0].tokens
