"""Recall: what a question reads closely stays in view of every token of its answer.

A question of ordinary length is read in one pass over the whole fixed context. That pass shows where the answer lies,
better than any score of clusters can: some query gives a key there much of its attention. Later words of the answer are
not looked at yet, but they follow those that are. So the tokens at and behind the strongest weights are attended by
every generated token, in every layer and head, whatever is selected. SnapKV (arXiv 2404.14469) showed that the pooled
weights of a prompt's end tell what its answer needs; there they decide what is left of each head's cache, here they add
to a selection, and the same passages serve all heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squeezed import ops
from squeezed.ops.layout import ChannelScales, ClusteredKeys, Recalled, recalled_at

QUERIES = 64  # last tokens of a question that count
_HALF_LIFE = 24  # tokens behind a weight after which it counts for half: a line of text, or a long identifier
_REACH = 64  # most tokens behind it
_BEFORE = 4  # tokens before it that it brings along, each counting for less
_PART = 8  # recalled are at most one in so many of the keys that are kept
_KEYS_AT_ONCE = 2**25  # clustered keys of layers that are looked up together: half a gigabyte while it lasts


class Recall:
    """The passages that each question of a batch has read closely, gathered as the question goes through the layers.

    Args:
        most: tokens to recall, no more than are clustered.
        layers: those that will ask where these lie in their clusters; one that is not among them may ask as well.
    """

    def __init__(self, most: int, layers: Sequence[ClusteredKeys] = ()) -> None:
        self.most, self._layers = most, layers
        self._within: dict[int, Recalled] = {}  # by the layer's id
        self._observed: set[int] = set()  # layers that have spoken of the latest question, by id
        self._weights: Tensor | None = None  # [B, tokens], by place in the text
        self._places: Tensor | None = None

    def observe(self, weights: Tensor, layer: object) -> None:
        """Add a layer's weights [B, tokens] float32, by place in the text; -inf for keys not to be recalled.

        A layer that speaks again speaks of another question.
        """
        if self._weights is None or id(layer) in self._observed:
            self.forget()
            self._weights = torch.zeros_like(weights)
        self._observed.add(id(layer))
        self._weights += weights

    def forget(self) -> None:
        """The latest question recalls nothing (more)."""
        self._weights = self._places = None
        self._within.clear()
        self._observed.clear()

    @property
    def places(self) -> Tensor | None:
        """Places in the text of what the latest question recalls, [B, R] int64; None before there was one.

        -1 where there is nothing to recall.
        """
        if self._weights is None:
            return None
        if self._places is None:
            clustered = self._weights >= 0
            nearby = passages(self._weights.clamp(min=0)).where(clustered, float("-inf"))
            strongest, places = nearby.sort(dim=-1, descending=True, stable=True)
            self._places = places.where(strongest > float("-inf"), -1)[:, : self.most]
        return self._places

    def within(self, index: ClusteredKeys) -> Recalled | None:
        """The same as places in a layer's clusters.

        Found for many layers at a time: for a model of 32 layers that is 30 operations instead of 900, each of which
        the first token would wait for.
        """
        if self.places is None:
            return None
        if id(index) not in self._within:
            assert self._weights is not None
            waiting = [layer for layer in self._layers if layer is not index and id(layer) not in self._within]
            alike = [layer for layer in waiting if _shapes(layer) == _shapes(index)]
            group = [index, *alike][: max(1, _KEYS_AT_ONCE // index.positions.numel())]
            found = _found(self.places, self._weights.shape[1], group)
            self._within.update(zip(map(id, group), found, strict=True))
        return self._within[id(index)]


def _shapes(index: ClusteredKeys) -> tuple[object, ...]:
    return index.positions.device, index.positions.shape, *(level.shape for level in index.levels)


def _found(places: Tensor, tokens: int, group: list[ClusteredKeys]) -> list[Recalled]:
    """Places [B, R] in a text of `tokens` tokens as those in the clusters of each of some layers."""
    positions = torch.cat([index.positions for index in group])
    heads, count = positions.shape
    # Where each place in the text lies among a head's clustered keys.
    inverse = positions.new_full((heads, tokens), -1)
    slots = torch.arange(count, dtype=positions.dtype, device=positions.device)
    inverse.scatter_(1, positions.long(), slots.expand(heads, -1))
    wanted = places.unsqueeze(1).expand(-1, heads, -1)
    found = inverse.unsqueeze(0).expand(len(places), -1, -1).gather(2, wanted.clamp(min=0)).long()
    return recalled_at(found.where(wanted >= 0, -1), *(index.levels for index in group))


def tokens_to_recall(most: int, clustered: int, sparsity: float) -> int:
    """How many of that many clustered tokens to recall: up to `most`, and few beside what is selected.

    They are read whatever else is: more of them would leave a small budget nothing to select with.
    """
    return min(most, int((1 - sparsity) * clustered) // _PART)


def passages(weights: Tensor) -> Tensor:
    """The strongest weight near each place, [B, N]: one before it counts for less the farther off it is."""
    found, reach = weights, 1
    while reach < _REACH:
        found = torch.maximum(found, _moved(found, reach) * 0.5 ** (reach / _HALF_LIFE))
        reach *= 2
    for distance in range(1, _BEFORE + 1):
        found = torch.maximum(found, _moved(weights, -distance) * 0.5 ** (distance / 2))
    return found


def _moved(weights: Tensor, distance: int) -> Tensor:
    """Each row moved on by that many places, zeros coming in."""
    moved = torch.zeros_like(weights)
    if distance > 0:
        moved[:, distance:] = weights[:, :-distance]
    else:
        moved[:, :distance] = weights[:, -distance:]
    return moved


def clustered_weights(query: Tensor, lse: Tensor, index: ClusteredKeys, tokens: int, scale: float) -> Tensor:
    """What a layer has to say to `Recall.observe`: peak weights of the clustered keys, summed over KV heads.

    Args:
        query: [B, Hq, M, D]; its last `QUERIES` count.
        lse: [B, Hq, M] of their attention to the fixed context; +inf for those that don't count.
        tokens: of the fixed context.
        scale: softmax scale.

    Returns:
        [B, tokens] float32
    """
    clustered = index.keys[:, : index.clustered]
    peaks = peak_weights(query, clustered, lse, scale, index.scales)
    # Clusters put each head's keys in an order of its own: first each back in its place, then all heads together.
    places = index.positions.long()
    placed = peaks.new_full((*peaks.shape[:2], tokens), float("-inf"))
    placed.scatter_(2, places.expand(peaks.shape[0], -1, -1), peaks)
    counts = (lse < float("inf")).any(-1).any(-1)
    return placed.sum(1).where(counts.unsqueeze(-1), float("-inf"))


def peak_weights(query: Tensor, keys: Tensor, lse: Tensor, scale: float, scales: ChannelScales | None = None) -> Tensor:
    """`ops.peak_weights` of a question's last tokens: [B, Hk, N]."""
    return ops.peak_weights(query[:, :, -QUERIES:], keys, lse[:, :, -QUERIES:], scale, scales)


def observes(number: int, layers: int) -> bool:
    """Whether squeezed layer `number` of `layers` says what is recalled: the middle half, where words are looked up."""
    return layers // 4 <= number < layers - layers // 4
