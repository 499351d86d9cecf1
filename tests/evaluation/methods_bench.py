"""Made-up layers, and attention to them under any method, by the code that the harness runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeezed.evaluation.methods import Method
from squeezed.evaluation.methods.base import LayerContext
from squeezed.evaluation.place import Place
from squeezed.evaluation.rows import Group, ScoredLayer

SCALE = 0.25


def layer(tokens: int = 400, kv_heads: int = 2, group: int = 3, dim: int = 16, seed: int = 0) -> LayerContext:
    """Keys in clumps, so that attention is peaked and clusters mean something; a window of 20 and 4 sinks."""
    generator = torch.Generator().manual_seed(seed)
    clumps = 3 * torch.randn(kv_heads, 12, dim, generator=generator)
    which = torch.randint(0, 12, (kv_heads, tokens), generator=generator)
    keys = clumps.gather(1, which.unsqueeze(-1).expand(-1, -1, dim)) + torch.randn(
        kv_heads, tokens, dim, generator=generator
    )
    values = torch.randn(kv_heads, tokens, dim, generator=generator)
    queries = torch.randn(kv_heads * group, 20, dim, generator=generator)
    return LayerContext(keys, values, queries, SCALE, 0, sinks=4, window=20)


def queries(context: LayerContext, count: int = 12, seed: int = 1) -> Tensor:
    """[1, Hq, M, D], each near some key's direction; neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = context.queries.shape[0], context.keys.shape[-1]
    steps = torch.randn(1, heads, count, dim, generator=generator)
    return steps + 0.5 * steps.cumsum(2)


def scored(
    context: LayerContext, method: Method, budgets: tuple[float, ...], capacity: int = 64
) -> tuple[ScoredLayer, Place]:
    """A layer with one row per budget; they must share the method's settings."""
    settings = {method.settings(budget) for budget in budgets}
    assert len(settings) == 1
    states = method.prepare([context], settings.pop())
    place = Place(len(budgets), torch.device("cpu"))
    groups = [Group(slice(0, len(budgets)), method, states)]
    end = context.keys.shape[1]
    return ScoredLayer(place, len(budgets), capacity, context, groups, {}, end, budgets), place


def attend(
    context: LayerContext, method: Method, query: Tensor, budget: float, one_by_one: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [Hq, M, D], log-sum-exp [Hq, M] and share of the full KV read [M], under one budget."""
    at_once, place = scored(context, method, (budget,), query.shape[2])
    outputs, lses, read = [], [], []
    for part in query.split(1 if one_by_one else query.shape[2], dim=2):
        place.begin([0], part.shape[2])
        if at_once.queries is None:
            at_once.queries = part.new_zeros(1, at_once.capacity, part.shape[1], part.shape[3])
        at_once._write(at_once.queries, part)
        output, lse, _ = at_once.fixed(part, context.scale)
        outputs.append(output[0])
        lses.append(lse[0])
        read.append(place.bytes[0] / context.full_bytes)
        place.accept({0: part.shape[2]}, [[]])
    return torch.cat(outputs, 1), torch.cat(lses, 1), torch.cat(read)


def dense(context: LayerContext, query: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64: output [Hq, M, D] and logits [Hq, M, N]."""
    group = query.shape[1] // context.kv_heads
    keys, values = (x.double().repeat_interleave(group, 0) for x in (context.keys, context.values))
    logits = context.scale * query[0].double() @ keys.transpose(1, 2)
    return logits.softmax(-1) @ values, logits


def wider(context: LayerContext, copies: int) -> LayerContext:
    """The same layer with its tokens repeated; for budgets that need room."""
    return replace(context, keys=context.keys.repeat(1, copies, 1), values=context.values.repeat(1, copies, 1))
