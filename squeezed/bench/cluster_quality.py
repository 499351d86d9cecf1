"""How good clusters are on a model's own keys, against scikit-learn's k-means++ and against comparing with every one.

Two measures: the sum of squared distances of normalised keys to their cluster's mean, and what matters in the end, the
share of the attention of the text's last queries that falls on the best clusters with a tenth of the keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from squeezed.clustering import assemble, batched_kmeans, inertia, kmeans
from squeezed.clustering.layout import _run_sizes
from squeezed.errors import InputError
from squeezed.ops import reference
from squeezed.prefill import prefill

_WINDOW, _SINKS, _STEP, _KEPT = 256, 4, 16, 0.1
_SCIKIT_LEARN = 40_000  # keys; beyond, it takes hours
_AT_ONCE = 2**25  # float32 scores


@dataclass(frozen=True)
class QualityCase:
    """Which keys to cluster.

    Attributes:
        clusters: share of the keys.
        layers: of the model, counted from 0.
        windows: pieces that the text is prefilled in, each for itself, and whose keys are then rotated to their places
            in the whole: a way to texts longer than the model takes. Tokens of different pieces have not seen one
            another.
    """

    clusters: float = 0.05
    layers: tuple[int, ...] = (2, 14)
    windows: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.clusters <= 1:
            raise InputError(f"clusters is {self.clusters}: expected a share of the keys above 0 and at most 1")
        if self.windows < 1:
            raise InputError(f"windows is {self.windows}: expected at least 1")


def judge_clusters(model: PreTrainedModel, ids: Sequence[int], case: QualityCase) -> Iterator[dict[str, Any]]:
    """A row for each layer and way to cluster; "sum" is over that of scikit-learn, or of comparing with every cluster.

    Raises:
        InputError: a layer that the model has not or that is a sliding-window one, or too short a text.
    """
    if len(ids) < case.windows * 2 * _WINDOW:
        raise InputError(
            f"the text has {len(ids)} tokens: expected at least {2 * _WINDOW} for each of {case.windows} windows"
        )
    found = _model_keys(model, ids, case)
    for number in case.layers:
        if number not in found:
            raise InputError(f"layer {number} has no keys to cluster: expected a full-attention layer of the model")
        keys, queries = found[number]
        rows = list(_compare(keys, queries, max(1, round(case.clusters * keys.shape[1]))))
        for row in rows:
            yield {"layer": number, "keys": keys.shape[1], **row, "sum": row["sum"] / rows[0]["sum"]}


def attention_found(keys: Tensor, labels: Tensor, queries: Tensor, scale: float, kept: float = _KEPT) -> float:
    """Mean attention of queries [q_heads, m, D] on the best clusters of keys [kv_heads, n, D] with `kept` of the keys.

    Each query chooses for itself, its heads of one group together, by the published score.
    """
    kv_heads, n, dim = keys.shape
    order = labels.argsort(dim=1, stable=True)
    ordered = keys.gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
    layer = assemble(ordered, ordered, order.int(), [_run_sizes(labels.gather(1, order))], False)
    level, total = layer.levels[0], 0.0
    each = queries.transpose(0, 1).unsqueeze(2)
    for query in each.split(max(1, _AT_ONCE // (queries.shape[0] * n))):
        scores = reference.score_centroids(query, level.centroids, level.sizes, scale)
        best = scores.sort(dim=-1, descending=True).indices
        fits = level.sizes.expand_as(scores).gather(2, best).cumsum(-1) <= kept * n
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, fits)
        taken = reference.expand_to_children(chosen, level.offsets, n)
        weights = (scale * query.reshape(len(query), kv_heads, -1, dim) @ ordered.transpose(1, 2)).softmax(-1)
        total += float((weights * taken.unsqueeze(2)).sum(-1).mean(dim=(1, 2)).sum())
    return total / len(each)


def _compare(keys: Tensor, queries: Tensor, clusters: int) -> Iterator[dict[str, Any]]:
    ways: dict[str, Callable[[], Tensor]] = {
        "every cluster compared": lambda: _compared_with_all(keys, clusters),
        "squeezed": lambda: kmeans(keys, clusters),
    }
    if find_spec("sklearn") is not None and keys.shape[1] <= _SCIKIT_LEARN:
        ways = {"scikit-learn": lambda: _scikit_learn(keys, clusters), **ways}
    for name, way in ways.items():
        since = time.perf_counter()
        labels = way()
        seconds = time.perf_counter() - since
        mass = attention_found(keys, labels, queries, keys.shape[2] ** -0.5)
        yield {
            "clusters": clusters,
            "way": name,
            "sum": float(inertia(keys, labels).sum()),
            "attention": mass,
            "seconds": seconds,
        }


def _scikit_learn(keys: Tensor, clusters: int) -> Tensor:
    from sklearn.cluster import KMeans

    rows = torch.nn.functional.normalize(keys, dim=-1).cpu()
    found = [KMeans(clusters, n_init=1, random_state=0).fit_predict(head.numpy()) for head in rows]
    return torch.stack([torch.from_numpy(labels).long() for labels in found]).to(keys.device)


def _compared_with_all(keys: Tensor, clusters: int) -> Tensor:
    with _neighbourhoods(clusters):
        return kmeans(keys, clusters)


@contextmanager
def _neighbourhoods(size: int) -> Iterator[None]:
    kept = batched_kmeans._CANDIDATES, batched_kmeans._EXACT
    batched_kmeans._CANDIDATES = batched_kmeans._EXACT = size
    try:
        yield
    finally:
        batched_kmeans._CANDIDATES, batched_kmeans._EXACT = kept


def _model_keys(model: PreTrainedModel, ids: Sequence[int], case: QualityCase) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys [kv_heads, n, D] and last queries [q_heads, m, D], float32, of each layer that is wanted."""
    length = len(ids) // case.windows
    keys: dict[int, list[Tensor]] = {}
    queries: dict[int, Tensor] = {}
    for window in range(case.windows):
        first = window * length
        for number, layer in enumerate(prefill(model, ids[first : first + length], _WINDOW, 512)):
            if number in case.layers and layer.queries is not None:
                last = length - _WINDOW if window == case.windows - 1 else length
                keys.setdefault(number, []).append(_moved(model, layer.keys[:, _SINKS:last].float(), first))
                queries[number] = _moved(model, layer.queries[:, ::_STEP].float(), first)
            if number >= max(case.layers):
                break
    return {number: (torch.cat(keys[number], dim=1), queries[number]) for number in keys}


def _moved(model: PreTrainedModel, rows: Tensor, places: int) -> Tensor:
    """Keys or queries [heads, n, D] rotated on by `places`, in halves as Llama and Qwen do."""
    if places == 0:
        return rows
    frequencies = model.get_decoder().rotary_emb.inv_freq.double()
    angle = torch.cat([places * frequencies] * 2)
    left, right = rows.chunk(2, dim=-1)
    return rows * angle.cos().float() + torch.cat([-right, left], dim=-1) * angle.sin().float()
