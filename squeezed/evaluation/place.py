"""Where the rows of a batch stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from squeezed import copying


class Place:
    """Where each row of a batch stands; shared by the layers.

    Attributes:
        lengths: [R] int64 on the device, own tokens that are in the cache.
        recent: [R, copying.LONGEST] int64 on the device, the last of them; -1 before the first.
        rows, active: rows in the current pass, as a list and as [A] int64 on the device.
        width: tokens that the current pass feeds to each row.
        reach: own tokens that the pass looks at, at least those of every row after it.
        places: [A, width] int64, place of each fed token among its row's own.
        bytes: [A, width] float64, bytes of the fixed context that choosing methods read in the current pass, all layers
            together.
        whole: the current pass reads all of the fixed context, whatever the rows' methods.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.recent = torch.full((rows, copying.LONGEST), -1, dtype=torch.int64, device=device)
        self.host_lengths = [0] * rows
        self.device = device
        self.whole = False

    def begin(self, rows: Sequence[int], width: int, reach: int | None = None) -> None:
        """Begin a pass; a fixed `reach` makes it one that can be recorded."""
        self.rows = list(rows)
        self.active = torch.tensor(self.rows, device=self.device)
        self.width = width
        self.reach = reach or max(self.host_lengths[row] for row in rows) + width
        self.restart()

    def restart(self) -> None:
        """The part of `begin` that happens on the device, for passes that are replayed."""
        self.places = self.lengths[self.active].unsqueeze(1) + torch.arange(self.width, device=self.device)
        self.bytes = torch.zeros(len(self.rows), self.width, dtype=torch.float64, device=self.device)

    def accept(self, tokens: dict[int, int], texts: Sequence[Sequence[int]]) -> None:
        """Keep the first tokens that a pass fed: how many of each row; the others are overwritten later.

        Args:
            texts: what each row's own tokens are, or will be.
        """
        for row, count in tokens.items():
            self.host_lengths[row] += count
        self.lengths.copy_(torch.tensor(self.host_lengths))
        none = [-1] * copying.LONGEST
        ends = zip(texts, self.host_lengths, strict=True)
        self.recent.copy_(torch.tensor([[*none, *text[:length]][-copying.LONGEST :] for text, length in ends]))
