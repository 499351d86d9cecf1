"""Greedy answers of many rows at once, token for token those of generating one after another, in few forward passes.

No repetition penalty applies, whatever the model's generation settings say: scores are those of the attention alone.

Every token selects for itself (but for a question that is read whole, at once, before), so what a row attends to at a
position does not depend on how many positions one pass covers. A guessed continuation can therefore be checked in one
pass: as long as the row's own highest token equals the guess, the guess is the row's greedy answer. The guess is the
dense answer first, and where a row has left it, what followed the same last tokens in the context, the question or
another row's answer. Wrong guesses cost a pass nothing but width; they never change an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squeezed.evaluation.prepared import Prepared, RowsCache
from squeezed.evaluation.rows import Row, bytes_of, last_reads
from squeezed.evaluation.seam import scoring

_log = logging.getLogger(__name__)
_CHECKED = 32  # guessed tokens checked in one pass while a row follows the dense answer
_GUESSED = 8  # and where it has left it
_WIDTH = 24  # tokens per row of a pass on a GPU, question and guesses alike, so that passes can be replayed
_NGRAM = 3  # last tokens that have to agree with a place for its continuation to be guessed
_LOGITS = 2**31  # bytes of vocabulary logits held at once


@dataclass(frozen=True)
class RowAnswer:
    """One row's greedy answer.

    Attributes:
        tokens: up to and including the stop token, if one came.
        kv_budget: bytes read over bytes of the full KV, mean over the tokens that their row's method read for: the
            answer's, and the question's unless it is read whole. 1 if there is none, the answer being one token long.
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
    whole: bool = True,
) -> list[RowAnswer]:
    """Greedy answers of all rows to one question.

    Args:
        rows: as `in_order` puts them.
        question: fixed tokens given up and the question's tokens, see `Prepared.encode`.
        max_new_tokens: longest answer.
        dense: the dense answer if it is known; guessed first.
        guesses: more places to look for continuations; answers are added.
        together: most rows in one pass; bounds memory.
        whole: read the whole fixed context for the question, in one pass for all rows, as `ask` does; otherwise each of
            its tokens is attended by the row's method.
    """
    guesses = guesses if guesses is not None else Guesses()
    answers: list[RowAnswer] = []
    for first in range(0, len(rows), together):
        batch = _Batch(prepared, rows[first : first + together], question, max_new_tokens, dense, guesses, whole)
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
        whole: bool,
    ) -> None:
        given_up, self.ids = question
        self.whole = whole
        self.subject = prepared.subject
        self.most = max_new_tokens
        self.dense, self.guesses = list(dense), guesses
        self.capacity = len(self.ids) + max_new_tokens + _CHECKED + _WIDTH
        self.cache: RowsCache = prepared.rows(rows, given_up, self.capacity, recalls=whole)
        self.answers: list[list[int]] = [[] for _ in rows]
        self.pending: list[list[int]] = [list(self.ids) for _ in rows]  # decided on, not fed yet
        self.done = [False] * len(rows)
        self.read: list[list[Tensor]] = [[] for _ in rows]  # bytes of accepted tokens, pass by pass
        self.kept: list[list[Tensor | None]] = [[] for _ in rows]  # ours: what accepted tokens kept
        self.passes = 0
        self.recorded: _Recorded | _Launched | None = None

    def run(self) -> list[RowAnswer]:
        with torch.inference_mode(), scoring(self.subject.model):
            if self.whole:
                self._read_question()
            while pending := [row for row, done in enumerate(self.done) if not done]:
                self._pass(pending)
            self.recorded = None
            budgets = self._budgets()
        return [RowAnswer(answer, budget) for answer, budget in zip(self.answers, budgets, strict=True)]

    def _read_question(self) -> None:
        """The question in one pass over everything, once for all rows; each row's method begins with the answer."""
        place, count = self.cache.place, len(self.ids)
        place.begin([0], count)
        place.whole = True
        said = self.step(_padded([self.ids], count).to(self.subject.device), 1)
        place.whole = False
        for layer in self.cache.layers:
            layer.share_first_row(count)
        place.accept(dict.fromkeys(range(len(self.answers)), count), self._texts())
        first = int(said[0, -1])
        for row, answer in enumerate(self.answers):
            answer.append(first)
            self.pending[row] = [first]
            self.done[row] = first in self.subject.stops or self.most == 1

    def _guess(self, row: int, room: int) -> list[int]:
        """Tokens that may follow what the row has answered so far."""
        answer = self.answers[row]
        left = max(0, min(self.most - len(answer) - 1, room))
        if answer == self.dense[: len(answer)] and len(self.dense) > len(answer):
            return self.dense[len(answer) : len(answer) + left]
        return self.guesses.propose([*self.ids, *answer], min(left, _GUESSED))

    def _pass(self, rows: list[int]) -> None:
        """Feed each row what it has decided on and a guess; keep what it would have said itself."""
        recordable = _can_record(self.subject.device)
        known = {row: self.pending[row][: _WIDTH if recordable else None] for row in rows}
        guesses = {
            row: []
            if len(known[row]) < len(self.pending[row])
            else self._guess(row, _WIDTH - len(known[row]) if recordable else _CHECKED)
            for row in rows
        }
        if recordable:
            said, kept, fed_rows = self._recorded_pass(rows, known, guesses)
        else:
            width = max(len(known[row]) + len(guesses[row]) for row in rows)
            keep = width - min(map(len, known.values())) + 1
            self.cache.place.begin(rows, width)
            fed = _padded([[*known[row], *guesses[row]] for row in rows], width)
            said, kept, fed_rows = self.step(fed, keep), last_reads(self.cache.scored_layers), rows
        self._accept(fed_rows, known, guesses, said.tolist(), kept)
        self.passes += 1

    def _recorded_pass(
        self, rows: list[int], known: dict[int, list[int]], guesses: dict[int, list[int]]
    ) -> tuple[Tensor, dict[int, Tensor | None], list[int]]:
        """All rows at a fixed width; the first pass as it is, the second is recorded, later ones are replayed."""
        every = list(range(len(self.answers)))
        fed = _padded([[*known.get(row, []), *guesses.get(row, [])] for row in every], _WIDTH)
        if self.passes == 0:
            self.cache.place.begin(every, _WIDTH, self.capacity)
            said = self.step(fed.to(self.subject.device), _WIDTH)
            return said, last_reads(self.cache.scored_layers), every
        if self.recorded is None:
            try:
                self.recorded = _Recorded(self)
            except RuntimeError as error:
                _log.warning("a pass could not be recorded, so every one is launched anew (%s)", error)
                self.recorded = _Launched(self)
        return *self.recorded.replay(fed), every

    def _accept(
        self,
        fed_rows: list[int],
        known: dict[int, list[int]],
        guesses: dict[int, list[int]],
        said: list[list[int]],
        kept: dict[int, Tensor | None],
    ) -> None:
        taken: dict[int, int] = {}
        for at, row in enumerate(fed_rows):
            if row not in guesses:
                continue
            fed = len(known[row])
            taken[row] = fed
            self.pending[row] = self.pending[row][fed:]
            if not self.pending[row]:
                # `said` covers the pass's last positions; the first that counts is that of the last known token.
                first = fed - 1 - (self.cache.place.width - len(said[at]))
                taken[row] += self._take(row, guesses[row], said[at][first:])
                self.pending[row] = self.answers[row][-1:]
            if row in kept:
                own = kept[row]
                self.kept[row].append(None if own is None else own[:, :, : taken[row]].clone())
            self.read[row].append(self.cache.place.bytes[at, : taken[row]].clone())
            if self.done[row]:
                self.guesses.add([*self.ids[-_NGRAM:], *self.answers[row]])
        self.cache.place.accept(taken, self._texts())

    def _texts(self) -> list[list[int]]:
        return [[*self.ids, *answer] for answer in self.answers]

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

    def step(self, fed: Tensor, keep: int) -> Tensor:
        """The highest token behind each of the last `keep` fed ones, [A, keep]."""
        place, model = self.cache.place, self.subject.model
        if not place.whole:
            self.cache.follow(fed)
        output = model.get_decoder()(
            input_ids=fed,
            position_ids=place.places + self.cache.fixed_tokens,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -keep:]
        head = model.get_output_embeddings()
        step = max(1, _LOGITS // (keep * head.weight.shape[0] * hidden.element_size()))
        return torch.cat([head(part).argmax(-1) for part in hidden.split(step)])

    def _budgets(self) -> list[float]:
        layers, total = self.cache.scored_layers, self.cache.full_bytes
        budgets = []
        for row in range(len(self.answers)):
            if not self.read[row]:
                budgets.append(1.0)
                continue
            read = torch.cat(self.read[row])
            if row in layers[0].ours:
                kept = self.kept[row]
                whole = None if any(part is None for part in kept) else torch.cat(kept, dim=2)  # type: ignore[arg-type]
                read = bytes_of(layers, row, whole, len(read))
            budgets.append(float(read.mean()) / total)
        return budgets


class _Recorded:
    """A pass of fixed shape in a CUDA graph: launching its thousands of kernels one by one takes ten times as long.

    A pass of the same shape has to have run before, so that everything that is made once is there.
    """

    def __init__(self, batch: _Batch) -> None:
        place = batch.cache.place
        rows = len(batch.answers)
        place.begin(list(range(rows)), _WIDTH, batch.capacity)
        self._fed = torch.zeros(rows, _WIDTH, dtype=torch.int64, device=batch.subject.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            place.restart()
            self._said = batch.step(self._fed, _WIDTH)
            self._kept = last_reads(batch.cache.scored_layers)

    def replay(self, fed: Tensor) -> tuple[Tensor, dict[int, Tensor | None]]:
        self._fed.copy_(fed)
        self._graph.replay()
        return self._said, self._kept


class _Launched:
    """What stands in for a recorded pass where none can be made: the same shape, launched kernel by kernel."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def replay(self, fed: Tensor) -> tuple[Tensor, dict[int, Tensor | None]]:
        batch = self._batch
        batch.cache.place.begin(range(len(fed)), _WIDTH, batch.capacity)
        return batch.step(fed.to(batch.subject.device), _WIDTH), last_reads(batch.cache.scored_layers)


def _can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def _padded(rows: list[list[int]], width: int) -> Tensor:
    """[rows, width] int64; what stands behind a row's own tokens changes nothing before it."""
    fed = torch.zeros(len(rows), width, dtype=torch.int64)
    for at, tokens in enumerate(rows):
        fed[at, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return fed


def dense_answer(
    prepared: Prepared, full: Row, question: tuple[int, list[int]], max_new_tokens: int, whole: bool = True
) -> list[int]:
    """Full attention's greedy answer; `whole` as for the rows that it is compared with."""
    guesses = Guesses()
    guesses.add(prepared.prefix.ids)
    return answer_rows(prepared, [full], question, max_new_tokens, guesses=guesses, whole=whole)[0].tokens
