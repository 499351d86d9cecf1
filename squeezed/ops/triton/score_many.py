"""Score centroids for many query rows that share one selection (question prefill): two products, nothing stored.

The score of a cluster is a mean over rows of exp(logit - row's log-sum-exp). Rows x clusters logits would not fit, so
they are computed twice: first reduced along clusters (the rows' log-sum-exps), then along rows (the scores). Both are
the same kernel, a product whose rows are reduced by an online log-sum-exp, with queries and centroids trading places.
"""

# mypy: allow-untyped-defs, disable-error-code="attr-defined"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from squeezed.ops.layout import ChannelScales
from squeezed.ops.triton import device as dev
from squeezed.ops.triton.attend import LOG2E
from squeezed.ops.triton.eight_bit import LIFT
from squeezed.ops.triton.score import Scores, clear_words


@triton.jit
def _log_sizes(sizes, result, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """log2 of the number of keys of each cluster, -inf for padding."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + index, mask=index < count, other=0)
    log_size = tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
    tl.store(result + index, log_size, mask=index < count)


@triton.jit
def _log_weights(
    row_lse, result, rows, averaged, splits, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr, PDL: tl.constexpr
):
    """Weight of each row in a mean over `averaged`, 1 / (averaged x its sum over all clusters), as log2.

    -inf where the sum is empty.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    problem = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_SPLITS)
    parts = tl.load(
        row_lse + (problem * splits + split[:, None]).to(tl.int64) * rows + row[None, :],
        mask=(split < splits)[:, None] & (row < rows)[None, :],
        other=float("-inf"),
    )
    peak = tl.max(parts, axis=0)
    empty = peak == float("-inf")
    total = tl.sum(tl.exp2(parts - tl.where(empty, 0.0, peak)[None, :]), axis=0)
    weight = -(peak + tl.log2(tl.where(empty, 1.0, total) * averaged))
    tl.store(result + problem * rows + row, tl.where(empty, float("-inf"), weight), mask=row < rows)


@triton.jit
def _reduce_product(
    query,
    centroids,
    log_sizes,
    log_weights,
    spread,
    norms,
    ids,
    id_counts,
    row_lse,
    result,
    sync,
    sync_words,
    scale_log2,
    batch,
    rows,
    clusters,
    capacity,
    splits,
    ROWS_FIRST: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS_FIRST: row_lse[head, question, split, row] over a piece of clusters; else result[question, head, cluster].

    query, norms, log_weights: [head, question, row]; ids as the result.
    """
    # The questions of a batch read the same clusters at the same time.
    block = tl.program_id(0) // batch
    question = tl.program_id(0) % batch
    split = tl.program_id(1)
    head = tl.program_id(2)
    problem = head * batch + question
    place = question * tl.num_programs(2) + head
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if ROWS_FIRST and (block == 0 and split == 0):
        clear_words(sync, sync_words, problem, tl.num_programs(2) * batch, 256)
    count = clusters
    if HAS_IDS:
        count = tl.load(id_counts + place)
    query_base = query + problem.to(tl.int64) * rows * HEAD_DIM
    centroid_base = centroids + head.to(tl.int64) * clusters * HEAD_DIM
    id_base = ids + place.to(tl.int64) * capacity if HAS_IDS else ids
    lse_base = row_lse + problem.to(tl.int64) * splits * rows
    dim = tl.arange(0, HEAD_DIM)
    x_index = block * BLOCK_X + tl.arange(0, BLOCK_X)
    if ROWS_FIRST:
        piece = tl.cdiv(tl.cdiv(count, BLOCK_Y), splits) * BLOCK_Y
        y_start = split * piece
        y_stop = tl.minimum(y_start + piece, count)
        x_mask = x_index < rows
        x = tl.load(query_base + x_index[:, None] * HEAD_DIM + dim[None, :], mask=x_mask[:, None], other=0.0)
        y_base = centroid_base
        bias_base = log_sizes + head * clusters
        if spread is not None:
            x_factor = tl.load(norms + problem * rows + x_index, mask=x_mask, other=0.0)
            y_factors = spread + head * clusters
    else:
        y_start = 0
        y_stop = tl.where(block * BLOCK_X < count, rows, 0)
        x_mask = x_index < count
        x_cluster = tl.load(id_base + x_index, mask=x_mask, other=0) if HAS_IDS else x_index
        x = tl.load(centroid_base + x_cluster[:, None] * HEAD_DIM + dim[None, :], mask=x_mask[:, None], other=0.0)
        x = x.to(query.dtype.element_ty)
        y_base = query_base
        bias_base = log_weights + problem * rows
        if spread is not None:
            x_factor = tl.load(spread + head * clusters + x_cluster, mask=x_mask, other=0.0)
            y_factors = norms + problem * rows
    top = tl.full([BLOCK_X], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_X], tl.float32)
    for start in tl.range(y_start, y_stop, BLOCK_Y, num_stages=STAGES):
        y_index = start + tl.arange(0, BLOCK_Y)
        y_mask = y_index < y_stop
        # Past the end the last row again, which a bias of -inf removes: cheaper than masks on every load.
        y_place = tl.minimum(y_index, y_stop - 1)
        if ROWS_FIRST:  # noqa: SIM102
            if HAS_IDS:
                y_place = tl.load(id_base + y_place)
        y = tl.load(y_base + y_place[:, None] * HEAD_DIM + dim[None, :])
        bias = tl.load(bias_base + y_place, mask=y_mask, other=float("-inf"))
        logits = tl.dot(x, tl.trans(y.to(x.dtype)), input_precision=PRECISION) * scale_log2 + bias[None, :]
        if spread is not None:
            logits += x_factor[:, None] * tl.load(y_factors + y_place)[None, :]
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe_top) + tl.sum(tl.exp2(logits - safe_top[:, None]), axis=1)
        top = new_top
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    if ROWS_FIRST:
        tl.store(lse_base + split * rows + x_index, lse, mask=x_mask)
    else:
        allowed = tl.load(log_sizes + head * clusters + x_cluster, mask=x_mask, other=float("-inf")) > float("-inf")
        score = tl.where(allowed, lse * 0.6931471805599453, float("-inf"))
        tl.store(result + place.to(tl.int64) * capacity + x_index, score, mask=x_mask)


@triton.jit
def _reduce_tiles(
    query,
    centroids,
    log_sizes,
    log_weights,
    spread,
    norms,
    result,
    scale_log2,
    batch,
    rows,
    clusters,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """The second product where a question's rows are one tile: a tile of centroids stays, all questions' rows pass."""
    head = tl.program_id(1)
    cluster = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cluster < clusters
    dim = tl.arange(0, HEAD_DIM)
    where_c = centroids + (head.to(tl.int64) * clusters + cluster)[:, None] * HEAD_DIM + dim[None, :]
    c = tl.load(where_c, mask=inside[:, None], other=0.0).to(query.dtype.element_ty)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    allowed = tl.load(log_sizes + head * clusters + cluster, mask=inside, other=float("-inf")) > float("-inf")
    if spread is not None:
        variance = tl.load(spread + head * clusters + cluster, mask=inside, other=0.0)
    row = tl.arange(0, BLOCK_R)
    for question in tl.range(0, batch, num_stages=STAGES):
        first = (head * batch + question) * rows
        q = tl.load(query + (first + tl.minimum(row, rows - 1)).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :])
        bias = tl.load(log_weights + first + row, mask=row < rows, other=float("-inf"))
        logits = tl.dot(c, tl.trans(q), input_precision=PRECISION) * scale_log2 + bias[None, :]
        if spread is not None:
            norm = tl.load(norms + first + row, mask=row < rows, other=0.0)
            logits += variance[:, None] * norm[None, :]
        top = tl.max(logits, axis=1)
        safe_top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(logits - safe_top[:, None]), axis=1)
        score = (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        place = (question * tl.num_programs(1) + head).to(tl.int64) * clusters + cluster
        tl.store(result + place, tl.where(allowed, score, float("-inf")), mask=inside)


def score_many_rows(
    query: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    scale: float,
    sync_words: int,
    ids: Tensor | None = None,
    id_counts: Tensor | None = None,
    scales: ChannelScales | None = None,
    spread: Tensor | None = None,
    *,
    block: int = 128,
    across: int | None = None,
    stages: int | None = None,
    warps: int = 4,
) -> Scores:
    """Log scores of every centroid (or of those in `ids`), averaged over all rows. Arguments as `score_few_rows`."""
    batch, kv_heads, rows, head_dim = query.shape
    query = query.transpose(0, 1).contiguous()
    norms = None
    if spread is not None:
        norms = query.float().square().sum(-1) * (0.5 * scale**2 * LOG2E)
    if scales is not None:
        scaled = query.float() * (scales.key_scale * LIFT.value)[:, None, None]
        query = scaled if query.dtype == torch.float32 else scaled.half()
        scale /= LIFT.value
    clusters = centroids.shape[1]
    capacity = clusters if ids is None else ids.shape[1]
    # The first product is row by row: with the same clusters for all, the rows of all questions are as one's.
    together = batch if ids is None else 1
    wide = head_dim * query.element_size() // 128
    across = across or {1: 128, 2: 128}.get(wide, 32)
    block = block if wide <= 4 else 32
    block = 32 if dev.INTERPRETED else block
    row_block = min(block, max(16, triton.next_power_of_2(together * rows)))
    # Centroids reached through a list take one stage more to load.
    stages = stages or (2 if ids is None else 3)
    row_blocks = triton.cdiv(together * rows, row_block)
    wanted = 2 * dev.multiprocessors(query.device) // (row_blocks * kv_heads * (batch // together))
    splits = 1 << max(0, min(16, wanted, triton.cdiv(capacity, across)).bit_length() - 1)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    row_lse, result = empty(kv_heads, splits, batch * rows), empty(batch * kv_heads, 1, capacity)
    log_sizes, log_weights = empty(sizes.shape), empty(kv_heads, batch * rows)
    sync = torch.empty(sync_words, dtype=torch.int64, device=query.device)
    launch = dev.launch_options(query.device)

    def reduce_product(rows_first: bool, pieces: int, splits: int, questions: int, block: int, across: int) -> None:
        _reduce_product[(pieces * questions, splits, kv_heads)](
            query,
            centroids,
            log_sizes,
            log_weights,
            spread,
            norms,
            ids,
            id_counts,
            row_lse,
            result,
            sync,
            sync_words,
            scale * LOG2E,
            questions,
            batch // questions * rows,
            clusters,
            capacity,
            splits,
            ROWS_FIRST=rows_first,
            HAS_IDS=ids is not None,
            HEAD_DIM=head_dim,
            BLOCK_X=block,
            BLOCK_Y=across,
            STAGES=stages,
            PRECISION=dev.dot_precision(query.dtype),
            num_warps=warps,
            **launch,
        )

    _log_sizes[(triton.cdiv(sizes.numel(), 1024),)](sizes, log_sizes, sizes.numel(), BLOCK=1024, **launch)
    reduce_product(True, row_blocks, splits, batch // together, row_block, across)
    _log_weights[(triton.cdiv(together * rows, 128), kv_heads * (batch // together))](
        row_lse,
        log_weights,
        together * rows,
        rows,
        splits,
        BLOCK=128,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        **launch,
    )
    if ids is not None or rows > across:
        reduce_product(False, triton.cdiv(capacity, block), 1, batch, block, across)
        return Scores(result, None, None, sync)
    _reduce_tiles[(triton.cdiv(clusters, block), kv_heads)](
        query,
        centroids,
        log_sizes,
        log_weights,
        spread,
        norms,
        result,
        scale * LOG2E,
        batch,
        rows,
        clusters,
        HEAD_DIM=head_dim,
        BLOCK_C=block,
        BLOCK_R=max(16, triton.next_power_of_2(rows)),
        STAGES=stages,
        PRECISION=dev.dot_precision(query.dtype),
        num_warps=warps,
        **launch,
    )
    return Scores(result, None, None, sync)
