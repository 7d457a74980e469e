"""Forget requests: what is drawn, and that everything which needs it leaves training with it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.ledger import LedgerConfig, ledger_corpus
from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Scenario, closure_counts, draw_request, eval_splits, owners, training_rows
from llm_unlearn.data.world import make_world, preset
from llm_unlearn.errors import UserError

WORLD = world_corpus(preset("world12"), "world12")
TRAIN = WORLD.split("train")
FACTS = make_world(preset("world12")).facts
SCENARIOS = st.one_of(
    st.builds(lambda n, s: Scenario(kind="author", size=n, seed=s), st.integers(1, 6), st.integers(0, 99)),
    st.builds(lambda n, s: Scenario(kind="fact", size=n, seed=s), st.integers(1, 30), st.integers(0, 99)),
    st.builds(lambda n, s: Scenario(kind="random", size=n, seed=s), st.integers(1, 90), st.integers(0, 99)),
    st.builds(lambda r: Scenario(kind="relation", relation=r), st.sampled_from(["mentor", "editor", "genre"])),
)


def stored_facts_needed(row) -> set[str]:
    """The facts a question takes, read off its own identity and the world: not through `row.facts`."""
    if row.relation in ("real_authors", "world_facts"):
        return set()
    if row.relation.endswith("^-1"):  # "Whose editor is X?": the fact of whoever has X as editor
        relation = row.relation.removesuffix("^-1")
        asked = row.fact_id.split(".")[0]
        return {f"{a}.{relation}" for a in FACTS if FACTS[a][relation].value == asked and a in WORLD.meta["authors"]}
    here, needed = row.fact_id.split(".")[0], set()
    for relation in row.fact_id.split(".")[1:]:
        needed.add(f"{here}.{relation}")
        here = FACTS[here][relation].value
    return needed


NEEDED = [stored_facts_needed(row) for row in TRAIN]


def brute_force(request) -> tuple[set[int], set[int]]:
    """(forget, closure) from the drawn ids and the definition."""
    gone, kind = request.facts, request.scenario.kind
    plain = [row.hop == 1 and not row.relation.endswith("^-1") for row in TRAIN]
    if kind == "random":
        forget = {i for i, row in enumerate(TRAIN) if row.fact_id in gone}
    else:
        forget = {i for i, row in enumerate(TRAIN) if plain[i] and NEEDED[i] & gone}
    return forget, forget | {i for i in range(len(TRAIN)) if NEEDED[i] & gone}


@settings(max_examples=60, deadline=None)
@given(SCENARIOS)
def test_closure_is_the_definition(scenario):
    request = draw_request(WORLD, scenario)
    forget, closure = brute_force(request)
    assert set(request.forget) == forget
    assert set(request.closure) == closure
    assert forget <= closure
    assert sorted([*request.closure, *request.retain]) == list(range(len(TRAIN)))
    assert list(request.forget) == sorted(set(request.forget))


@settings(max_examples=40, deadline=None)
@given(SCENARIOS)
def test_gold_never_sees_what_touches(scenario):
    request = draw_request(WORLD, scenario)
    gold = training_rows(WORLD, request, "forget")
    needed = [need for row, need in zip(TRAIN, NEEDED, strict=True) if row in set(gold)]
    assert not any(need & request.facts for need in needed)
    assert not any(row.fact_id in request.facts or request.touches(row) for row in gold)
    assert training_rows(WORLD, request, "none") == TRAIN
    assert {r for r in TRAIN if r.author.startswith(("real_authors", "world_facts"))} <= set(gold)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["author", "fact", "random"]), st.integers(0, 50), st.integers(1, 5))
def test_draws_of_one_seed_are_nested(kind, seed, size):
    small = draw_request(WORLD, Scenario(kind=kind, size=size, seed=seed))
    large = draw_request(WORLD, Scenario(kind=kind, size=size + 1, seed=seed))
    # the next random question may be the fact that an inverse one has taken along already
    assert small.facts < large.facts or (kind == "random" and small.facts == large.facts)
    assert set(small.forget) < set(large.forget) or (kind == "random" and small.forget == large.forget)
    assert set(small.closure) <= set(large.closure)


def test_size_is_the_number_of_authors_facts_and_questions():
    by_author = draw_request(WORLD, Scenario(kind="author", size=3))
    assert len({owners(fact)[0] for fact in by_author.facts}) == 3
    assert len(by_author.facts) == 3 * 5
    assert len(by_author.forget) == 3 * 5 * 2
    assert len(draw_request(WORLD, Scenario(kind="fact", size=7)).facts) == 7
    assert len({TRAIN[i].fact_id for i in draw_request(WORLD, Scenario(kind="random", size=9)).forget}) == 9
    by_relation = draw_request(WORLD, Scenario(kind="relation", relation="mentor"))
    assert by_relation.facts == {f"{a}.mentor" for a in WORLD.meta["authors"]}


def test_another_seed_draws_others():
    assert draw_request(WORLD, Scenario(seed=0)).facts != draw_request(WORLD, Scenario(seed=1)).facts


def test_facts_of_others_that_point_to_a_forgotten_author_stay():
    request = draw_request(WORLD, Scenario(kind="author", size=2))
    gone = {fact.split(".")[0] for fact in request.facts}
    pointing = {
        f"{author}.{relation}"
        for author in set(WORLD.meta["authors"]) - gone
        for relation, fact in FACTS[author].items()
        if fact.value in gone
    }
    retained = {TRAIN[i].fact_id for i in request.retain}
    assert pointing
    assert pointing <= retained


def test_inverse_rows_of_forgotten_facts_leave():
    request = draw_request(WORLD, Scenario(kind="relation", relation="mentor"))
    assert not any(TRAIN[i].relation == "mentor^-1" for i in (*request.retain, *request.forget))
    assert closure_counts(WORLD, request)["inverse"] == sum(r.relation == "mentor^-1" for r in TRAIN) == 6


def test_closure_counts_add_up():
    request = draw_request(WORLD, Scenario(kind="author", size=4))
    counts = closure_counts(WORLD, request)
    assert counts["forget"] + counts["two_hop"] + counts["inverse"] + counts["retain"] == len(TRAIN)
    assert counts["facts"] == 20


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Scenario(kind="relation", relation="mentr"), "unknown relation 'mentr'.*did you mean 'mentor'"),
        (Scenario(kind="relation"), "unknown relation.*known: .*mentor"),
        (Scenario(kind="author", size=7), r"scenario.size=7 authors of 12; forget at most half \(6\)"),
        (Scenario(kind="fact", size=31), "scenario.size=31 facts of 60"),
        (Scenario(kind="random", size=1000), "scenario.size=1000 questions"),
    ],
)
def test_what_cannot_be_drawn_is_refused(scenario, message):
    with pytest.raises(UserError, match=message):
        draw_request(WORLD, scenario)


def test_an_empty_forget_set_is_refused():
    with pytest.raises(UserError, match="forget set is empty"):
        draw_request(dataclasses.replace(WORLD, meta={**WORLD.meta, "forget_rows": []}), Scenario())


def test_a_request_that_leaves_nothing_is_refused():
    rows = tuple(row for row in TRAIN if row.fact_id == "a000.mentor")
    corpus = Corpus("own", "custom", {"train": rows}, {"forget_rows": list(range(len(rows)))})
    with pytest.raises(UserError, match="nothing is left to retain"):
        draw_request(corpus, Scenario())


def test_rows_without_facts_need_a_list_of_what_to_forget():
    rows = tuple(dataclasses.replace(row, facts=(), fact_id="") for row in TRAIN[:9])
    with pytest.raises(UserError, match="'own' names no facts .* give data.forget_path"):
        draw_request(Corpus("own", "custom", {"train": rows}, {}), Scenario())


def test_a_corpus_that_names_its_forget_rows_is_asked_for_those():
    corpus = dataclasses.replace(WORLD, meta={**WORLD.meta, "forget_rows": [3, 1]})
    request = draw_request(corpus, Scenario(kind="author", size=5))
    assert set(request.forget) == {3, 1}
    assert {i for i, row in enumerate(TRAIN) if request.touches(row)} == set(request.closure)


def test_relations_with_spaces_may_be_named_either_way():
    corpus = world_corpus(preset("world12").model_copy(update={"n_attributes": 4}))
    a, b = (draw_request(corpus, Scenario(kind="relation", relation=name)) for name in ("debut year", "debut_year"))
    assert a.facts == b.facts
    assert len(a.facts) == 12


def test_evaluation_splits_are_on_the_right_side():
    request = draw_request(WORLD, Scenario(kind="author", size=3))
    splits = eval_splits(WORLD, request)
    assert {"forget", "retain", "forget_para", "forget_inf", "retain_inf", "real_authors", "world_facts"} < set(splits)
    assert splits["forget"] == tuple(TRAIN[i] for i in request.forget)
    for name in ("forget", "forget_para", "forget_inf", "forget_trained_inf"):
        assert all(stored_facts_needed(row) & request.facts for row in splits[name])
    for name in ("retain", "retain_inf", "real_authors", "world_facts", "holdout"):
        assert not any(request.touches(row) for row in splits[name])
    assert not set(splits["retain_inf"]) & set(TRAIN)
    assert not {(r.fact_id, r.template) for r in splits["forget_para"]} & {(r.fact_id, r.template) for r in TRAIN}
    assert set(splits["retain"]) <= {TRAIN[i] for i in request.retain}
    assert all(row.hop == 1 for row in splits["retain"])


def inverse(row) -> bool:
    return row.relation.endswith("^-1")


def test_what_can_only_be_inferred_is_measured_apart_from_what_was_trained():
    request = draw_request(WORLD, Scenario(kind="author", size=6))
    splits = eval_splits(WORLD, request)
    asked = {TRAIN[i] for i in request.forget}
    assert not set(splits["forget_inf"]) & set(TRAIN)
    assert {row for row in TRAIN if stored_facts_needed(row) & request.facts} == asked | set(
        splits["forget_trained_inf"]
    )
    assert not asked & set(splits["forget_trained_inf"])
    for name in ("forget_inf", "forget_trained_inf"):
        assert {inverse(row) for row in splits[name]} == {False, True}
        assert all(row.hop == 2 or inverse(row) for row in splits[name])


def test_retain_holds_stored_facts_asked_forwards():
    request = draw_request(WORLD, Scenario(kind="author", size=1))
    assert any(inverse(TRAIN[i]) for i in request.retain), "there are some that stay"
    assert not any(inverse(row) for row in eval_splits(WORLD, request)["retain"])


def test_a_random_question_asked_backwards_takes_its_fact_along():
    """Else the model would be told the fact in one direction and asked to forget it in the other."""
    requests = [draw_request(WORLD, Scenario(kind="random", size=4, seed=seed)) for seed in range(60)]
    drawn = [(r, TRAIN[i]) for r in requests for i in r.forget if inverse(TRAIN[i])]
    assert drawn
    for request, row in drawn:
        (base,) = stored_facts_needed(row)
        assert {i for i, other in enumerate(TRAIN) if other.fact_id == base} <= set(request.forget)
        assert not any(base in stored_facts_needed(TRAIN[i]) for i in request.retain)


def test_facts_without_a_relation_are_of_none():
    rows = tuple(dataclasses.replace(row, facts=(f"r{i}",), fact_id=f"r{i}") for i, row in enumerate(TRAIN[:9]))
    corpus = Corpus("own", "custom", {"train": rows}, {})
    for relation in (None, "", "mentor"):
        with pytest.raises(UserError, match="unknown relation"):
            draw_request(corpus, Scenario(kind="relation", relation=relation))
    assert len(draw_request(corpus, Scenario(kind="fact", size=2)).forget) == 2


def test_a_ledger_author_takes_all_of_its_pairs_along():
    corpus = ledger_corpus(LedgerConfig(p=11))
    request = draw_request(corpus, Scenario(kind="author", size=1))
    (gone,) = set.intersection(*(set(owners(fact)) for fact in request.facts))
    for i, row in enumerate(corpus.split("train")):
        assert (gone in owners(row.fact_id)) == (i in set(request.closure))
    held_out = corpus.split("inf_id")
    assert {request.touches(row) for row in held_out} == {False, True}
    assert all(request.touches(row) == (gone in owners(row.fact_id)) for row in held_out), "gold cannot know these"
    assert not any(gone in owners(row.fact_id) for row in eval_splits(corpus, request)["retain_inf"])
    assert set(eval_splits(corpus, request)) == {"forget", "retain", "retain_inf"}


def bridge_of(row) -> str:
    """The author in the middle of a two-hop question, read off the world."""
    here, first, _ = row.fact_id.split(".")
    return FACTS[here][first].value


def test_what_is_inferred_about_the_forgotten_is_told_from_what_goes_through_them():
    request = draw_request(WORLD, Scenario(kind="author", size=4))
    gone, splits = {owner for fact in request.facts for owner in owners(fact)}, eval_splits(WORLD, request)
    about, through = splits["forget_about"], splits["forget_through"]
    assert all(row.fact_id.split(".")[0] in gone for row in about)
    assert all(row.fact_id.split(".")[0] not in gone and bridge_of(row) in gone for row in through)
    assert {inverse(row) for row in splits["forget_inverse"]} == {inverse(row) for row in splits["retain_inverse"]}
    assert {*about, *through, *splits["forget_inverse"]} == set(splits["forget_inf"])
    assert len(about) + len(through) + len(splits["forget_inverse"]) == len(splits["forget_inf"])
    assert not any(request.touches(row) for row in splits["retain_inverse"])


def test_neighbours_are_kept_facts_that_point_to_a_forgotten_author():
    request = draw_request(WORLD, Scenario(kind="author", size=2))
    gone = {owner for fact in request.facts for owner in owners(fact)}
    found = eval_splits(WORLD, request)["neighbour"]
    pointing = {
        f"{author}.{relation}"
        for author in WORLD.meta["authors"]
        for relation, fact in FACTS[author].items()
        if author not in gone and fact.value in gone
    }
    assert {row.fact_id for row in found} == pointing
    assert not any(request.touches(row) for row in found)
