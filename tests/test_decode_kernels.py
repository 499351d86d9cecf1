"""The GPU kernels of a decode step compute what its plain version does: interpreted, or on a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import silu

pytest.importorskip("triton")

from squeezed import copying
from squeezed.answer import Decoding, ask
from squeezed.context import FixedContext
from squeezed.decode import fused, loop, own, own_triton
from squeezed.decode.choose_triton import choose_largest
from squeezed.decode.copy_triton import Finder
from squeezed.decode.linear_triton import Norm, Tiling, gated, project
from squeezed.decode.qkv_triton import project_rotated
from squeezed.decode.sampler import Sampler, Sampling, StepState, count_step
from squeezed.decode.standing import StandingRecall
from squeezed.decode.step import DecodeStep
from squeezed.ops.layout import ClusteredKeys
from squeezed.ops.triton import OwnKeys, Tally, attend_fixed, attend_with_own
from squeezed.recall import Recall
from tests.ops import cases as layers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def on_device(function):
    """In the interpreter, or on a CUDA device."""
    if INTERPRETED:
        return function
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(function))


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Memory that an operation allocates starts as NaN, or as a huge integer."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    capacity: int = 64
    window: int | None = None
    dtype: torch.dtype = torch.float32
    rope: bool = False
    norm: bool = False
    levels: int = 1


CASES = [
    Case((5,)),
    Case((0,), rope=True),
    Case((0, 200, 31), group=3, head_dim=16, capacity=300, rope=True, norm=True, levels=3),
    Case((250, 290), kv_heads=1, group=1, head_dim=64, capacity=300, window=20, rope=True),
    Case((130, 1), group=4, head_dim=128, capacity=256, dtype=torch.float16, rope=True, norm=True, levels=2),
    Case((599,), group=9, head_dim=16, capacity=600, window=50),
]
LARGE = [
    Case((1000, 3000), kv_heads=8, group=4, head_dim=128, capacity=4096, dtype=torch.bfloat16, rope=True),
    Case((700,), kv_heads=32, group=1, head_dim=64, capacity=1024, dtype=torch.float16, norm=True, rope=True),
    Case((2000,), kv_heads=1, group=16, head_dim=256, capacity=2048, dtype=torch.bfloat16, window=1024),
]


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert tiny.relative_error(found, expected) < tolerance


@on_device
@pytest.mark.parametrize("case", CASES if INTERPRETED else CASES + LARGE, ids=str)
def test_appending_rotating_attending_and_joining(case: Case) -> None:
    torch.manual_seed(torch.seed() % 2**31)
    batch, tolerance = len(case.lengths), TOLERANCE[case.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(case.dtype)

    keys, values = (draw(batch, case.kv_heads, case.capacity, case.head_dim) for _ in range(2))
    # As a model leaves them: heads side by side in memory.
    query = draw(batch, 1, case.kv_heads * case.group, case.head_dim).transpose(1, 2)
    key, value = (draw(batch, 1, case.kv_heads, case.head_dim).transpose(1, 2) for _ in range(2))
    angle = torch.rand(case.capacity, case.head_dim, device=DEVICE) * 6
    norms = [draw(case.head_dim).abs() + 0.5 if case.norm else None for _ in range(2)]
    rope = own.Rope(angle.cos().to(case.dtype), angle.sin().to(case.dtype), *norms, 1e-6) if case.rope else None
    fixed = (
        torch.randn(batch, query.shape[1], 1, case.head_dim, device=DEVICE),
        draw(batch, query.shape[1], 1).float(),
    )
    kept = torch.randint(0, 99, (case.levels, batch, case.kv_heads), dtype=torch.int32, device=DEVICE)
    found = []
    for attend, join in ((own_triton.attend_own, own_triton.join), (_plain(own.attend_own), _plain(own.join))):
        mine = own.OwnTokens(
            keys.clone(),
            values.clone(),
            torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE),
            case.window,
            torch.full((case.levels, batch), 3, device=DEVICE),
            torch.ones(1, dtype=torch.int64, device=DEVICE),
        )
        results = []
        for parts_of in (fixed, None):
            mine.hold(key, value)
            rotated, parts = attend(query, mine, 0.3, rope)
            results += [rotated, join(parts, parts_of, None if parts_of is None else kept, mine, query)]
        found.append([*results, mine.keys, mine.values, mine.kept])
    for ours, expected in zip(*found, strict=True):
        assert_same(ours, expected, tolerance)


def _plain(function):
    """The same function without its kernels, on any device."""

    def call(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own.ops, "uses_triton", lambda tensor: False)
            return function(*args)

    return call


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize(
    ("rows", "columns"), [(48, 96), (64, 256), (100, 300), *([] if INTERPRETED else [(4096, 2048)])]
)
@pytest.mark.parametrize("tiling", [None, Tiling(8, 128)])
def test_products_with_norms_biases_and_residuals(
    rows: int, columns: int, dtype: torch.dtype, tiling: Tiling | None
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x, residual = draw(columns), draw(rows)
    norm = Norm(draw(columns).abs() + 0.5, 1e-5)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean() + 1e-5) * norm.weight.double()
    weights, biases = ([draw(size, *rest) for size in (rows, 16, 16)] for rest in ((columns,), ()))
    tolerance = TOLERANCE[dtype]
    one = project(x, weights[:1], residual=residual, tiling=tiling)
    assert_same(one, weights[0].double() @ wide + residual.double(), tolerance)
    if rows % 16 == 0:
        three = project(x, weights, biases, norm, tiling=tiling)
        assert_same(three, torch.cat(weights).double() @ normed + torch.cat(biases).double(), tolerance)
    up = draw(rows, columns)
    both = gated(x, weights[0], up, norm, tiling)
    assert_same(both, silu(weights[0].double() @ normed) * (up.double() @ normed), 2 * tolerance)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tiling", [None, Tiling(8, 32)])
def test_queries_and_keys_come_out_rotated_and_in_place(
    dtype: torch.dtype, biased: bool, tiling: Tiling | None
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    columns, dim, q_heads, kv_heads, capacity, length = 96, 16, 4, 2, 7, 3
    x, norm = draw(columns), Norm(draw(columns).abs() + 0.5, 1e-5)
    heads = (q_heads, kv_heads, kv_heads)
    weights = [draw(count * dim, columns) for count in heads]
    biases = [draw(count * dim) for count in heads] if biased else None
    angle = torch.rand(capacity, dim, device=DEVICE) * 6
    rope = own.Rope(angle.cos().to(dtype), angle.sin().to(dtype))
    lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    held = own.OwnTokens(draw(1, kv_heads, capacity, dim), draw(1, kv_heads, capacity, dim), lengths)
    before = [held.keys.clone(), held.values.clone()]
    query = project_rotated(x, weights, biases, norm, rope, held, tiling)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean() + 1e-5) * norm.weight.double()
    plain = [weight.double() @ normed for weight in weights]
    if biases:
        plain = [part + bias.double() for part, bias in zip(plain, biases, strict=True)]
    q, k, v = (part.view(1, count, 1, dim) for part, count in zip(plain, heads, strict=True))
    slot = lengths.long()
    assert_same(query, own.rotated(q.float(), slot, None, rope), 2 * TOLERANCE[dtype])
    before[0][:, :, length] = own.rotated(k.float(), slot, None, rope)[:, :, 0].to(dtype)
    before[1][:, :, length] = v[:, :, 0].to(dtype)
    assert_same(held.keys, before[0], 2 * TOLERANCE[dtype])
    assert_same(held.values, before[1], 2 * TOLERANCE[dtype])
    others = torch.arange(capacity) != length
    assert torch.equal(held.keys[:, :, others], before[0][:, :, others])


@on_device
@pytest.mark.parametrize(
    "case",
    [
        layers.Case(q_heads=4, levels=2, batch=2, seed=1),
        layers.Case(q_heads=2, clusters=300, largest=3, seed=2, dtype=torch.float16),
        layers.Case(seed=3, compensate=True, centroid_bits=8, key_bits=8, second_order=True),
        layers.Case(q_heads=8, seed=4, compensate=True, centroid_bits=8, head_dim=128, dtype=torch.float16),
    ],
    ids=range(4),
)
def test_own_tokens_beside_the_scoring_are_those_attended_after_it(case: layers.Case) -> None:
    index, query = layers.make_layer(case, DEVICE), layers.make_query(case, DEVICE)
    scale = case.head_dim**-0.5
    thresholds = layers.quantile_thresholds(query, index, scale, 0.3)
    shape = (case.batch, case.kv_heads, 70, case.head_dim)
    keys, values = (torch.randn(shape, device=DEVICE).to(case.dtype) for _ in range(2))
    lengths = torch.tensor([40, 65][: case.batch], dtype=torch.int32, device=DEVICE)
    total = torch.full((case.levels, case.batch), 3, device=DEVICE)
    running = torch.ones(1, dtype=torch.int64, device=DEVICE)
    held = own.OwnTokens(keys, values, lengths, None, total.clone(), running)
    output, lse, kept = attend_fixed(query, index, thresholds, index.tokens - 2, scale)
    row = torch.arange(case.batch, device=DEVICE)
    held.hold(keys[row, :, lengths.long()].unsqueeze(2), values[row, :, lengths.long()].unsqueeze(2))
    _, parts = _plain(own.attend_own)(query, held, scale, None)
    expected = _plain(own.join)(parts, (output, lse), kept, held, query)
    found = attend_with_own(
        query, index, thresholds, index.tokens - 2, scale, OwnKeys(keys, values, lengths), Tally(total, running)
    )
    assert found.dtype == case.dtype
    assert_same(found, expected, TOLERANCE[case.dtype])
    assert torch.equal(total, held.kept)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(
    ("batch", "vocabulary", "stops"),
    [(1, 1, 1), (1, 1024, 0), (1, 5003, 3), (3, 2051, 2), *([] if INTERPRETED else [(1, 151936, 2), (5, 128256, 1)])],
)
def test_a_greedy_step_ends_in_one_launch_as_in_many(
    batch: int, vocabulary: int, stops: int, dtype: torch.dtype, penalty: float
) -> None:
    torch.manual_seed(vocabulary)
    device = torch.device(DEVICE)
    plain, fast = (StepState.start(batch, 70, 6, device) for _ in range(2))
    for state in (plain, fast):
        state.begin(torch.arange(70 * batch).view(70, batch).tolist())
    # Few values, so that many tie; some rows have but one that is not -inf.
    steps = (torch.randint(7, (6, batch, vocabulary), device=device) - 2).to(dtype)
    steps[3] = float("-inf")
    steps[3, :, vocabulary // 2] = -100.0
    ending = tuple(steps[1, 0].argmax().item() + i for i in range(stops))
    sampling = Sampling(stops=ending, pad=vocabulary + 7, repetition_penalty=penalty)
    samplers = [Sampler(sampling, batch, vocabulary, device) for _ in range(2)]
    for sampler in samplers:
        sampler.begin(steps[2].argmax(-1, keepdim=True), [0] * batch)
    for logits in steps:
        plain.token.copy_(samplers[0].choose(logits))
        count_step(plain, samplers[0].finished)
        choose_largest(logits, samplers[1], fast)
        before, after = (
            [*s.changing(), *sampler.changing()] for s, sampler in zip((plain, fast), samplers, strict=True)
        )
        for expected, found in zip(before, after, strict=True):
            assert torch.equal(expected, found)
        assert fast.arrived.item() == 0
    assert torch.equal(plain.history, fast.history)
    assert not stops or penalty > 1 or samplers[1].finished[0]


@on_device
def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary() -> None:
    device = torch.device(DEVICE)
    for vocabulary in (1000, 3100):
        logits = torch.full((2, vocabulary), float("nan"), device=device)
        logits[1, 2] = -5.0
        sampler, state = Sampler(Sampling(), 2, vocabulary, device), StepState.start(2, 1, 2, device)
        choose_largest(logits, sampler, state)
        assert 0 <= state.token[0].item() < vocabulary
        assert state.token[1].item() == 2


def text_and_tokens(tokens: int, batch: int, words: int) -> tuple[Tensor, Tensor]:
    """A text, and what is written about it, [B, 12]: quotes of it and words of their own."""
    generator = torch.Generator().manual_seed(tokens + words)
    text = torch.randint(words, (tokens,), generator=generator)
    written = torch.randint(words, (batch, 12), generator=generator)
    for row in range(batch):
        start = int(torch.randint(max(1, tokens - 7), (1,), generator=generator))
        quoted = text[start : start + 7]
        written[row, 3 : 3 + len(quoted)] = quoted
    return text.to(DEVICE), written.to(DEVICE)


@on_device
@pytest.mark.parametrize(
    ("tokens", "batch", "words"),
    [(1, 1, 2), (5, 3, 3), (300, 2, 4), (300, 1, 40), (5000, 2, 300), *([] if INTERPRETED else [(300_000, 2, 9000)])],
)
def test_what_the_last_tokens_copy_is_found_in_one_launch(tokens: int, batch: int, words: int) -> None:
    text, written = text_and_tokens(tokens, batch, words)
    finder, recent = Finder(text, batch), torch.full((batch, copying.LONGEST), -1, device=DEVICE)
    expected_recent = recent.clone()
    known = torch.randint(-1, tokens, (batch, 70), device=DEVICE, dtype=torch.int32)
    found = torch.empty(batch, copying.WIDTH, dtype=torch.int32, device=DEVICE)
    some = 0
    for token in written.T:
        finder.follow(token[:, None], recent, known, found)
        expected_recent = copying.followed(expected_recent, token[:, None])
        expected = copying.once(copying.copied(text, expected_recent), known)
        assert torch.equal(recent, expected_recent)
        for ours, theirs in zip(found.tolist(), expected.tolist(), strict=True):
            ours, theirs = ([place for place in row if place != -1] for row in (ours, theirs))
            assert sorted(ours) == sorted(theirs)
            some += len(ours)
    assert tokens < 100 or some > 0


def in_view(recall: StandingRecall, index: ClusteredKeys) -> list[Tensor]:
    """Slots and their clusters in ascending order, and the sizes that are left."""
    held = recall.within(index)
    assert held is not None
    order = held.slots.argsort(-1)
    return [held.slots.gather(-1, order), held.clusters.gather(-1, order), *held.sizes]


@on_device
@pytest.mark.parametrize("recalled", [0, 1, 9])
@pytest.mark.parametrize(("levels", "kv_heads", "batch"), [(1, 1, 1), (2, 2, 3), (3, 4, 1)])
def test_copied_keys_come_into_view_and_go(
    levels: int, kv_heads: int, batch: int, recalled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for seed, clusters in ((0, 37), (1, 37), (2, 20)):
        case = layers.Case(kv_heads=kv_heads, levels=levels, seed=seed, clusters=clusters, sinks=4)
        layer = layers.make_layer(case, DEVICE)
        orders = [torch.randperm(layer.clustered, device=DEVICE) + 4 for _ in range(kv_heads)]
        made.append(replace(layer, positions=torch.stack(orders).int()))
    text, written = text_and_tokens(min(layer.tokens for layer in made), batch, 30)
    asked = Recall(recalled, made, text)
    if recalled:
        asked.observe(torch.rand(batch, len(text), device=DEVICE), 0)
    monkeypatch.setattr("squeezed.ops.uses_triton", lambda tensor: True)
    fast = StandingRecall(asked, made, batch)
    monkeypatch.setattr("squeezed.ops.uses_triton", lambda tensor: False)
    plain = StandingRecall(asked, made, batch)
    assert (fast._finder is None, plain._finder is None) == (False, True)
    some = 0
    for question in range(2):
        fast.take(asked)
        plain.take(asked)
        for token in written[:, question:].T:
            fast.follow(token[:, None])
            plain.follow(token[:, None])
            for layer in made:
                for ours, theirs in zip(in_view(fast, layer), in_view(plain, layer), strict=True):
                    assert torch.equal(ours, theirs)
            some += int((in_view(plain, made[0])[0] >= 0).sum(-1).max() > recalled)
    assert some > 0


@on_device
@pytest.mark.parametrize("family", ["qwen2-bias", *([] if INTERPRETED else ["llama", "qwen3-norm-128", "mistral-64"])])
def test_a_fused_layer_computes_what_the_models_own_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model(family)
    context = FixedContext.from_text(model, tokenizer, tiny.text(), tiny.BUILD)
    short, paths = Decoding(4 if INTERPRETED else 16), []
    expected = ask(model, tokenizer, context, tiny.QUESTIONS[1:2], 0.7, decoding=short, adaptive=False)

    def prepare(step: DecodeStep) -> None:
        assert fused.why_not(step.model, step.cache.layers, 1) is None
        step._fused = step._checked_fused(step._copies())
        paths.append(step._fused)

    monkeypatch.setattr(DecodeStep, "prepare", prepare)
    model, context = model.to(DEVICE), context.to(DEVICE)
    steps = loop.Steps()
    found = ask(model, tokenizer, context, tiny.QUESTIONS[1:2], 0.7, False, short, None, steps, adaptive=False)
    assert paths[0] is not None
    assert found[0].text == expected[0].text
    assert found[0].kv_budget == pytest.approx(expected[0].kv_budget, rel=1e-3)


def test_other_models_are_not_fused_and_say_why() -> None:
    assert fused.why_not(tiny.model("granite"), [], 1) == "granite is not among llama, mistral, qwen2, qwen3"
    assert fused.why_not(tiny.model("llama"), [], 3) == "a batch of 3"
    assert fused.why_not(tiny.model("llama", hidden_act="gelu"), [], 1) == "activation GELUActivation"
