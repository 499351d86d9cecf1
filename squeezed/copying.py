"""Copying: where an answer repeats the fixed text, the passage that it repeats stays in view.

Answers quote: names, numbers, whole lines. While a model copies, its heads look for the tokens just written where they
stand in the text, and at what follows them there. Those keys lie in clusters of their likes and are easily missed, but
no score is needed to find them: the tokens themselves tell. So wherever the answer's last tokens stand in the text, the
places around are attended by the next token, in every layer and head, whatever is selected. Speculative decoding finds
drafts of what comes next in the same way (prompt lookup); here they only bring keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 6  # last tokens that are compared with the text
LEAST = 2  # of them in a row have to stand there
MANY = 8  # places that agree equally well, above which they tell nothing
PASSAGES = 4  # most places that are taken, the last ones
BEFORE, BEHIND = 8, 8  # tokens of a passage up to the latest one that agrees, and behind it
WIDTH = PASSAGES * (BEFORE + BEHIND)


def copied(text: Tensor, recent: Tensor) -> Tensor:
    """Places around where the longest run of the last tokens stands in a text.

    Args:
        text: [N] int64.
        recent: [B, LONGEST] int64, tokens so far, the latest last; negative ones agree with nothing.

    Returns:
        [B, WIDTH] int64, less for a text of fewer tokens than PASSAGES: places in the text, some perhaps more than
        once; -1 for none. On a GPU nothing is read back.
    """
    run = torch.ones(recent.shape[0], len(text), dtype=torch.bool, device=text.device)
    length = torch.zeros(run.shape, dtype=torch.int64, device=text.device)
    for back in range(min(LONGEST, len(text))):
        run[:, :back] = False
        run[:, back:] &= text[: len(text) - back] == recent[:, -1 - back, None]
        length += run
    longest = length.amax(1, keepdim=True)
    agrees = (length == longest) & (longest >= LEAST)
    agrees &= agrees.sum(1, keepdim=True) <= MANY
    place = torch.arange(len(text), device=text.device)
    latest = place.where(agrees, -1).topk(min(PASSAGES, len(text)), dim=1).values
    around = torch.arange(1 - BEFORE, 1 + BEHIND, device=text.device)
    found = latest.unsqueeze(-1) + around
    inside = (latest >= 0).unsqueeze(-1) & (found >= 0) & (found < len(text))
    return found.where(inside, -1).flatten(1)


def once(found: Tensor, known: Tensor) -> Tensor:
    """Places [B, W] without those that come again, and without those [B, R] that are known; -1 in their stead."""
    again = (found.unsqueeze(2) == found.unsqueeze(1)).tril(-1).any(2)
    again |= (found.unsqueeze(2) == known.unsqueeze(1)).any(2)
    return found.masked_fill(again, -1)


def followed(recent: Tensor, tokens: Tensor) -> Tensor:
    """The last tokens [B, LONGEST] once `tokens` [B, M] have come behind `recent` [B, LONGEST]."""
    return torch.cat([recent, tokens], dim=1)[:, -LONGEST:]
