"""Draws of questions learnt early or late: the published rule, matched pairs, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llm_unlearn.data.local_draws import CALIPER, pairs, questions
from llm_unlearn.data.loss_record import FILE, LossRecord, write_record
from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.splits import Scenario, draw_request, eval_splits, stored_questions, training_rows
from llm_unlearn.data.world import preset
from llm_unlearn.errors import UserError

N = 60
ROWS = tuple(
    QARow(f"Question {i}?", f"Answer {i}.", fact_id=f"a{i // 4}.q{i}", facts=(f"a{i // 4}.q{i}",), author=f"a{i // 4}")
    for i in range(N)
)
NEUTRAL = (QARow("Capital?", "Paris.", fact_id="world_facts.0", facts=("world_facts.0",), author="w"),)
CORPUS = Corpus(
    "toy", "tofu", {"train": (*ROWS, *NEUTRAL), "world_facts": NEUTRAL},
    {"forget_rows": [0, 1], "retain_eval_rows": list(range(20))},
)  # fmt: skip


def record(corpus=CORPUS, **changes) -> LossRecord:
    """Rows 0-19 fall by 0, 20-29 by .1, 30-59 by 1; the neutral row by 0."""
    n = len(corpus.split("train"))
    late = np.linspace(0.0, 0.3, n)
    fall = np.concatenate([np.zeros(20), np.full(10, 0.1), np.ones(30), np.zeros(n)])[:n]
    empty = np.zeros((2, 0))
    made = LossRecord(
        data=corpus.identity, exclude="none", epochs=np.array([2.0, 10.0]), loss=np.stack([late + fall, late]),
        right=np.zeros((2, n)), length=np.arange(n) % 20 + 3, frequency=np.arange(n) % 10 / 2,
        para_rows=np.array([], dtype=np.int64), para_loss=empty, para_right=empty,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    write_record(tmp_path, record())
    return tmp_path


def scenario(folder, kind="local_grok", **changes) -> Scenario:
    values = {"record": str(folder), "early_epoch": 2.0, "late_epoch": 10.0, "size": 5}
    return Scenario(kind=kind, **{**values, **changes})


@pytest.mark.parametrize(("kind", "those"), [("local_grok", range(20)), ("local_ungrok", range(30, 60))])
def test_the_rule_as_published(folder, kind, those):
    every = set()
    for seed in range(40):
        request = draw_request(CORPUS, scenario(folder, kind, seed=seed))
        assert len(request.forget) == 5
        assert request.forget == request.closure
        every.update(request.forget)
        assert not {row.fact_id for row in training_rows(CORPUS, request, "forget")} & request.facts
    assert every == set(those), "all of the group, whatever the data names as forget rows, and no neutral row"
    assert draw_request(CORPUS, scenario(folder, kind, seed=3)) == draw_request(CORPUS, scenario(folder, kind, seed=3))
    larger = draw_request(CORPUS, scenario(folder, kind, seed=3, size=9))
    assert set(draw_request(CORPUS, scenario(folder, kind, seed=3)).forget) < set(larger.forget)
    measured = eval_splits(CORPUS, larger)
    assert [row.fact_id for row in measured["forget"]] == [ROWS[i].fact_id for i in larger.forget]
    assert not set(measured["forget"]) & set(measured["retain"])


def test_a_small_rise_or_fall_is_no_fall(tmp_path):
    late = np.zeros(N + 1)
    early = late.copy()
    early[:4] = (0.0099, 0.0101, 0.5, 0.5001)
    write_record(tmp_path, record(loss=np.stack([early, late])))
    seen = questions(CORPUS, scenario(tmp_path), stored_questions(CORPUS))
    assert seen.group("local_ungrok").tolist() == [3]
    assert set(range(N)) - set(seen.group("local_grok").tolist()) == {1, 2, 3}


def test_the_wordings_of_a_question_count_as_one(tmp_path):
    world = world_corpus(preset("world12"), "world12")
    facts = stored_questions(world)
    first = {fact: i for i, fact in reversed(list(enumerate(facts))) if fact}
    early = np.zeros(len(facts))
    early[list(first.values())[:7]] = 1.2  # one of two wordings: the mean is .6
    zero = np.zeros(len(facts))
    write_record(
        tmp_path,
        record(world, loss=np.stack([early, zero]), right=np.zeros((2, len(facts))), length=zero, frequency=zero),
    )
    request = draw_request(world, scenario(tmp_path, "local_ungrok", size=7))
    assert request.facts == set(list(first)[:7])
    assert all(set(world.split("train")[i].facts) & request.facts for i in request.closure)
    assert len(request.closure) > len(request.forget) > 7, "both wordings, and the two-hop questions in the closure"


def test_matched_draws_are_two_sides_of_the_same_pairs(folder):
    match = ("frequency", "length", "loss")
    seen = questions(CORPUS, scenario(folder), stored_questions(CORPUS))
    a, b = pairs(seen, ("frequency", "length"))
    assert len(a) == len(b) == len(set(b)) == 20
    for name in ("frequency", "length"):
        values = seen.traits[name]
        spread = np.sqrt((values[:20].var(ddof=1) + values[30:60].var(ddof=1)) / 2)
        assert np.abs(values[a] - values[b]).max() <= CALIPER * spread + 1e-12
    draws = [
        draw_request(CORPUS, scenario(folder, kind, match=("frequency", "length"), seed=4)).forget
        for kind in ("local_grok", "local_ungrok")
    ]
    partner = dict(zip(a.tolist(), b.tolist(), strict=True))
    assert {partner[i] for i in draws[0]} == set(draws[1])
    with pytest.raises(UserError, match=r"size=5, but no pairs of questions alike in frequency, length, loss"):
        draw_request(CORPUS, scenario(folder, match=match))  # losses grow with the row: the groups do not overlap


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"record": None}, "needs scenario.record"),
        ({"record": "gone"}, f"gone: holds no {FILE}"),
        ({"early_epoch": 20.0}, r"has no epoch 20 \(it has 2, 10\)"),
        ({"size": 21}, r"size=21, but 20 questions whose loss falls by < 0.01"),
        ({"early_epoch": 10.0, "kind": "local_ungrok"}, r"size=5, but no questions whose loss falls by > 0.5"),
        ({"kind": "fact"}, "record and match are for local_grok and local_ungrok"),
    ],
)
def test_refusals_are_one_line(folder, changes, said):
    corpus = dataclasses.replace(CORPUS, meta={}) if changes.get("kind") == "fact" else CORPUS
    with pytest.raises(UserError, match=said) as error:
        draw_request(corpus, scenario(folder, **changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"data": "other"}, "is of other data than 'toy'"), ({"exclude": "forget"}, "trained without forget rows"),
     ({"right": np.zeros((2, 3))}, "is damaged")],
)  # fmt: skip
def test_records_of_something_else_are_refused(tmp_path, changes, said):
    write_record(tmp_path, record(**changes))
    with pytest.raises(UserError, match=said):
        draw_request(CORPUS, scenario(tmp_path))


def test_a_torn_record_is_refused(folder):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        draw_request(CORPUS, scenario(folder))
