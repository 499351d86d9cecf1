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

from squeezed import copying, ops
from squeezed.config import BuildConfig
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
        text: [tokens] int64, the fixed text: what an answer copies from it is in view too, see `squeezed.copying`.

    Attributes:
        recent: [B, copying.LONGEST] int64, the last tokens that came by; None before any did.
    """

    def __init__(self, most: int, layers: Sequence[ClusteredKeys] = (), text: Tensor | None = None) -> None:
        self.most, self._layers, self.text = most, layers, text
        self.recent: Tensor | None = None
        self._within: dict[int, Recalled] = {}  # by the layer's id
        self._groups: list[LayerGroup] = []  # kept where what is in view changes from token to token
        self._view: Tensor | None = None
        self._observed: set[int] = set()  # layers that have spoken of the latest question, by id
        self._weights: Tensor | None = None  # [B, tokens], by place in the text
        self._places: Tensor | None = None

    @classmethod
    def at(cls, sparsity: float, config: BuildConfig, layers: Sequence[ClusteredKeys], text: Tensor) -> Recall | None:
        """What a cache over these squeezed layers recalls at a sparsity; None where that is nothing.

        Args:
            text: [tokens] int64, the fixed text on any device.
        """
        most = tokens_to_recall(config.recall, layers[0].clustered, sparsity) if layers else 0
        if not most:
            return None
        return cls(most, layers, text.to(layers[0].keys.device) if config.copying else None)

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
        self._observed.clear()
        self._changed()

    @property
    def places(self) -> Tensor | None:
        """Places in the text of what the latest question recalls, [B, R] int64; None before there was one.

        -1 where there is nothing to recall.
        """
        if self._places is None and self._weights is not None:
            clustered = self._weights >= 0
            nearby = passages(self._weights.clamp(min=0)).where(clustered, float("-inf"))
            strongest, places = nearby.sort(dim=-1, descending=True, stable=True)
            self._places = places.where(strongest > float("-inf"), -1)[:, : self.most]
        return self._places

    @property
    def copies(self) -> bool:
        """Whether what is in view changes from token to token."""
        return self.text is not None

    def follow(self, tokens: Tensor) -> None:
        """Take note of tokens [B, M] that are being read: what the last of them copies is in view while it is."""
        if self.text is None:
            return
        recent = self.recent
        if recent is None or recent.shape[0] != tokens.shape[0]:
            recent = tokens.new_full((tokens.shape[0], copying.LONGEST), -1)
        self.look_up(copying.followed(recent, tokens))

    def look_up(self, recent: Tensor) -> None:
        """Have in view what these last tokens [B, copying.LONGEST] copy."""
        self.recent = recent
        self._changed()

    def _changed(self) -> None:
        self._view = None
        self._within.clear()

    def in_view(self) -> Tensor | None:
        """Places in the text that are recalled and copied, [B, R] int64, each once; -1 for none."""
        places = self.places
        if self.text is None or self.recent is None:
            return places
        if self._view is not None:
            return self._view
        copied = copying.copied(self.text, self.recent)
        if places is None:
            places = copied.new_empty(len(copied), 0)
        places = places.repeat_interleave(len(copied) // len(places), dim=0)  # questions are answered several times
        self._view = torch.cat([places, copying.once(copied, places)], dim=1)
        return self._view

    def within(self, index: ClusteredKeys) -> Recalled | None:
        """The same as places in a layer's clusters.

        Found for many layers at a time: for a model of 32 layers that is 30 operations instead of 900, each of which
        the token would wait for.
        """
        if id(index) not in self._within:
            places = self.in_view()
            if places is None:
                return None
            group = self._group(index)
            self._within.update(zip(map(id, group.layers), group.find(places), strict=True))
        return self._within[id(index)]

    def _group(self, index: ClusteredKeys) -> LayerGroup:
        """The layers that are looked up together with this one."""
        for group in self._groups:
            if any(layer is index for layer in group.layers):
                return group
        known = {id(layer) for group in self._groups for layer in group.layers} | self._within.keys()
        group = LayerGroup(alike([index, *(x for x in self._layers if x is not index and id(x) not in known)])[0])
        if self.copies:
            self._groups.append(group)
        return group


class LayerGroup:
    """Layers of the same shapes, which are looked up together.

    Attributes:
        slots: [layers * kv_heads, tokens] int32, where each place in the text lies among a head's clustered keys; -1
            where it is not clustered.
    """

    def __init__(self, layers: list[ClusteredKeys]) -> None:
        self.layers = layers
        positions = torch.cat([index.positions for index in layers])
        heads, count = positions.shape
        self.slots = positions.new_full((heads, layers[0].tokens), -1)
        slots = torch.arange(count, dtype=positions.dtype, device=positions.device)
        self.slots.scatter_(1, positions.long(), slots.expand(heads, -1))

    def find(self, places: Tensor) -> list[Recalled]:
        """Places [B, R] in the text as those in the clusters of each layer."""
        known = places.where(places < self.slots.shape[1], -1)
        wanted = known.unsqueeze(1).expand(-1, len(self.slots), -1)
        slots = self.slots.unsqueeze(0).expand(len(places), -1, -1)
        found = slots.gather(2, wanted.clamp(min=0)).long()
        return recalled_at(found.where(wanted >= 0, -1), *(index.levels for index in self.layers))


def alike(layers: Sequence[ClusteredKeys]) -> list[list[ClusteredKeys]]:
    """Layers of the same shapes together, few enough to be looked up at once; the first layer is in the first part."""
    found: dict[tuple[object, ...], list[ClusteredKeys]] = {}
    for index in layers:
        found.setdefault(_shapes(index), []).append(index)
    parts = []
    for some in found.values():
        most = max(1, _KEYS_AT_ONCE // some[0].positions.numel())
        parts += [some[first : first + most] for first in range(0, len(some), most)]
    return parts


def _shapes(index: ClusteredKeys) -> tuple[object, ...]:
    return index.positions.device, index.positions.shape, *(level.shape for level in index.levels)


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
