"""TokenSelect: exact scores of every token, a vote of all heads, and a selection that is reused for alike queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from squeezed.evaluation.methods.base import Asked, Choice, LayerContext, Method, keep_top, scaled_products

_SIMILARITIES = (*(1 - 0.5 * 0.8**power for power in range(23, -1, -1)), 0.4, 0.3, 0.2, 0.1, 0.0, -0.2, -1.1)


@dataclass(frozen=True)
class TokenSelect(Method):
    """Every head's softmax over all tokens is a soft vote; tokens with most votes are read by all heads of the layer.
    While the query stays similar to the one that chose, its selection is kept (Wu et al. 2024, arXiv 2411.02886).

    Choosing reads every key, half of the full KV, so the budget depends on how often a selection is reused.

    Attributes:
        similarity: cosine above which a selection is reused, 0.9 in the paper; 0 takes the one at which, over the
            observation window's queries, choosing costs half of the budget.
    """

    title: ClassVar[str] = "TokenSelect"
    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2411.02886"
    similarity: float = 0.0

    def prepare_layer(self, layer: LayerContext, settings: None) -> tuple[Tensor, Tensor]:
        """Cosines above which a selection may be reused [S], highest first, and how often one is then made [S]."""
        queries = layer.queries.transpose(0, 1).reshape(1, layer.queries.shape[1], -1)
        candidates = torch.tensor(_SIMILARITIES, device=layer.keys.device)
        return candidates, chosen_at(queries.expand(len(candidates), -1, -1), candidates).float().mean(1)

    def choose(self, state: Any, asked: Asked) -> Choice:
        layer, places = asked.layer, asked.places
        heads, batch, group, length, dim = asked.history.shape
        chosen = chosen_at(asked.history.permute(1, 3, 0, 2, 4).reshape(batch, length, -1), self._reused(state, asked))
        at = torch.arange(length, device=chosen.device).expand(batch, -1)
        last = torch.where(chosen, at, 0).cummax(1).values.gather(1, places)  # [B, M]
        index = last[None, :, None, :, None].expand(heads, -1, group, -1, dim)
        logits = scaled_products(
            asked.history.gather(3, index), layer.keys[:, : asked.all_logits.shape[-1]], layer.scale
        )
        votes = logits.softmax(-1)[..., layer.inner].sum((0, 2), keepdim=True)
        # What choosing is planned to cost comes off the budget; what it did cost is what is counted.
        scoring = layer.kv_heads * layer.keys.shape[1] * layer.row_bytes
        planned = [scoring * (budget if self.similarity == 0 else 0) for budget in asked.budgets]
        tokens = [layer.affordable(b, cost) for b, cost in zip(asked.budgets, planned, strict=True)]
        metadata = scoring * chosen.gather(1, places).double()
        return Choice(keep_top(votes, tokens).expand(heads, -1, -1, -1, -1), metadata)

    def _reused(self, state: tuple[Tensor, Tensor], asked: Asked) -> Tensor:
        """The cosine above which each row reuses a selection, [B]."""
        similarities, rates = state
        if self.similarity:
            return torch.full((len(asked.budgets),), self.similarity, device=similarities.device)
        # The highest similarity at which choosing is rare enough; the rate falls with it.
        found = [(rates <= budget).int().argmax(0, keepdim=True) for budget in asked.budgets]
        return similarities.gather(0, torch.cat(found))


def chosen_at(queries: Tensor, similarity: Tensor) -> Tensor:
    """At which of the queries [B, P, C] a new selection is made, as bool [B, P]: at the first, and wherever the cosine
    to the query that made the last selection is not above `similarity`, a number or one for each of B."""
    rows = torch.nn.functional.normalize(queries.float(), dim=-1)
    batch, length, _ = rows.shape
    at = torch.arange(length, device=rows.device)
    unlike = (rows @ rows.transpose(1, 2) <= similarity.view(-1, 1, 1)) & (at[None, None] > at[None, :, None])
    # next[i]: the first later query that is unlike i; `length` if none is.
    following = torch.where(unlike, at, length).amin(2)
    jump = torch.cat([following, following.new_full((batch, 1), length)], dim=1)
    reached = torch.zeros(batch, length + 1, dtype=torch.bool, device=rows.device)
    reached[:, 0] = True
    # All queries that the chain from the first one visits, by doubling the length of the jumps.
    for _ in range(max(1, length.bit_length())):
        landed = torch.zeros_like(reached, dtype=torch.int64).scatter_add_(1, jump, reached.long()) > 0
        reached = reached | landed
        jump = jump.gather(1, jump)
    return reached[:, :length]
