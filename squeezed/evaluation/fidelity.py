"""How far a method's attention is from full attention: output error and mass by layer and head, and the logits.

The instrument needs no labels. Queries are those that the model has while it reads held-out text: the continuation of
the passage, and questions about it. Layer by layer every method gets the inputs of the dense run, so that errors don't
compound; then the method is active in every layer, and the next-token distributions are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezed.attention import attend_own
from squeezed.evaluation.jobs import Passage
from squeezed.evaluation.prepared import Prepared, RowsCache, Subject, in_order
from squeezed.evaluation.rows import Row, ScoredLayer, bytes_of, last_reads
from squeezed.evaluation.seam import scoring
from squeezed.evaluation.settings import Record
from squeezed.evaluation.suites.texts import key_tokens
from squeezed.ops import reference

# Unlike the questions that calibrate, see squeezed.preparation.PROBES.
QUESTIONS = (
    "Summarise the passage above in two sentences.",
    "Which claim in the text is the least convincing, and why? Quote the words that you doubt.",
    "What does the author say right at the beginning, and what right at the end?",
    "Give every number that the text mentions, in the order in which it mentions them.",
)
_SHORT = 256  # tokens of context that a short-context model sees, for LongPPL
_TOGETHER = 32  # rows in one pass


@dataclass(frozen=True)
class Reading:
    """A teacher-forced text behind the context: fixed tokens given up, and its tokens."""

    kind: str
    given_up: int
    ids: list[int]


def measure_passage(
    subject: Subject,
    job: Passage,
    rows: Sequence[Row],
    done: set[tuple[str, str]],
    suite: str,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[Record]:
    """One record for each row that is not done: what `suite` asks for."""
    missing = in_order([row for row in rows if (job.id, row.key) not in done])
    if not missing:
        return []
    full = next(row for row in rows if row.budget is None)
    prepared = Prepared(subject, job.context, on_stage)
    continuation = _continuation(prepared, job.continuation)
    readings = [continuation]
    if suite == "fidelity" and prepared.prefix.seam.chat:
        readings += [Reading("question", *prepared.encode(question)) for question in QUESTIONS]
    keys = None
    if suite == "longppl":
        keys = _key_tokens(prepared, full, continuation)
    prepared.rows(missing, 0, 1)  # builds what the rows need while the model is still as it was
    merged: dict[str, list[Record]] = {row.key: [] for row in missing}
    for reading in readings:
        on_stage(f"reading {reading.kind}")
        with torch.inference_mode(), scoring(subject.model):
            dense = _DenseRun(prepared, full, reading)
            for first in range(0, len(missing), _TOGETHER):
                some = missing[first : first + _TOGETHER]
                ends = _end_to_end(prepared, some, reading, dense, keys)
                layers = _layer_by_layer(prepared, some, reading, dense) if suite == "fidelity" else [{}] * len(some)
                for row, end, layer in zip(some, ends, layers, strict=True):
                    merged[row.key].append({"kind": reading.kind, **end, **layer})
    return [
        {
            "id": job.id,
            "row": row.key,
            "task": suite,
            "length": job.length,
            "method": row.spec,
            "budget": row.budget,
            "context_tokens": prepared.tokens,
            **_merge(merged[row.key]),
        }
        for row in missing
    ]


def _continuation(prepared: Prepared, text: str) -> Reading:
    from squeezed.template import encode_continuation

    given_up, ids = encode_continuation(prepared.subject.tokenizer, prepared.prefix.seam, text)
    return Reading("continuation", given_up, ids)


class _DenseRun:
    """Full attention's pass over a reading: logits, and every layer's queries."""

    def __init__(self, prepared: Prepared, full: Row, reading: Reading) -> None:
        self.cache = prepared.rows([full], reading.given_up, len(reading.ids))
        for layer in self.cache.scored_layers:
            layer.observed = []
        self.log_probs = _forward(prepared, self.cache, reading.ids)[0].log_softmax(-1)


def _forward(prepared: Prepared, cache: RowsCache, ids: list[int]) -> Tensor:
    """float32 logits [R, M, vocabulary] of teacher-forced tokens."""
    model, place = prepared.subject.model, cache.place
    rows = len(cache.all_rows)
    place.begin(range(rows), len(ids))
    output = model(
        input_ids=torch.tensor([ids] * rows, device=place.device),
        position_ids=place.places + cache.fixed_tokens,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits.float()


def _end_to_end(
    prepared: Prepared, rows: Sequence[Row], reading: Reading, dense: _DenseRun, keys: Tensor | None
) -> list[Record]:
    """Each row active in every layer: KL of the next-token distribution, and the reading's own likelihood."""
    records = []
    step = 8 if prepared.subject.device.type == "cuda" else 2
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        cache = prepared.rows(some, reading.given_up, len(reading.ids))
        logits = _forward(prepared, cache, reading.ids)
        kept = last_reads(cache.scored_layers)
        targets = torch.tensor(reading.ids[1:], device=logits.device)
        for at, row in enumerate(some):
            log_probs = logits[at].log_softmax(-1)
            kl = (dense.log_probs.exp() * (dense.log_probs - log_probs)).sum(-1)
            nll = -log_probs[:-1].gather(1, targets.unsqueeze(1)).squeeze(1)
            read = cache.place.bytes[at]
            if at in kept:
                read = bytes_of(cache.scored_layers, at, kept[at], len(reading.ids))
            record: Record = {
                "tokens": len(reading.ids),
                "kv_budget": 1.0 if row.budget is None else float(read.mean()) / cache.full_bytes,
                "kl": float(kl.mean()),
                "nll": float(nll.mean()),
                "top_agrees": float((log_probs.argmax(-1) == dense.log_probs.argmax(-1)).float().mean()),
            }
            if keys is not None:
                record["key_tokens"] = int(keys.sum())
                record["key_nll"] = float(nll[keys].sum())
            records.append(record)
    return records


def _layer_by_layer(prepared: Prepared, rows: Sequence[Row], reading: Reading, dense: _DenseRun) -> list[Record]:
    """Each row's attention output under the dense run's inputs, against float32."""
    cache = prepared.rows(rows, reading.given_up, len(reading.ids))
    cache.place.begin(range(len(rows)), len(reading.ids))
    errors, masses = [], []
    for layer, true in zip(cache.scored_layers, dense.cache.scored_layers, strict=True):
        error, mass = _compare_layer(layer, true)
        errors.append(error)
        masses.append(mass)
    error, mass = torch.stack(errors, 1), torch.stack(masses, 1)  # [R, layers, Hk]
    return [
        {"error": _rounded(error[at]), "mass": None if guesses_mass(cache, at) else _rounded(mass[at])}
        for at in range(len(rows))
    ]


def guesses_mass(cache: RowsCache, row: int) -> bool:
    """Whether a row's log-sum-exp counts stand-ins, so that it does not tell the mass that was read exactly."""
    layer = cache.scored_layers[0]
    return row in layer.ours and any(level.values is not None for level in layer.ours[row].index.levels)


def _compare_layer(layer: ScoredLayer, true: ScoredLayer) -> tuple[Tensor, Tensor]:
    """Mean relative error of the output and mass recovered, [R, Hk] each."""
    assert true.observed is not None
    query, context = true.observed[0], layer.context
    count, length = len(layer.place.rows), query.shape[2]
    keys, values = context.keys[:, : layer.end], context.values[:, : layer.end]
    scale = context.scale
    own_keys, own_values = (store[:1, :length].transpose(1, 2) for store in (true.keys, true.values))
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    own = attend_own(query, own_keys, own_values, mask, scale)
    fixed = _dense_float32(query, keys, values, scale)
    expected, expected_lse = reference.merge_attention([fixed, own])
    every = query.expand(count, -1, -1, -1)
    layer.queries = query.transpose(1, 2).expand(count, -1, -1, -1)
    output, lse, exact = layer.fixed(every, scale, mass=True)
    own_output, own_lse = own[0].expand_as(output), own[1].expand_as(lse)
    found, _ = reference.merge_attention([(output, lse), (own_output, own_lse)])
    kept = torch.logaddexp(exact, own_lse)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    mass = (kept - expected_lse).exp()

    def by_head(per_query: Tensor) -> Tensor:
        return per_query.mean(-1).unflatten(1, (context.kv_heads, -1)).mean(-1).cpu()

    return by_head(error), by_head(mass)


def _dense_float32(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Full attention to the fixed keys in float32, whatever the model runs in; in blocks of queries."""
    _, q_heads, queries, dim = query.shape
    kv_heads = keys.shape[0]
    grouped = query[0].view(kv_heads, -1, queries, dim).float()
    outputs, lses = [], []
    step = max(1, 2**27 // (q_heads * keys.shape[1]))
    wide_keys, wide_values = keys.float().transpose(1, 2).unsqueeze(1), values.float().unsqueeze(1)
    for first in range(0, queries, step):
        logits = scale * (grouped[:, :, first : first + step] @ wide_keys)
        lse = logits.logsumexp(-1)
        outputs.append((logits - lse.unsqueeze(-1)).exp() @ wide_values)
        lses.append(lse)
    output, lse = torch.cat(outputs, 2), torch.cat(lses, 2)
    return output.reshape(1, q_heads, queries, dim), lse.reshape(1, q_heads, queries)


def _key_tokens(prepared: Prepared, full: Row, reading: Reading) -> Tensor:
    """LongPPL's key tokens (Fang et al. 2024, arXiv 2410.23771): those that full attention finds likely, and much more
    likely than with only the last tokens of the context. bool, one for each predicted token."""
    subject = prepared.subject
    end = prepared.tokens - reading.given_up
    short = [*prepared.prefix.ids[max(0, end - _SHORT) : end], *reading.ids]
    targets = torch.tensor(reading.ids[1:], device=subject.device).unsqueeze(1)
    with torch.inference_mode():
        logits = subject.model(input_ids=torch.tensor([short], device=subject.device)).logits[0, -len(reading.ids) :]
        near = logits[:-1].float().log_softmax(-1).gather(1, targets).squeeze(1)
        with scoring(subject.model):
            far = _DenseRun(prepared, full, reading).log_probs[:-1].gather(1, targets).squeeze(1)
    return key_tokens(far, near)


def _merge(records: list[Record]) -> Record:
    """Readings of one passage: the continuation's likelihood, and means over the tokens of all of them."""
    total = sum(record["tokens"] for record in records)

    def mean(name: str) -> float:
        return sum(record[name] * record["tokens"] for record in records) / total

    merged: Record = {name: round(mean(name), 6) for name in ("kv_budget", "kl", "top_agrees")}
    merged["nll"] = round(records[0]["nll"], 6)
    merged["tokens"] = total
    for name in ("key_tokens", "key_nll"):
        if name in records[0]:
            merged[name] = records[0][name]
    for name in ("error", "mass"):
        if name in records[0]:
            grids = [(torch.tensor(r[name]), r["tokens"]) for r in records if r[name] is not None]
            merged[name] = _rounded(sum(grid * (tokens / total) for grid, tokens in grids)) if grids else None
    return merged


def _rounded(grid: Any) -> list[list[float]]:
    return [[round(float(value), 5) if math.isfinite(value) else None for value in row] for row in grid.tolist()]  # type: ignore[misc]
