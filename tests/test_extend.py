"""Text at the end of a context: what holds of a context holds afterwards, and it selects as well as a fresh one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed import artifact
from squeezed.attention import attached
from squeezed.context import FixedContext
from squeezed.errors import InputError
from squeezed.extension import extend, extend_into, rebuild_advice
from squeezed.ops import reference
from squeezed.ops.layout import ClusteredKeys
from squeezed.text import read_files

TOKENIZER = tiny.tokenizer()
TEXTS = (tiny.text(), tiny.text(200, seed=1), tiny.text(60, seed=2), "No. the")
FEW = ("llama", "gemma3-sliding")


def built(lm: PreTrainedModel, texts: tuple[str, ...], chat: bool = True, **changes: Any) -> FixedContext:
    return FixedContext.from_text(lm, TOKENIZER, "\n\n".join(texts), replace(tiny.BUILD, **changes), chat)


def extended(lm: PreTrainedModel, texts: tuple[str, ...], chat: bool = True, **changes: Any) -> FixedContext:
    context = built(lm, texts[:1], chat, **changes)
    for text in texts[1:]:
        context = context.extend(lm, TOKENIZER, [text])
    return context


def assert_layout_holds(layer: ClusteredKeys, text_order: tuple[Tensor, Tensor], sinks: int) -> None:
    """Every key once, levels nest, centroids are means, sinks and window are where they belong."""
    n, tokens = layer.clustered, layer.tokens
    for head in range(layer.keys.shape[0]):
        positions = layer.positions[head].long()
        assert torch.equal(positions.sort().values, torch.arange(sinks, sinks + n))
        for stored, there in zip((layer.keys, layer.values), text_order, strict=True):
            assert tiny.relative_error(stored[head, :n], there[head, positions]) < 1e-4
            always = torch.cat([there[head, :sinks], there[head, sinks + n : tokens]])
            assert tiny.relative_error(stored[head, n:], always) < 1e-4
        finer = n
        for depth, level in enumerate(layer.levels):
            sizes = level.sizes[head]
            count = int((sizes > 0).sum())
            assert (sizes[:count] > 0).all()
            assert int(sizes.sum()) == n
            assert int(level.offsets[head, -1]) == finer
            assert (level.offsets[head].diff()[:count] > 0).all()
            ends = sizes[:count].cumsum(0)
            if depth:
                below = layer.levels[depth - 1].sizes[head].cumsum(0)
                assert set(ends.tolist()) <= set(below.tolist())
            first = int(ends[-2]) if count > 1 else 0
            mean = layer.keys[head, first:n].mean(0)
            torch.testing.assert_close(level.centroids[head, count - 1], mean, rtol=1e-3, atol=1e-4)
            finer = count


def in_text_order(lm: PreTrainedModel, context: FixedContext) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values [kv_heads, tokens, head_dim], by the model's own cache."""
    with torch.inference_mode():
        cache = lm(context.ids[None], use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_the_tokens_and_the_seam_are_those_of_all_texts_together(chat: bool, count: int) -> None:
    lm = tiny.model("llama")
    found, expected = extended(lm, TEXTS[:count], chat), built(lm, TEXTS[:count], chat)
    assert torch.equal(found.ids, expected.ids)
    for name in ("text", "seam", "parts", "config", "model", "tokenizer"):
        assert getattr(found, name) == getattr(expected, name), name
    assert sum(found.extensions) == found.tokens - built(lm, TEXTS[:1], chat).tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sparsity_0_is_the_models_own_dense_generation_on_the_whole_text(family: str) -> None:
    lm = tiny.model(family)
    context = extended(lm, TEXTS[:3])
    inputs = context.inputs(TOKENIZER, [tiny.QUESTIONS[1]], sparsity=0.0)
    whole = torch.cat([context.ids[: inputs["past_key_values"].fixed_tokens], inputs["input_ids"][0]])[None]
    with torch.inference_mode():
        expected, dense = tiny.generate(lm, 24, input_ids=whole, attention_mask=torch.ones_like(whole))
        with attached(lm):
            found, logits = tiny.generate(lm, 24, **inputs)
    assert found.tolist() == expected.tolist()
    assert tiny.relative_error(logits[0], dense[0]) < 1e-3


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_after_each_extension_the_layout_holds(family: str, levels: int) -> None:
    lm = tiny.model(family)
    context = built(lm, TEXTS[:1], levels=levels, clusters=0.3, centroid_bits=16)
    for count in range(2, len(TEXTS) + 1):
        stay = context.tokens - sum(context.extensions) - tiny.BUILD.window - tiny.BUILD.sinks
        before = [layer.levels[0].sizes for layer in context.squeezed_layers]
        context = context.extend(lm, TOKENIZER, [TEXTS[count - 1]])
        order = in_text_order(lm, context)
        for number, layer in enumerate(context.layers):
            if isinstance(layer, ClusteredKeys):
                if family == "llama":
                    assert_layout_holds(layer, order[number], tiny.BUILD.sinks)
            else:
                fresh = built(lm, TEXTS[:count], levels=levels).layers[number]
                assert tiny.relative_error(layer.keys, fresh.keys) < 1e-4
                assert tiny.relative_error(layer.values, fresh.values) < 1e-4
        for sizes, layer in zip(before, context.squeezed_layers, strict=True):
            for head in range(len(sizes)):
                old = sizes[head][sizes[head].cumsum(0) <= stay]
                assert int(old.sum()) == stay
                assert torch.equal(layer.levels[0].sizes[head, : len(old)], old)  # what was built is as it was


@pytest.mark.parametrize("key_bits", [16, 8])
def test_old_clusters_keep_their_keys_in_8_bits_too(key_bits: int) -> None:
    lm = tiny.model("llama")
    before = built(lm, TEXTS[:1], key_bits=key_bits)
    after = before.extend(lm, TOKENIZER, [TEXTS[1]])
    for old, new in zip(before.squeezed_layers, after.squeezed_layers, strict=True):
        assert torch.equal(new.positions[:, : old.clustered], old.positions)
        if key_bits == 16:
            assert torch.equal(new.keys[:, : old.clustered], old.keys[:, : old.clustered])
            continue
        assert new.scales is not None
        assert old.scales is not None
        rows = [
            layer.scales.key_scale.unsqueeze(1) * layer.keys[:, : old.clustered] + layer.scales.key_centre.unsqueeze(1)
            for layer in (old, new)
            if layer.scales is not None
        ]
        assert float((rows[0] - rows[1]).abs().max()) <= 1.01 * float(new.scales.key_scale.max())


@pytest.mark.parametrize("calibration", ["questions", "window"])
def test_thresholds_are_set_anew(calibration: str) -> None:
    lm = tiny.model("llama")
    context = extended(lm, TEXTS[:2], calibration=calibration)
    fresh = built(lm, TEXTS[:2], calibration=calibration)
    assert torch.equal(context.curves.query_counts, fresh.curves.query_counts)
    assert not torch.equal(context.curves.log_thresholds, built(lm, TEXTS[:1]).curves.log_thresholds)
    inputs = context.inputs(TOKENIZER, [tiny.QUESTIONS[1]], sparsity=0.7, whole=False)
    with torch.inference_mode(), attached(lm):
        tiny.generate(lm, 8, **inputs)
    assert inputs["past_key_values"].prefill_usage.kept_fraction == pytest.approx(0.3, abs=0.12)


def test_several_texts_at_once_are_those_joined() -> None:
    lm = tiny.model("llama")
    together = built(lm, TEXTS[:1]).extend(lm, TOKENIZER, list(TEXTS[1:]))
    assert torch.equal(together.ids, built(lm, TEXTS).ids)


def test_small_extensions_are_clustered_together_and_a_long_one_by_itself() -> None:
    lm = tiny.model("llama")
    context = built(lm, TEXTS[:1])
    first = context.tokens
    for size in (200, 100, 100):
        context = context.extend(lm, TOKENIZER, [tiny.text(size, seed=size)])
    assert context.extensions == (context.tokens - first,)
    long = context.extend(lm, TOKENIZER, [tiny.text(1500, seed=9)]).extend(lm, TOKENIZER, ["the net"])
    assert len(long.extensions) == 2
    assert long.extensions[0] + long.extensions[1] + first == long.tokens


def test_rebuilding_is_advised_where_there_are_many_more_clusters_than_needed() -> None:
    lm = tiny.model("llama")
    context = built(lm, TEXTS[:1])
    assert rebuild_advice(context) is None
    context = context.extend(lm, TOKENIZER, [TEXTS[2]])
    assert rebuild_advice(context) is None
    # A short context has more clusters for its keys than a long one.
    fewer = replace(context, config=replace(context.config, clusters=0.05))
    assert f"a fresh build of its {context.tokens} tokens has" in (rebuild_advice(fewer) or "")


def test_what_can_not_be_added_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    lm = tiny.model("llama")
    context = built(lm, TEXTS[:1])
    for texts in ([], ["  "], ["the", "\n"]):
        with pytest.raises(InputError, match="no text to add"):
            context.extend(lm, TOKENIZER, texts)
    with pytest.raises(InputError, match="more than fit"):
        context.extend(lm, TOKENIZER, [tiny.text(9000)])
    with pytest.raises(InputError, match="another model"):
        context.extend(tiny.model("llama", seed=1), TOKENIZER, ["the net"])


def test_a_text_that_changes_more_tokens_than_the_window_has_is_refused() -> None:
    lm = tiny.model("llama")
    context = built(lm, TEXTS[:1])
    other = context.ids.clone()
    other[-tiny.BUILD.window - 2] += 1
    with pytest.raises(InputError, match=r"the last 26 tokens of the context change .* its window of 24"):
        replace(context, ids=other).extend(lm, TOKENIZER, ["the net"])


def test_longrope_keys_are_not_rotated_in_two_ways() -> None:
    config = tiny.FAMILIES["phi3-longrope"]()
    lm = tiny.from_config(config)
    short = FixedContext.from_text(lm, TOKENIZER, tiny.text(40), replace(tiny.BUILD, window=8))
    assert short.tokens < 128
    with pytest.raises(InputError, match="build the context again from all files"):
        short.extend(lm, TOKENIZER, [tiny.text(300)])


@pytest.mark.parametrize("family", FEW)
def test_a_folder_is_extended_as_a_context_in_memory_is(family: str, tmp_path: Path) -> None:
    lm = tiny.model(family)
    for name, text in zip(("a.txt", "b.txt", "c.txt"), TEXTS, strict=False):
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    first = FixedContext.build(lm, TOKENIZER, files[:1], tiny.BUILD)
    first.save(tmp_path / "manual")
    text, parts = read_files(files[1:])
    extend_into(tmp_path / "manual", lm, TOKENIZER, [text], parts)
    loaded = FixedContext.load(tmp_path / "manual", lm, TOKENIZER)
    in_memory = extend(first, lm, TOKENIZER, [text], parts)
    fresh = FixedContext.build(lm, TOKENIZER, files, tiny.BUILD)
    assert loaded.extensions == (fresh.tokens - first.tokens,)
    assert loaded.parts == in_memory.parts == fresh.parts
    assert loaded.extensions == in_memory.extensions
    assert torch.equal(loaded.curves.log_thresholds, in_memory.curves.log_thresholds)
    for a, b in zip(loaded.layers, in_memory.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt", "manual"]
    assert artifact.describe(tmp_path / "manual")["extensions"] == list(loaded.extensions)


def test_an_extension_that_fails_leaves_the_context_as_it_was(
    llama: PreTrainedModel, context: FixedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.save(tmp_path / "manual")
    before = {path.name: path.read_bytes() for path in (tmp_path / "manual").iterdir()}

    def fails(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("squeezed.context.calibrate", fails)
        with pytest.raises(KeyboardInterrupt):
            extend_into(tmp_path / "manual", llama, TOKENIZER, ["the net"])
    assert [path.name for path in tmp_path.iterdir()] == ["manual"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "manual").iterdir()} == before


def mass_recovered(layer: ClusteredKeys, queries: Tensor, scale: float, share: float) -> float:
    """Mean over queries and heads of the attention that falls on the best clusters with `share` of the keys."""
    level, (kv_heads, _, dim) = layer.levels[0], layer.keys.shape
    each = queries.transpose(0, 1).unsqueeze(2)
    scores = reference.score_centroids(each, level.centroids, level.sizes, scale, None, level.spread, layer.scales)
    best = scores.sort(dim=-1, descending=True).indices
    fits = level.sizes.expand_as(scores).gather(2, best).cumsum(-1) <= share * layer.clustered
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, fits)
    kept = reference.expand_to_children(chosen, level.offsets, layer.clustered)
    grouped = each.reshape(len(each), kv_heads, -1, dim)
    weights = (scale * grouped @ layer.keys[:, : layer.clustered].transpose(1, 2)).softmax(-1)
    return float((weights * kept.unsqueeze(2)).sum(-1).mean())


def observed(lm: PreTrainedModel, tokenizer: Any, context: FixedContext, question: str) -> list[Tensor]:
    """Each squeezed layer's queries [q_heads, tokens, head_dim] of a question to `context`, dense."""
    inputs = context.inputs(tokenizer, [question], dense=True)
    seen: list[list[Tensor]] = []
    for layer in inputs["past_key_values"].fixed_layers:
        layer.observed = []
        seen.append(layer.observed)
    with torch.inference_mode(), attached(lm):
        lm(**inputs)
    return [queries[0][0] for queries in seen]


@pytest.mark.model
def test_an_extended_context_selects_as_well_as_a_fresh_one() -> None:
    from squeezed.demo import manual_path
    from squeezed.models import load_model

    lm, tokenizer = load_model("demo")
    words = Path(manual_path()).read_text(encoding="utf-8").split(" ")
    texts = [" ".join(words[first:last]) for first, last in ((0, 300), (300, 400), (400, 480), (480, 560))]
    context = FixedContext.from_text(lm, tokenizer, texts[0])
    for text in texts[1:]:
        context = context.extend(lm, tokenizer, [text])
    fresh = FixedContext.from_text(lm, tokenizer, "\n\n".join(texts))
    queries = observed(lm, tokenizer, fresh, "Who is responsible for the pumps, and where are the spare parts kept?")
    scale = lm.config.head_dim**-0.5
    for share in (0.1, 0.3):
        found, expected = (
            sum(mass_recovered(layer, q, scale, share) for layer, q in zip(each.squeezed_layers, queries, strict=True))
            for each in (context, fresh)
        )
        assert found > 0.98 * expected
