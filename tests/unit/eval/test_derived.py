"""Measures of a model, gold and the start model at once, from the lines of a results file."""

import pytest

from llm_unlearn.eval.derived import DERIVED, derive


def lines(**changes):
    out = {
        "test_acc": {"value": 0.6, "start": 0.8, "gold": 0.8},
        "retain_acc": {"value": 0.9, "start": 1.0, "gold": 1.0},
        "forget_acc": {"value": 0.5, "start": 1.0, "gold": 0.5},
    }
    return {**out, **changes}


def test_values_by_hand():
    assert derive("ues", lines()).value == pytest.approx(50 / (20 * 10))
    assert derive("forgotten_share", lines()).value == 1
    assert derive("kept_test_share", lines()).value == pytest.approx(0.75)
    assert derive("kept_retain_share", lines()).value == pytest.approx(0.9)
    assert derive("unlearning_balance", lines()).value == pytest.approx(3 / (1 + 4 / 3 + 1 / 0.9))


def test_chance_is_read_where_it_is_known():
    known = lines(test_chance={"value": 0.2}, retain_chance={"value": 0.5})
    assert derive("kept_test_share", known).value == pytest.approx(0.4 / 0.6)
    assert derive("kept_retain_share", known).value == pytest.approx(0.8)
    assert derive("unlearning_balance", known).value == pytest.approx(3 / (1 + 1.5 + 1.25))


def test_gold_and_doing_nothing_have_them_too():
    assert derive("unlearning_balance", lines(), "gold").value == 1
    assert derive("unlearning_balance", lines(), "start").value == 0
    assert derive("ues", lines(), "start").value is None


@pytest.mark.parametrize("name", DERIVED)
def test_what_is_missing_is_named(name):
    found = derive(name, {**lines(), "retain_acc": {"value": 0.9, "gold": 1.0}})
    assert (found.value, found.reason) == (None, "needs the start model's retain_acc")
    assert derive(name, {}).value is None
    without_gold = derive(name, lines(forget_acc={"value": 0.5, "start": 1.0}))
    assert (without_gold.value is None) == (name in ("unlearning_balance", "forgotten_share"))
