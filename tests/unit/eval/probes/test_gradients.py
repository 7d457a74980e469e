"""Gradient alignment against gradients written out by hand, its null, and who is compared with whom."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import ImageRow, Picture
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.splits import Scenario, draw_request
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.draws import Draw, draw_groups, kinship, stratum
from llm_unlearn.eval.probes.gradients import gradient_alignment, groups_of, item_gradients, pair_cosines
from llm_unlearn.eval.probes.passes import cross_entropy, margin_loss, mean_gradients, trained_weights
from llm_unlearn.models.causal import AnswerModel


def by_hand(model, items, push):
    """Gradient of a mean loss of the two-layer net, from the chain rule: `push` maps logits, labels to dL/dlogits."""
    _, first, _, second = model.lm
    with torch.no_grad():
        x_BI = torch.from_numpy(np.stack([item.pixels for item in items])).flatten(1).double()
        labels = torch.tensor([item.label for item in items])
        z_BH = x_BI @ first.weight.double().T + first.bias.double()
        h_BH = z_BH.clamp(min=0)
        logits_BV = h_BH @ second.weight.double().T + second.bias.double()
        push_BV = push(logits_BV, torch.nn.functional.one_hot(labels, 3).double()) / len(items)
        back_BH = (push_BV @ second.weight.double()) * (z_BH > 0)
        parts = (back_BH.T @ x_BI, back_BH.sum(0), push_BV.T @ h_BH, push_BV.sum(0))
    return torch.cat([part.flatten() for part in parts])


def ce_push(logits, right):
    return logits.softmax(-1) - right


def margin_push(_logits, right):
    return (1 - right) / 2 - right  # of (sum - z_y) / 2 - z_y, with 3 classes


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def whole(n_forget, n_retain, n=None):
    """One draw that takes the forget items and the first and last half of retain."""
    half = n or n_retain // 2
    return [Draw(tuple(range(n_forget)), tuple(range(half)), tuple(range(half, 2 * half)), 1.0)]


def test_cosines_of_every_variant_are_those_of_the_chain_rule(two_layers, pictures):
    forget, retain = pictures(5, 1), pictures(10, 2)
    squares = [torch.rand_like(w) + 0.1 for w in trained_weights(two_layers).values()]
    found = gradient_alignment(two_layers, forget, retain, whole(5, 10), squares)
    with torch.no_grad():
        logits = two_layers(collate(forget).inputs, torch.arange(5)).double()
    scale = float(logits.sub(logits.mean(-1, keepdim=True)).square().mean(-1).mean().sqrt())
    assert found["logit_std"] == pytest.approx(scale, rel=1e-5)
    root = torch.cat([v.flatten() for v in squares]).double().sqrt()
    pushes = {
        "ce": (ce_push, 1.0),
        "margin": (margin_push, 1.0),
        "temperature": (lambda z, right: ((z / scale).softmax(-1) - right) / scale, 1.0),
        "adam": (ce_push, root),
    }
    assert set(found["variants"]) == set(pushes)
    for variant, (push, divide) in pushes.items():
        f, a, b = (by_hand(two_layers, group, push) / divide for group in (forget, retain[:5], retain[5:]))
        got = found["variants"][variant]["all"]
        assert got["cos_FR"] == pytest.approx(cosine(f, a), abs=1e-6), variant
        assert got["cos_RR"] == pytest.approx(cosine(a, b), abs=1e-6)
        assert got["excess"] == pytest.approx(cosine(f, a) - cosine(a, b), abs=1e-6)
        assert got["cos_pooled"] == pytest.approx(cosine(f, a + b), abs=1e-6)
        assert got["angle_FR"] == pytest.approx(np.degrees(np.arccos(cosine(f, a))), abs=1e-3)
        assert got["norm_F"] == pytest.approx(float(f.norm()), rel=1e-5)
        assert got["norm_ratio"] == pytest.approx(float(f.norm() / a.norm()), rel=1e-5)
        assert got["collateral"] == pytest.approx(float(f @ a), rel=1e-4)


def test_groups_of_weights_add_up(two_layers, pictures):
    groups = gradient_alignment(two_layers, pictures(5, 1), pictures(10, 2), whole(5, 10))["variants"]["ce"]
    assert set(groups) == {"all", "1", "3"}, "the two linear layers, by their place"
    assert groups["all"]["norm_F"] ** 2 == pytest.approx(groups["1"]["norm_F"] ** 2 + groups["3"]["norm_F"] ** 2)
    assert groups["all"]["collateral"] == pytest.approx(groups["1"]["collateral"] + groups["3"]["collateral"])


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("model.layers.0.self_attn.q_proj.weight", ("all", "model.layers.0", "model.layers.0.self_attn")),
        ("model.layers.11.input_layernorm.weight", ("all", "model.layers.11", "model.layers.11.input_layernorm")),
        ("model.embed_tokens.weight", ("all", "model.embed_tokens")),
        ("features.0.bias", ("all", "features.0")),
    ],
)
def test_groups_are_blocks_and_their_parts(name, groups):
    assert groups_of(name) == groups


def test_the_sign_is_kept(two_layers, pictures):
    """Items whose labels are pushed down by what pushes the others up."""
    same = pictures(1)[0]
    retain = [Picture(same.pixels, 0)] * 8
    forget = [Picture(same.pixels, 1)] * 4
    found = gradient_alignment(two_layers, forget, retain, whole(4, 8))["variants"]["margin"]["all"]
    assert found["cos_FR"] < -0.2
    assert found["collateral"] < 0
    assert found["cos_RR"] == pytest.approx(1)


def test_first_order_collateral_is_the_damage_of_a_small_step(two_layers, pictures):
    forget, retain = pictures(6, 4), pictures(12, 5)
    collateral = gradient_alignment(two_layers, forget, retain, whole(6, 12))["variants"]["ce"]["all"]["collateral"]
    first = retain[:6]
    gradient, eta = mean_gradients(two_layers, forget, [cross_entropy])[0], 1e-4

    def loss():
        batch = collate(first)
        logits = two_layers.double()(batch.inputs.double(), batch.index_N).detach()
        return float(torch.nn.functional.cross_entropy(logits, batch.labels_N))

    before = loss()
    with torch.no_grad():
        for w, g in zip(two_layers.parameters(), gradient, strict=True):
            w.add_(eta * g)
    assert (loss() - before) / eta == pytest.approx(collateral, rel=2e-2)


def test_rows_drawn_alike_lie_within_the_null_of_a_language_model(tiny_lm, tiny_world, tiny_items):
    """Forget rows that are a random sample of what is kept are nothing special, before and after training."""
    train = tiny_world.split("train")
    numbers = [int(i) for i in np.random.default_rng(0).permutation(len(train))]
    f, r = numbers[:20], numbers[20:]
    draws = draw_groups([train[i] for i in f], [train[i] for i in r], 10, 0)
    found = gradient_alignment(
        AnswerModel(tiny_lm), [tiny_items[i] for i in f], [tiny_items[i] for i in r], draws
    )["variants"]["ce"]["all"]  # fmt: skip
    low, _, high = found["null_quantiles"]
    assert low - 0.05 < found["cos_FR"] < high + 0.05
    assert abs(found["excess"]) < 0.1


def test_margin_loss_is_minus_the_margin_over_the_mean_of_the_others():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -2.0]])
    assert margin_loss(logits, torch.tensor([0, 2])).tolist() == [-1.5, 4.5]


def test_language_gradients_do_not_depend_on_batches(tiny_lm, tiny_items):
    model = AnswerModel(tiny_lm)
    some = tiny_items[:12]
    together = mean_gradients(model, some, [cross_entropy])[0]
    total = sum(item.n_answer for item in some)
    alone = [[g * item.n_answer / total for g in mean_gradients(model, [item], [cross_entropy])[0]] for item in some]
    for whole_g, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole_g, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-6)


def test_item_gradients_and_their_mean_squares(two_layers, pictures):
    items = pictures(6)
    rows, squares = item_gradients(two_layers, items, seed=0)
    mine = torch.stack([by_hand(two_layers, [item], ce_push) for item in items])
    torch.testing.assert_close(rows.double(), mine, rtol=1e-4, atol=1e-6)
    v = torch.cat([s.flatten() for s in squares]).double()
    torch.testing.assert_close(v, mine.square().mean(0), rtol=1e-4, atol=1e-7)


def test_sketched_cosines_are_near_the_exact_ones(tiny_lm, tiny_items):
    model = AnswerModel(tiny_lm)
    exact, sketched = (item_gradients(model, tiny_items[:12], seed=1, exact_floats=n)[0] for n in (1 << 28, 0))
    assert sketched.shape == (12, 4096)
    a, b = (torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
            for rows in (exact, sketched))  # fmt: skip
    assert (a - b).abs().max() < 6 / 4096**0.5, "six standard errors"
    assert (a - b).abs().max() > 0, "it is a sketch"


def test_pairs_are_sorted_by_kin_and_by_set():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    rows = [QARow(f"q{i}", "a", author=who, relation=r) for i, (who, r) in enumerate(["ax", "ay", "by", "cx"])]
    found = pair_cosines(gradients, rows, n_forget=2)
    assert found["all"] == {"mean": pytest.approx(-1 / 6), "mean_abs": pytest.approx(3 / 6), "pairs": 6}
    assert found["same_author"] == {"mean": -1.0, "mean_abs": 1.0, "pairs": 1}
    assert found["same_relation"] == {"mean": pytest.approx(0.5), "mean_abs": pytest.approx(0.5), "pairs": 2}
    assert found["other"]["pairs"] == 3
    assert {k: found[k]["pairs"] for k in ("FF", "FR", "RR")} == {"FF": 1, "FR": 4, "RR": 1}


def test_a_gradient_of_zero_has_no_cosine():
    rows = [QARow(f"q{i}", "a") for i in range(3)]
    found = pair_cosines(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), rows, 1)
    assert found["all"]["pairs"] == 1
    with pytest.raises(UserError, match="no two items have a gradient"):
        pair_cosines(torch.zeros(3, 2), rows, 1)


def test_kin_of_images_are_those_of_a_class(picture_rows, pictures):
    a, b = ImageRow("train/0", "c1"), ImageRow("train/1", "c1")
    assert kinship(a, b) == "same_class"
    assert kinship(a, ImageRow("train/2", "c2")) == "other"
    assert stratum(a) == ("c1",)


# ------------------------------------------------------------------------------------------------ draws
def test_groups_are_made_like_a_forget_set_of_whole_authors(tiny_world):
    request = draw_request(tiny_world, Scenario(size=2))
    train = tiny_world.split("train")
    forget, retain = [train[i] for i in request.forget], [train[i] for i in request.retain]
    for draw in draw_groups(forget, retain, 20, seed=0):
        first, second = ([retain[i] for i in group] for group in (draw.first, draw.second))
        assert draw.matched == 1
        for group in (first, second):
            assert Counter(row.relation for row in group) == Counter(row.relation for row in forget)
            whole = Counter(row.author for row in group).most_common(2)
            assert sum(n for _, n in whole) >= 0.8 * len(group), "two authors, and who stands in for what they lack"
        assert {row.author for row in first}.isdisjoint(row.author for row in second)


def test_scattered_rows_are_compared_with_scattered_rows(tiny_world):
    train = tiny_world.split("train")
    numbers = np.random.default_rng(0).permutation(len(train))
    forget, retain = [train[i] for i in numbers[:20]], [train[i] for i in numbers[20:]]
    draws = draw_groups(forget, retain, 5, seed=0)
    assert all(len({retain[i].author for i in draw.first}) > 4 for draw in draws)


def test_a_forgotten_class_is_compared_with_single_classes():
    rows = [ImageRow(f"train/{i}", f"c{i % 5}", author=f"train/{i}", relation="class") for i in range(100)]
    forget, retain = ([row for row in rows if (row.answer == "c0") == gone] for gone in (True, False))
    seen = set()
    for draw in draw_groups(forget, retain, 8, 0):
        first, second = ({retain[i].answer for i in group} for group in (draw.first, draw.second))
        assert len(first) == len(second) == 1
        assert first != second
        assert len(draw.first) == len(draw.second) == len(draw.forget) == 20
        assert draw.matched == 0, "no kept row is of the forgotten class"
        seen |= first
    assert len(seen) > 2


def test_some_images_of_each_class_are_compared_within_classes():
    rows = [ImageRow(f"train/{i}", f"c{i % 5}", author=f"train/{i}", relation="class") for i in range(100)]
    forget, retain = rows[:15], rows[15:]
    for draw in draw_groups(forget, retain, 4, 0):
        for group in (draw.first, draw.second):
            assert Counter(retain[i].answer for i in group) == Counter(row.answer for row in forget)


@pytest.mark.parametrize("gone", [20, 12, 31])
def test_a_share_of_two_classes_is_compared_within_these_classes(gone):
    """All three groups are of one composition: half of what is kept of a class, each, and no more of the forgotten."""
    rows = [ImageRow(f"train/{i}", f"c{i % 10}", author=f"train/{i}", relation="class") for i in range(400)]
    members = {name: [i for i in range(400) if rows[i].answer == name] for name in ("c3", "c7")}
    asked = {*members["c3"][:gone], *members["c7"][:20]}
    forget, retain = [rows[i] for i in sorted(asked)], [row for i, row in enumerate(rows) if i not in asked]
    for draw in draw_groups(forget, retain, 6, 0):
        kinds = [Counter(forget[i].answer for i in draw.forget)]
        kinds += [Counter(retain[i].answer for i in group) for group in (draw.first, draw.second)]
        assert kinds[0] == kinds[1] == kinds[2] == {"c3": min(gone, (40 - gone) // 2), "c7": 10}
        assert not set(draw.first) & set(draw.second)
        assert draw.matched == 1


def test_the_whole_sets_have_a_cosine_of_their_own(two_layers, pictures):
    """The published number: all that is forgotten with all that is kept, whatever the groups."""
    forget, retain = pictures(5, 1), pictures(30, 2)
    found = gradient_alignment(two_layers, forget, retain, whole(3, 10))
    want = cosine(by_hand(two_layers, forget, ce_push), by_hand(two_layers, retain, ce_push))
    assert found["cos_whole"] == pytest.approx(want, abs=1e-6)


def test_a_forgotten_relation_is_compared_with_single_relations(tiny_world):
    request = draw_request(tiny_world, Scenario(kind="relation", relation="genre"))
    train = tiny_world.split("train")
    forget, retain = [train[i] for i in request.forget], [train[i] for i in request.retain]
    for draw in draw_groups(forget, retain, 8, 0, max_rows=12):
        for group in (draw.first, draw.second):
            assert len({retain[i].relation for i in group}) == 1
            assert {retain[i].hop for i in group} == {1}


def test_fewer_rows_than_the_forget_set_are_of_whole_authors_too(tiny_world):
    request = draw_request(tiny_world, Scenario(size=4))
    train = tiny_world.split("train")
    forget, retain = [train[i] for i in request.forget], [train[i] for i in request.retain]
    draws = draw_groups(forget, retain, 3, 0, max_rows=20)
    assert len({forget[i].author for i in draws[0].forget}) == 2
    assert len({draw.forget for draw in draws}) == 1


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=3, max_size=60),
    share=st.floats(0.05, 0.9),
    most=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_groups_are_disjoint_and_of_one_size(kinds, share, most, seed):
    rows = [QARow(f"q{i}", "a", author=f"a{who}", relation=f"r{r}") for i, (r, who) in enumerate(kinds)]
    cut = min(max(1, int(share * len(rows))), len(rows) - 2)
    forget, retain = rows[:cut], rows[cut:]
    draws = draw_groups(forget, retain, 3, seed, most)
    assert draws == draw_groups(forget, retain, 3, seed, most)
    most_rows = min(len(forget), len(retain) // 2, most)
    there = Counter(row.relation for row in retain)
    for draw in draws:
        n = len(draw.forget)
        assert 1 <= n <= most_rows
        for group, of in ((draw.forget, forget), (draw.first, retain), (draw.second, retain)):
            assert len(set(group)) == len(group) == n
            assert all(0 <= i < len(of) for i in group)
        assert not set(draw.first) & set(draw.second)
        assert list(draw.forget) == sorted(draw.forget)
        wanted = Counter(forget[i].relation for i in draw.forget)
        for group in (draw.first, draw.second):
            had = Counter(retain[i].relation for i in group)
            for key, count in wanted.items():
                assert had[key] >= count or not there[key] or not draw.matched, "of one composition"
        alone = all(there[row.relation] < 2 for row in forget)
        # fewer rows than there are may all be of a stratum that is not kept
        assert draw.matched or alone or n == most, "a stratum kept twice is compared within"


def test_an_empty_forget_set_is_told():
    rows = [QARow("q", "a")] * 3
    with pytest.raises(UserError, match="forget set is empty; give data"):
        draw_groups([], rows, 2, 0)
    with pytest.raises(UserError, match="at least 2"):
        draw_groups(rows, rows[:1], 2, 0)
