"""The attention function that transformers calls: select, attend, merge; and how it gets there without a fork."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from squeezed import ops
from squeezed.cache import FixedLayer, FixedSlidingLayer, PrefillLayer, Read, SqueezedCache
from squeezed.decode import own
from squeezed.masks import NAME
from squeezed.models import attention_modules, plan_layers
from squeezed.ops import dense, voting
from squeezed.ops.layout import ClusteredKeys, Recalled
from squeezed.recall import Recall, clustered_weights

_OWN_LOGITS = 2**25  # logits over own tokens held at once: 128 MB
_LISTED = 2**27  # keys that one call's work lists have room for: 512 MB
_BLOCKS = 8  # in one call; they fill any machine, and kernels are compiled anew for twice as many


def squeezed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    squeezed_layer: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, [B, Hq, M, D] -> ([B, M, Hq, D], None).

    On a :class:`FixedLayer`, `key` and `value` hold the own tokens only; the fixed part comes with the layer. On any
    other cache it is plain scaled dot product attention, so a model may stay attached while it does other work.
    """
    if isinstance(squeezed_layer, FixedLayer | FixedSlidingLayer) and squeezed_layer.own is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        output = attend_step(query, squeezed_layer, scale)
        return output.view(query.shape[0], 1, query.shape[1], -1), None
    if not isinstance(squeezed_layer, FixedLayer):
        if isinstance(squeezed_layer, PrefillLayer):
            squeezed_layer.observe(query)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    fixed = attend_fixed(query, squeezed_layer, real_tokens(attention_mask, query), scale)
    output, _ = ops.merge_attention([fixed, attend_own(query, key, value, attention_mask, scale)])
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def real_tokens(attention_mask: Tensor | None, query: Tensor) -> list[slice] | None:
    """Which of each row's queries are not left padding; None when all are."""
    if attention_mask is None or query.shape[0] == 1 or query.shape[2] == 1:
        return None
    # A real token sees itself: the diagonal that ends in the mask's lower right corner.
    sees_itself = attention_mask[:, 0].diagonal(attention_mask.shape[-1] - query.shape[2], dim1=1, dim2=2)
    padding = (~sees_itself).sum(-1).tolist()
    return [slice(count, query.shape[2]) for count in padding] if any(padding) else None


def attend_fixed(query: Tensor, layer: FixedLayer, real: list[slice] | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all queries to the fixed part: output [B, Hq, M, D] float32 and lse [B, Hq, M].

    A short question reads everything in one pass or, if the selection has it so, its queries each select for
    themselves; a longer one's are taken in blocks that share a selection, many in one call: each block is to the
    operator what a question of a batch is. Blocks start at each question's own first token, never at its padding, so
    that a question's answer does not depend on its batch neighbours.
    """
    if layer.observed is not None:
        layer.observed.append(query)
    output, lse = _attend_all(query, layer, real, scale)
    if layer.recall is not None and layer.observes and query.shape[2] > 1:
        _observe(query, layer, layer.recall, real, lse, scale)
    return output, lse


def _observe(
    query: Tensor, layer: FixedLayer, recall: Recall, real: list[slice] | None, lse: Tensor, scale: float
) -> None:
    """Tell `recall` what the questions that were read whole have read closely, each judged by its own length."""
    spans = real or [slice(0, query.shape[2])] * query.shape[0]
    whole = [layer.selection.reads_whole(span.stop - span.start, layer.index) for span in spans]
    if not any(whole):
        recall.forget()
        return
    if real is not None:
        lse = lse.clone()
        for row, span in enumerate(spans):
            lse[row, :, : span.start if whole[row] else span.stop] = float("inf")
    recall.observe(clustered_weights(query, lse, layer.index, layer.window_end, scale), layer.index)


def _attend_all(query: Tensor, layer: FixedLayer, real: list[slice] | None, scale: float) -> tuple[Tensor, Tensor]:
    """`attend_fixed` without what is remembered of it."""
    queries, selection, index = query.shape[2], layer.selection, layer.index
    decode = queries == 1 and layer.own_length > 1
    whole = selection.reads_whole(queries, index)
    if dense.serves(query, index.keys) and (whole or takes_everything(query, layer)):
        return _attend_block(query, layer, slice(None), decode, scale, whole=True)
    if queries == 1:
        return _attend_block(query, layer, slice(None), decode, scale, whole, layer.recalled(query.shape[0]))
    if query.shape[0] == 1 and selection.block_of(queries, index) == queries:
        return _attend_block(query, layer, slice(None), decode, scale, whole)
    output, lse = torch.empty_like(query, dtype=torch.float32), query.new_empty(query.shape[:3], dtype=torch.float32)
    for row in range(query.shape[0]):
        span = real[row] if real else slice(0, queries)
        output[row, :, : span.start], lse[row, :, : span.start] = 0.0, float("-inf")  # padding sees nothing
        length = span.stop - span.start
        block, whole = selection.block_of(length, index), selection.reads_whole(length, index)
        for part in _calls(span, block, _blocks_at_once(query, index, block)):
            size = min(block, part.stop - part.start)
            # [blocks, Hq, queries of a block, D]
            blocks = query[row, :, part].unflatten(1, (-1, size)).transpose(0, 1)
            found, found_lse = _attend_block(blocks, layer, slice(row, row + 1), False, scale, whole)
            output[row, :, part], lse[row, :, part] = (x.transpose(0, 1).flatten(1, 2) for x in (found, found_lse))
    return output, lse


def _blocks_at_once(query: Tensor, index: ClusteredKeys, block: int) -> int:
    """Most blocks of a question to attend in one call: as many as there is memory for.

    On a CPU a call costs nothing, and the logits of many queries fill its caches: one after another, except single
    queries, whose loops share the cores.
    """
    room = max(1, _LISTED // (index.keys.shape[0] * index.tokens))
    if block == 1:
        return room
    return min(_BLOCKS, room) if query.is_cuda else 1


def _calls(span: slice, block: int, at_once: int) -> list[slice]:
    """The queries of `span` in calls of up to `at_once` blocks; a shorter last block in a call of its own."""
    whole = span.start + (span.stop - span.start) // block * block
    starts = [*range(span.start, whole, at_once * block), whole]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], span.stop], strict=True) if a < b]


def _attend_block(
    query: Tensor,
    layer: FixedLayer,
    rows: slice,
    decode: bool,
    scale: float,
    whole: bool = False,
    recalled: Recalled | None = None,
) -> tuple[Tensor, Tensor]:
    """One selection for all M queries; `rows` (questions of the batch) and `decode` are for the record."""
    output, lse, kept = _attend_once(query, layer, scale, whole, recalled)
    layer.reads.append(Read(rows, decode, kept, query.shape[0]))
    return output, lse


def _attend_once(
    query: Tensor, layer: FixedLayer, scale: float, whole: bool = False, recalled: Recalled | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, lse and what was kept, None if everything was attended without looking at centroids; `whole` asks so."""
    index, end = layer.index, layer.window_end
    everything = whole or takes_everything(query, layer)
    if everything and dense.serves(query, index.keys):
        return *dense.attend_dense(query, index.keys, index.values, end, scale), None
    thresholds = None if everything else layer.selection.thresholds(query)
    output, lse, kept = ops.attend_fixed(query, index, thresholds, end, scale, layer.selection.voters, recalled)
    return output, lse, None if thresholds is None else kept


def takes_everything(query: Tensor, layer: FixedLayer) -> bool:
    """Whether [B, Hq, M, D] attend to all keys: as asked, or because selecting would take longer than it saves."""
    selection, index = layer.selection, layer.index
    if selection.is_dense:
        return True
    if not selection.adaptive:
        return False
    on_triton = ops.uses_triton(query)
    if query.device.type == "cpu" and not on_triton and query.shape[2] == 1:
        from squeezed.ops.cpu import cost

        clusters = [level.shape[1] for level in index.levels]
        stand_ins = index.levels[0].values is not None
        kept = 1 - selection.sparsity
        return not cost.selecting_pays(layer.window_end, index.keys.shape[0], clusters, kept, stand_ins)
    if not on_triton or not dense.serves(query, index.keys):
        return False
    from squeezed.ops.triton.cost import AttentionShape, dense_microseconds, squeezed_microseconds

    batch, q_heads, queries, dim = query.shape
    block = selection.block_of(queries, index)
    whole = AttentionShape(
        batch=batch,
        q_heads=q_heads,
        kv_heads=index.keys.shape[0],
        queries=queries,
        head_dim=dim,
        tokens=layer.window_end,
        clusters=tuple(level.shape[1] for level in index.levels),
        kept=1 - selection.sparsity,
        key_bytes=index.keys.element_size(),
        centroid_bytes=index.centroid_bytes,
        stand_ins=index.levels[0].values is not None,
        voters=voting.voters(block, selection.voters),
        with_own=queries == 1,
    )
    in_blocks = replace(whole, batch=batch * -(-queries // block), queries=block)
    return dense_microseconds(whole) <= squeezed_microseconds(in_blocks)


def attend_step(
    query: Tensor,
    layer: FixedLayer | FixedSlidingLayer,
    scale: float,
    rope: own.Rope | None = None,
    ahead: Tensor | None = None,
) -> Tensor:
    """Attention of one generated token per question, in fixed shapes and without a word from the device.

    Args:
        query: [B, Hq, 1, D]; the token's key and value were handed to `layer.own`, or where `own_beside` says so, all
            three are rotated and in place already.
        scale: softmax scale.
        rope: None if query and key are rotated already.
        ahead: weights that are read next; a GPU may bring the first into its cache while it selects and joins.

    Returns:
        [B, Hq * D]
    """
    assert layer.own is not None
    if layer.own.pending is None and isinstance(layer, FixedLayer):
        return _attend_beside(query, layer, layer.own, scale, ahead)
    query, parts = own.attend_own(query, layer.own, scale, rope)
    if isinstance(layer, FixedSlidingLayer):
        return own.join(parts, None, None, layer.own, query)
    output, lse, kept = _attend_once(query, layer, scale, recalled=layer.recalled(query.shape[0]))
    return own.join(parts, (output, lse), kept, layer.own, query)


def own_beside(q_heads: int, layer: FixedLayer) -> bool:
    """Whether own tokens can be attended in the launches that attend to the fixed context."""
    assert layer.own is not None
    if layer.own.kept is None or not ops.uses_triton(layer.own.keys):
        return False
    from squeezed.ops.triton.device import FEW_ROWS

    return q_heads // layer.index.keys.shape[0] <= FEW_ROWS


def _attend_beside(query: Tensor, layer: FixedLayer, held: own.OwnTokens, scale: float, ahead: Tensor | None) -> Tensor:
    from squeezed.ops.triton import OwnKeys, Tally, attend_with_own

    thresholds = layer.selection.thresholds(query)
    assert isinstance(thresholds, Tensor)
    assert held.kept is not None
    assert held.running is not None
    keys = OwnKeys(held.keys, held.values, held.lengths)
    return attend_with_own(
        query,
        layer.index,
        thresholds,
        layer.window_end,
        scale,
        keys,
        Tally(held.kept, held.running),
        layer.recalled(query.shape[0]),
        ahead,
    )


def attend_own(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense causal attention to the own tokens, with its log-sum-exp.

    query [B, Hq, M, D]; key, value [B, Hk, L, D]; attention_mask [B, 1, M, L] bool. A padding query sees nothing: its
    output is 0 and its lse -inf.
    """
    if query.shape[0] == 1 and query.shape[2] == key.shape[2] and dense.serves(query, key[0]):
        return dense.attend_causal(query, key, value, scale)  # a single question has no padding
    batch, q_heads, queries, dim = query.shape
    kv_heads, length = key.shape[1:3]
    # The heads of a group are rows of one product: broadcasting over them would copy the keys for each.
    grouped = query.view(batch, kv_heads, q_heads // kv_heads, queries, dim).float() * scale
    transposed_keys, wide_values = key.float().transpose(-1, -2), value.float()
    outputs, lses = [], []
    step = max(1, _OWN_LOGITS // (batch * q_heads * length))
    for first in range(0, queries, step):
        block = grouped[:, :, :, first : first + step]
        rows = block.shape[:4]
        logits = (block.reshape(batch, kv_heads, -1, dim) @ transposed_keys).view(*rows, length)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[:, :, None, first : first + step], float("-inf"))
        lse = logits.logsumexp(-1)
        weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp_()
        outputs.append((weights.view(batch, kv_heads, -1, length) @ wide_values).view(*rows, dim))
        lses.append(lse)
    output, lse = torch.cat(outputs, dim=3), torch.cat(lses, dim=3)
    return output.reshape(batch, q_heads, queries, dim), lse.reshape(batch, q_heads, queries)


AttentionInterface.register(NAME, squeezed_attention)


def _hand_over_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values")
    if cache is not None and module.layer_idx < len(cache.layers):
        layer = cache.layers[module.layer_idx]
        if isinstance(layer, FixedLayer | FixedSlidingLayer | PrefillLayer):
            kwargs["squeezed_layer"] = layer
    return args, kwargs


def _follow(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache, tokens = kwargs.get("past_key_values"), kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(cache, SqueezedCache) or cache.recall is None or not cache.recall.copies or tokens is None:
        return
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        tokens = tokens.masked_fill(mask[:, -tokens.shape[1] :] == 0, -1)  # padding agrees with nothing
    cache.recall.follow(tokens)


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let `model` understand squeezed caches for the length of a with block; nested use is fine.

    Other caches keep working inside the block, with transformers' own scaled dot product attention.

    Raises:
        InputError: the model can't be squeezed.
    """
    before = model.config._attn_implementation
    if before == NAME:
        yield model
        return
    plan_layers(model)
    hooks = [m.register_forward_pre_hook(_hand_over_layer, with_kwargs=True) for m in attention_modules(model)]
    hooks.append(model.get_decoder().register_forward_pre_hook(_follow, with_kwargs=True))
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
