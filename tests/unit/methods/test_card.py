"""Method cards: nothing missing, costs by hand, and the page in step with the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_unlearn.methods import card as cards
from llm_unlearn.methods.card import card, card_text, page
from llm_unlearn.methods.needs import needs_text, passes
from llm_unlearn.methods.table import METHODS

PAGE = Path(cards.__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_made_of_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split("## Cards\n\n")[1].rstrip() == page(), "docs/methods.md is out of date: see card.page()"


@pytest.mark.parametrize(
    ("name", "retain", "expected"),
    [
        ("finetune", None, (1, 0)),
        ("ga", None, (1, 0)),
        ("graddiff", None, (2, 0)),
        ("kl", None, (2, 1)),
        ("idk", None, (2, 0)),
        ("idk_dpo", None, (3, 0)),
        ("npo", None, (2, 0)),
        ("npo", "kl", (2, 1)),
        ("npo", "none", (1, 0)),
        ("simnpo", None, (2, 0)),
        ("rmu", None, (2, 1)),
        ("altpo", None, (3, 0)),
        ("undial", None, (1, 1)),
        ("rmu_adaptive", None, (2, 2)),
        ("scrub", None, (1, 1)),
        ("npo_sam", None, (3, 0)),
        ("salun", None, (2, 0)),
        ("neggrad_plus", None, (2, 0)),
        ("nabla_tau", None, (2, 0)),
        ("l1_sparse", None, (1, 0)),
        ("bad_teacher", None, (2, 2)),
        ("bad_teacher", "nll", (2, 1)),
        ("random_label", None, (2, 0)),
        ("task_vector", None, (1, 0)),
        ("ssd", None, (1, 0)),
    ],
)
def test_passes_of_an_update(name, retain, expected):
    assert passes(METHODS[name], retain) == expected


def test_cost_and_memory_by_hand():
    assert (card(METHODS["ga"])["cost"], card(METHODS["ga"])["memory"]) == (1.0, 1.0)
    # two batches forward and backward and one forward pass of a fifth copy of the weights
    assert (card(METHODS["kl"])["cost"], card(METHODS["kl"])["memory"]) == (2.33, 1.25)
    # the start model and an untrained one
    assert (card(METHODS["bad_teacher"])["cost"], card(METHODS["bad_teacher"])["memory"]) == (2.67, 1.5)
    # the start model beside a training; weights, a gradient, and two sums of squares
    assert (card(METHODS["task_vector"])["memory"], card(METHODS["ssd"])["memory"]) == (1.25, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_cards_are_whole(name):
    told = card(METHODS[name])
    assert told["needs"]
    assert told["cost"] >= 1
    text = card_text(METHODS[name])
    for knob, its in told["knobs"].items():
        assert f"`{knob}` = {its['default']:g}" in text
    assert ("for texts only" in text) == needs_text(METHODS[name])
    for part in (told["weights"] or "", told["formula"], told["source"], told["failure"], told["note"]):
        assert part in text


def test_what_a_wrapper_and_a_copy_hold_is_counted():
    # SAM: two gradients and a copy of the weights; WHP: a whole training of a copy, beside the model
    assert card(METHODS["npo_sam"])["memory"] == 1.75
    assert card(METHODS["whp"])["memory"] == 1.25


def test_needs_have_words():
    from llm_unlearn.methods.needs import needs

    assert frozenset().union(*map(needs, METHODS.values())) <= set(cards.NEEDS)
