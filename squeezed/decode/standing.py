"""What a batch of questions has in view besides what it selects, in tensors that stay where they are.

A captured step reads the same memory each time. So what questions recall is put into buffers once a batch, and what the
tokens copy is found within the step, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squeezed import copying, ops
from squeezed.ops.layout import ClusteredKeys, Recalled
from squeezed.recall import LayerGroup, Recall, alike


class StandingRecall(Recall):
    """A `Recall` of one batch after another, for a step of fixed shapes.

    Args:
        like: says how many tokens are recalled, and whether any are copied.
        layers: those that will ask where these lie in their clusters.
        batch: questions.
    """

    recent: Tensor

    def __init__(self, like: Recall, layers: Sequence[ClusteredKeys], batch: int) -> None:
        super().__init__(like.most, layers, like.text)
        device = layers[0].keys.device
        self.recent = torch.full((batch, copying.LONGEST), -1, dtype=torch.int64, device=device)
        self._recalled = torch.full((batch, like.most), -1, dtype=torch.int32, device=device)
        self._copied = self._recalled.new_full((batch, copying.WIDTH if like.copies else 0), -1)
        width = self._recalled.shape[1] + self._copied.shape[1]
        self._held = [_Held(LayerGroup(some), batch, width) for some in alike(layers)]
        self._by_layer = {id(layer): found for held in self._held for layer, found in held.by_layer}
        self._finder = None
        if self.text is not None and ops.uses_triton(layers[0].keys):
            from squeezed.decode.copy_triton import Finder

            self._finder = Finder(self.text, batch)

    def take(self, other: Recall) -> None:
        """Have in view what `other` recalls, and go on from the tokens that it has seen last."""
        for mine, theirs in ((self._recalled, other.places), (self.recent, other.recent)):
            mine.fill_(-1)
            if theirs is not None:  # questions may be answered several times each
                mine[:, mine.shape[1] - theirs.shape[1] :] = theirs.repeat_interleave(len(mine) // len(theirs), dim=0)
        self._copied.fill_(-1)
        self._bring_all()

    def follow(self, tokens: Tensor) -> None:
        """Take note of tokens [B, 1] that are being read: what they copy is in view from now on."""
        if self.text is None:
            return
        if self._finder is not None:
            self._finder.follow(tokens, self.recent, self._recalled, self._copied)
            for held in self._held:
                held.bring(self._copied)
            return
        self.recent.copy_(copying.followed(self.recent, tokens))
        before = self._copied.clone()
        found = copying.copied(self.text, self.recent)
        self._copied.fill_(-1)
        self._copied[:, : found.shape[1]] = copying.once(found, self._recalled)
        # Most tokens copy nothing; on a GPU nobody may ask.
        if found.is_cuda or not torch.equal(before, self._copied):
            self._bring_all()

    def _bring_all(self) -> None:
        places = torch.cat([self._recalled, self._copied], dim=1).long()
        for held in self._held:
            held.bring_all(places)

    def within(self, index: ClusteredKeys) -> Recalled | None:
        """What is in view as places in a layer's clusters; None for a layer that does not ask."""
        return self._by_layer.get(id(index))


class _Held:
    """The keys in view of layers of the same shapes."""

    def __init__(self, group: LayerGroup, batch: int, width: int) -> None:
        self._group = group
        index, layers = group.layers[0], len(group.layers)
        heads, device = index.keys.shape[0], index.keys.device
        clusters = [level.sizes.shape[1] for level in index.levels]
        slots = torch.full((layers, batch, heads, width), -1, dtype=torch.int32, device=device)
        sizes = tuple(slots.new_empty(layers, batch, heads, count) for count in clusters)
        self._all = Recalled(slots, torch.full_like(slots, clusters[0]), sizes)
        self._offsets = [
            torch.cat([level.offsets for level in levels]).int()
            for levels in zip(*(layer.levels for layer in group.layers), strict=True)
        ]

    @property
    def by_layer(self) -> list[tuple[ClusteredKeys, Recalled]]:
        """Each layer with its part of the buffers."""
        parts = zip(*self._all.tensors, strict=True)
        return [
            (layer, Recalled.from_tensors(tensors)) for layer, tensors in zip(self._group.layers, parts, strict=True)
        ]

    def bring_all(self, places: Tensor) -> None:
        """Have these places [B, R] in view, and no others."""
        for (_, held), found in zip(self.by_layer, self._group.find(places), strict=True):
            for buffer, part in zip(held.tensors, found.tensors, strict=True):
                buffer.copy_(part)

    def bring(self, copied: Tensor) -> None:
        """Have places [B, copying.WIDTH] in view instead of those copied before."""
        from squeezed.decode import copy_triton

        copy_triton.bring(copied, self._group.slots, self._offsets, self._all)
