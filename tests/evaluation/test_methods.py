"""Each method does what its paper says, and reads what its budget says."""

from __future__ import annotations

import methods_bench as bench
import pytest
import torch

from squeezed.errors import InputError
from squeezed.evaluation.methods import METHODS, Squeezed, find_method, title
from squeezed.evaluation.methods.actqkv import probe_query
from squeezed.evaluation.methods.base import keep_groups, keep_top
from squeezed.evaluation.methods.cascade import retained
from squeezed.evaluation.methods.clusters import segment_kmeans, spherical_kmeans
from squeezed.evaluation.methods.magicpig import MagicPig, sampling
from squeezed.evaluation.methods.multipole import Multipole
from squeezed.evaluation.methods.quest import Quest
from squeezed.evaluation.methods.recycled import Recycled
from squeezed.evaluation.methods.retroinfer import RetroInfer
from squeezed.evaluation.methods.tokenselect import TokenSelect, chosen_at

CHOOSING = [name for name, method in METHODS.items() if not isinstance(method, Squeezed)]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_budget_of_one_is_dense_attention(name: str) -> None:
    context = bench.layer()
    query = bench.queries(context)
    output, lse, _ = bench.attend(context, METHODS[name], query, 1.0)
    expected, logits = bench.dense(context, query)
    assert torch.allclose(output.double(), expected, atol=1e-4)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_token_selects_for_itself_however_it_is_batched(name: str) -> None:
    context = bench.layer(tokens=600)
    query = bench.queries(context, 24)
    together = bench.attend(context, METHODS[name], query, 0.3)
    alone = bench.attend(context, METHODS[name], query, 0.3, one_by_one=True)
    for found, expected in zip(together, alone, strict=True):
        assert torch.allclose(found.double(), expected.double(), atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CHOOSING if name not in ("full", "magicpig", "tokenselect")])
@pytest.mark.parametrize("budget", [0.2, 0.35])
def test_the_realised_budget_is_the_one_asked_for_or_less(name: str, budget: float) -> None:
    context = bench.layer(tokens=2000)
    stride = METHODS[name].settings(budget) if name == "recycled" else 1
    _, _, read = bench.attend(context, METHODS[name], bench.queries(context, 4 * stride), budget)
    # Random keys are that many on average only; whole pages and clusters leave a part of the budget unused.
    assert float(read.mean()) <= budget * (1.05 if name == "random" else 1.001)
    assert float(read.mean()) >= budget * 0.6


@pytest.mark.parametrize("name", ["magicpig", "tokenselect"])
def test_methods_that_calibrate_come_near_their_budget(name: str) -> None:
    context = bench.layer(tokens=2000)
    # The queries that calibrate are those that ask: only then can the budget be expected to hold.
    _, _, read = bench.attend(context, METHODS[name], context.queries.unsqueeze(0), 0.3)
    assert 0.1 <= float(read.mean()) <= 0.36


def test_what_is_kept_is_attended_exactly() -> None:
    context = bench.layer()
    query = bench.queries(context)
    output, _, _ = bench.attend(context, METHODS["streaming"], query, 0.3)
    kept = torch.zeros(context.keys.shape[1], dtype=torch.bool)
    kept[:4] = True
    kept[-20 - context.affordable(0.3, 0) :] = True
    _, logits = bench.dense(context, query)
    weights = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    values = context.values.double().repeat_interleave(3, 0)
    assert torch.allclose(output.double(), weights @ values, atol=1e-5)


@pytest.mark.parametrize("page", [1, 7, 16])
def test_quests_bound_is_never_below_a_pages_highest_logit(page: int) -> None:
    context = bench.layer(tokens=333)
    query = bench.queries(context)
    method = Quest(page=page)
    state = method.prepare_layer(context, page)
    grouped = query.view(1, 2, 3, *query.shape[2:]).transpose(0, 1)
    bounds = method.bounds(state, grouped, context.scale)
    _, logits = bench.dense(context, query)
    logits = logits.view(2, 1, 3, -1, context.keys.shape[1])[..., context.inner]
    for number in range(bounds.shape[-1]):
        highest = logits[..., number * page : (number + 1) * page].amax(-1)
        assert (bounds[..., number] >= highest - 1e-5).all()
        if page == 1:
            assert torch.allclose(bounds[..., number].double(), highest, atol=1e-5)


def test_quest_takes_the_pages_with_the_highest_bounds() -> None:
    context = bench.layer(tokens=4 + 64 + 20, kv_heads=1, group=1)
    query = bench.queries(context, 1)
    method = Quest(page=16)
    bounds = method.bounds(method.prepare_layer(context, 16), query.view(1, 1, 1, 1, -1), SCALE := bench.SCALE)
    best = int(bounds.argmax())
    always = (4 + 20) / 88
    output, _, _ = bench.attend(context, method, query, always + (16 + 4 + 1) / 88)  # one page and four bounds
    keep = [*range(4), *range(4 + 16 * best, 20 + 16 * best), *range(68, 88)]
    weights = (SCALE * query[0, 0].double() @ context.keys[0, keep].double().T).softmax(-1)
    assert torch.allclose(output[0].double(), weights @ context.values[0, keep].double(), atol=1e-5)


@pytest.mark.parametrize("method", [Multipole(keys_per_cluster=1), RetroInfer(keys_per_cluster=1, estimated=1.0)])
def test_stand_ins_for_clusters_of_one_key_change_nothing(method: Multipole | RetroInfer) -> None:
    context = bench.layer()
    query = bench.queries(context)
    output, lse, read = bench.attend(context, method, query, 0.9)
    expected, logits = bench.dense(context, query)
    assert torch.allclose(output.double(), expected, atol=1e-4)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-4)
    assert float(read.max()) > 0.9  # keys twice over


def test_multipole_counts_every_key_once() -> None:
    """With equal keys in a cluster a stand-in is exact: N_i exp(s q.C_i) is the sum over its keys."""
    context = bench.layer(tokens=4 + 60 + 20, kv_heads=1, group=1)
    keys = context.keys.clone()
    keys[:, 4:64] = keys[:, 4:24].repeat_interleave(3, 1)
    context = bench.replace(context, keys=keys)
    method = Multipole(keys_per_cluster=3)
    query = bench.queries(context)
    for budget in (0.4, 0.7):
        output, lse, _ = bench.attend(context, method, query, budget)
        expected, logits = bench.dense(context, query)
        assert torch.allclose(output.double(), expected, atol=1e-4)
        assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-4)


def test_retroinfer_drops_what_is_in_neither_zone() -> None:
    context = bench.layer(tokens=1200)
    query = bench.queries(context)
    _, full = bench.dense(context, query)
    # The budget grows by what the estimates cost, so that the same clusters are read exactly each time.
    lses = [
        bench.attend(context, RetroInfer(keys_per_cluster=16, estimated=share), query, 0.2 + share / 32)[1]
        for share in (0.0, 0.2, 1.0)
    ]
    missed = [float((full.logsumexp(-1) - lse.double()).abs().mean()) for lse in lses]
    assert missed[0] > missed[1] > missed[2]


def test_segments_are_clustered_by_themselves() -> None:
    keys = bench.layer(tokens=500).keys
    labels, count = segment_kmeans(keys, 10, 200)
    assert count == 20 + 20 + 10
    first, second, rest = labels[:, :200], labels[:, 200:400], labels[:, 400:]
    assert int(first.max()) < 20 <= int(second.min())
    assert int(second.max()) < 40 <= int(rest.min())


def test_clusters_hold_keys_that_are_alike() -> None:
    keys = bench.layer(tokens=400).keys
    labels = spherical_kmeans(keys, 12)
    rows = torch.nn.functional.normalize(keys, dim=-1)
    similar = rows @ rows.transpose(1, 2)
    same = labels.unsqueeze(1) == labels.unsqueeze(2)
    assert similar[same].mean() > similar[~same].mean() + 0.5


def test_lsh_estimates_are_unbiased_over_seeds() -> None:
    """The sampled, reweighted sum of exp(logit) is on average the whole sum: that is what dividing by u is for."""
    context = bench.layer(tokens=4 + 100 + 20, kv_heads=1, group=1)
    query = bench.queries(context, 1)
    _, logits = bench.dense(context, query)
    whole = float(logits.logsumexp(-1).exp())
    sums = torch.stack(
        [bench.attend(context, MagicPig(bits=2, tables=8, seed=seed), query, 0.5)[1].exp() for seed in range(400)]
    ).flatten()
    assert abs(float(sums.mean()) - whole) < 4 * float(sums.std()) / 400**0.5
    assert float(sums.std()) < 0.5 * whole  # otherwise the test could not fail


@pytest.mark.parametrize(("given", "bits", "tables"), [({"bits": 5}, 5, None), ({"tables": 10}, None, 10)])
def test_lsh_chooses_only_what_it_was_not_given(given: dict[str, int], bits: int | None, tables: int | None) -> None:
    context = bench.layer(tokens=4 + 100 + 20, kv_heads=1, group=1)
    made = MagicPig(**given).prepare([context], 0.4)[0]
    assert bits in (None, made.bits)
    assert tables in (None, made.planes.shape[1] // made.bits)


def test_the_chance_of_being_sampled_is_that_of_two_hits() -> None:
    hit, tables = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64), 5
    hits = torch.rand(200_000, tables, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < hit
    assert torch.allclose(sampling(hit, tables), (hits.sum(1) >= 2).double().mean(0), atol=5e-3)


def test_recycled_attention_reads_everything_at_stride_steps_and_the_same_keys_in_between() -> None:
    context = bench.layer(kv_heads=1, group=1)
    query = bench.queries(context, 13)
    output, _, read = bench.attend(context, Recycled(stride=5), query, 0.5)
    expected, logits = bench.dense(context, query)
    for place in range(13):
        if place % 5 == 0:
            assert float(read[place]) == pytest.approx(1.0)
            assert torch.allclose(output[:, place].double(), expected[:, place], atol=1e-5)
            continue
        assert float(read[place]) < 0.4
        inner = logits[0, place - place % 5, context.inner]
        tokens = context.affordable((0.5 - 0.2) / 0.8, 0)
        kept = torch.ones(400, dtype=torch.bool)
        kept[context.inner] = inner >= inner.topk(tokens).values[-1]
        weights = logits[0, place].masked_fill(~kept, -torch.inf).softmax(-1)
        assert torch.allclose(output[0, place].double(), weights @ context.values[0].double(), atol=1e-5)


@pytest.mark.parametrize("similarity", [-1.1, 0.0, 0.5, 0.9, 1.1])
def test_a_selection_is_reused_while_the_query_stays_similar(similarity: float) -> None:
    rows = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)
    found = chosen_at(rows, torch.tensor(similarity))
    for batch in range(2):
        last = 0
        for place in range(40):
            cosine = torch.nn.functional.cosine_similarity(rows[batch, last], rows[batch, place], dim=0)
            expected = place == 0 or (place > last and float(cosine) <= similarity)
            last = place if expected else last
            assert bool(found[batch, place]) is expected


def test_tokenselect_pays_for_all_keys_whenever_it_chooses() -> None:
    context = bench.layer()
    query = bench.queries(context, 10)
    _, _, always = bench.attend(context, TokenSelect(similarity=2.0), query, 0.3)
    _, _, once = bench.attend(context, TokenSelect(similarity=-1.1), query, 0.3)
    assert (always >= 0.5 + 0.29).all()
    assert float(once[0]) >= 0.5 + 0.29
    assert (once[1:] <= 0.3).all()


def test_all_heads_of_a_layer_read_the_tokens_with_most_votes() -> None:
    context = bench.layer()
    query = bench.queries(context, 1)
    output, _, _ = bench.attend(context, TokenSelect(similarity=2.0), query, 0.4)
    _, logits = bench.dense(context, query)
    votes = logits.softmax(-1)[..., context.inner].sum(0)[0]
    kept = torch.ones(400, dtype=torch.bool)
    kept[context.inner] = votes >= votes.topk(context.affordable(0.4, 0)).values[-1]
    weights = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    assert torch.allclose(output.double(), weights @ context.values.double().repeat_interleave(3, 0), atol=1e-5)


def test_a_cascade_thins_out_with_age_and_keeps_what_was_attended() -> None:
    scores = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    kept = retained(scores, 200, 4)
    assert kept.sum(1).tolist() == [200, 200]
    counts = [
        int(kept[0, begin:end].sum()) for begin, end in ((950, 1000), (850, 950), (650, 850), (250, 650), (0, 250))
    ]
    assert counts == [50, 50, 50, 50, 0]
    for first in range(850, 950, 2):
        assert bool(kept[0, first]) is bool(scores[0, first] >= scores[0, first + 1])


def test_a_cascade_uses_all_of_its_room_in_a_short_text() -> None:
    assert retained(torch.rand(1, 100), 100, 4).all()
    assert int(retained(torch.rand(1, 100), 60, 4).sum()) >= 55


def test_the_oracle_recovers_more_mass_than_any_method_that_only_drops_keys() -> None:
    context = bench.layer(tokens=2000)
    query = bench.queries(context)
    best = bench.attend(context, METHODS["oracle"], query, 0.2)[1].view(2, 3, -1).exp().mean(1)
    for name in ("quest", "streaming", "cascade", "random", "actqkv"):
        other = bench.attend(context, METHODS[name], query, 0.2)[1].view(2, 3, -1).exp().mean(1)
        assert (best.mean(-1) > other.mean(-1)).all(), name


def test_the_probe_query_of_equal_queries_is_that_query_and_an_outlier_dominates() -> None:
    same = torch.ones(1, 1, 1, 6, 8)
    places = torch.arange(6).unsqueeze(0)
    assert torch.allclose(probe_query(same, places, 4), same)
    odd = same.clone()
    odd[0, 0, 0, 3] = -5.0
    probe = probe_query(odd, places, 4)[0, 0, 0]
    assert torch.allclose(probe[2], same[0, 0, 0, 2])  # not there yet
    assert (probe[3] < -2).all()
    assert (probe[5] < -2).all()  # still among the recent ones


def test_random_keys_are_the_asked_share_and_differ_by_token() -> None:
    context = bench.layer(tokens=4000)
    _, lse, read = bench.attend(context, METHODS["random"], bench.queries(context, 1).expand(-1, -1, 8, -1), 0.25)
    assert float(read.mean()) == pytest.approx(0.25, rel=0.05)
    assert len(set(lse[0].tolist())) == 8


def test_keep_top_and_keep_groups_keep_what_fits() -> None:
    scores = torch.tensor([0.1, 0.5, 0.3, 0.4]).view(1, 1, 1, 1, 4)
    assert keep_top(scores, [2]).flatten().tolist() == [False, True, False, True]
    assert not keep_top(scores, [0]).any()
    assert keep_top(scores, [9]).all()
    sizes = torch.tensor([[5, 3, 2, 4]])
    assert keep_groups(scores, sizes, [7]).flatten().tolist() == [False, True, False, True]
    assert not keep_groups(scores, sizes, [2]).any()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("nonsense", "no method"),
        ("quest:size=3", "no option 'size'"),
        ("quest:page=x", "expected an int"),
        ("quest:page=-4", "page is -4: expected 0 or more"),
        ("actqkv:page=0", "page is 0: expected 1 or more"),
        ("multipole:keys_per_cluster=nan", "keys_per_cluster is nan: expected 0 or more"),
    ],
)
def test_a_method_that_does_not_exist_is_refused_in_one_line(spec: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        find_method(spec)
    assert "\n" not in str(caught.value)


def test_methods_take_options_and_say_so() -> None:
    assert find_method("quest:page=32:per_head=true") == Quest(page=32, per_head=True)
    ours = find_method("squeezed-paper:clusters=0.1:levels=2")
    assert isinstance(ours, Squeezed)
    assert (ours.config.clusters, ours.config.levels, ours.config.sinks) == (0.1, 2, 0)
    assert title("quest:page=32") == "QUEST page=32"


def test_every_method_cites_its_paper() -> None:
    for name, method in METHODS.items():
        assert "arXiv" in method.paper or method.bound or name == "random", name
