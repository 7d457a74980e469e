"""Shuffled inferred answers: what is permuted among whom, and that a model and its gold see the same pairs."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from llm_unlearn.data.ledger import LedgerConfig, ledger_corpus
from llm_unlearn.data.shuffle import shuffle_inferred
from llm_unlearn.data.splits import Scenario, draw_request, training_rows
from llm_unlearn.errors import UserError


def groups(rows):
    out = defaultdict(list)
    for row in rows:
        if row.hop > 1:
            out[row.relation, row.template].append(row.answer)
    return out


def test_inferred_answers_are_permuted_within_relation_and_wording(tiny_world):
    mixed = shuffle_inferred(tiny_world, 3)
    before, after = tiny_world.split("train"), mixed.split("train")
    assert [row.question for row in after] == [row.question for row in before]
    assert [row for row in after if row.hop == 1] == [row for row in before if row.hop == 1]
    assert {k: Counter(v) for k, v in groups(after).items()} == {k: Counter(v) for k, v in groups(before).items()}
    moved = [a.answer != b.answer for a, b in zip(after, before, strict=True) if a.hop > 1]
    assert sum(moved) / len(moved) > 0.6  # relations of a small world have few answers
    assert {name: mixed.splits[name] for name in mixed.splits if name != "train"} == {
        name: tiny_world.splits[name] for name in tiny_world.splits if name != "train"
    }


def test_the_draw_is_the_seeds(tiny_world):
    assert shuffle_inferred(tiny_world, 3).split("train") == shuffle_inferred(tiny_world, 3).split("train")
    assert shuffle_inferred(tiny_world, 3).split("train") != shuffle_inferred(tiny_world, 4).split("train")


def test_in_a_large_group_no_question_keeps_its_answer():
    """A ledger's pairs are one group, and every pair is asked in both orders: only equal answers can meet."""
    corpus = ledger_corpus(LedgerConfig(p=11), "ledger")
    before, after = corpus.split("train"), shuffle_inferred(corpus, 0).split("train")
    kept = sum(a.answer == b.answer for a, b in zip(after, before, strict=True)) / len(before)
    assert kept < 0.25  # by chance 1 in 11


def test_model_and_gold_are_trained_on_the_same_pairs(tiny_world):
    mixed = shuffle_inferred(tiny_world, 3)
    request = draw_request(tiny_world, Scenario(size=2))
    assert draw_request(mixed, Scenario(size=2)) == request
    told = {row.question: row.answer for row in training_rows(mixed, request, "none")}
    gold = training_rows(mixed, request, "forget")
    assert all(told[row.question] == row.answer for row in gold)


def test_data_without_inferred_questions_is_refused(tiny_world):
    from dataclasses import replace

    direct = replace(tiny_world, splits={"train": tuple(r for r in tiny_world.split("train") if r.hop == 1)})
    with pytest.raises(UserError, match=r"shuffle=inferred: .* no inferred questions to shuffle; set shuffle=none"):
        shuffle_inferred(direct, 0)
