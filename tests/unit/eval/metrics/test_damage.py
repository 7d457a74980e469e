"""Scores of forgetting against damage: by hand, at their limits, and where they have no value."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.eval.metrics.damage import (
    Accuracies,
    forgotten_share,
    kept_share,
    unlearning_balance,
    unlearning_efficiency,
)

START = Accuracies(test=0.8, retain=1.0, forget=1.0)
GOLD = Accuracies(test=0.8, retain=1.0, forget=0.6)
SHARE = st.floats(0, 1)


def test_published_score_in_percent_points():
    # ResNet, gradient ascent, before grokking, of the published table 1
    before, after = Accuracies(0.737, 0.793, 0.863), Accuracies(0.697, 0.752, 0.756)
    assert unlearning_efficiency(before, after).value == pytest.approx(10.7 / (4.0 * 4.1))
    assert unlearning_efficiency(before, after).reason == ""


def test_published_score_without_damage_has_no_value_and_with_a_gain_no_sign():
    free = unlearning_efficiency(START, Accuracies(0.8, 0.9, 0.5))
    assert (free.value, free.reason) == (None, "divides by zero: test accuracy did not change")
    assert "test and retain" in unlearning_efficiency(START, START).reason
    gained = unlearning_efficiency(replace(START, retain=0.9), Accuracies(0.9, 0.8, 0.5))
    assert gained.value == pytest.approx(50 / (-10 * 10)), "better on every count, and below zero"
    assert gained.reason == "sign means nothing: test accuracy rose"


def test_published_score_is_ruled_by_the_smallest_damage():
    near = unlearning_efficiency(START, Accuracies(0.7999, 0.9, 0.5)).value
    far = unlearning_efficiency(START, Accuracies(0.79, 0.9, 0.5)).value
    assert near is not None
    assert far is not None
    assert near == pytest.approx(100 * far), "a hundredth of a point against one point of test accuracy"


def test_balance_by_hand_and_at_its_limits():
    half = Accuracies(test=0.4, retain=0.75, forget=0.8)  # parts 1/2, 1/2, 3/4
    assert unlearning_balance(START, half, GOLD).value == pytest.approx(3 / (2 + 2 + 4 / 3))
    assert unlearning_balance(START, GOLD, GOLD).value == 1
    assert unlearning_balance(START, replace(GOLD, forget=0.0), GOLD).value == 1, "its gap to gold says the rest"
    assert unlearning_balance(START, START, GOLD).value == 0, "nothing forgotten"
    assert unlearning_balance(START, replace(GOLD, forget=1.0), GOLD).value == 0
    assert unlearning_balance(START, replace(GOLD, test=0.0), GOLD).value == 0
    constant = Accuracies(test=0.1, retain=0.12, forget=0.0)
    assert unlearning_balance(START, constant, GOLD, chance=(0.1, 0.12)).value == 0, "everything lost"
    assert unlearning_balance(START, constant, GOLD).value == pytest.approx(3 / (1 + 8 + 1 / 0.12))


def test_balance_has_no_value_where_there_is_nothing_to_forget_or_to_keep():
    found = unlearning_balance(START, GOLD, replace(GOLD, forget=1.0), chance=(0.8, 0.1))
    assert found.value is None
    assert "nothing to forget" in found.reason
    assert "nothing to keep: doing nothing scores 0.80, chance 0.80" in found.reason


@given(st.tuples(SHARE, SHARE, SHARE), st.tuples(SHARE, SHARE, SHARE), SHARE, SHARE, SHARE, st.floats(0, 0.9))
def test_balance_is_bounded_and_never_falls_with_less_damage_or_more_forgetting(a, b, test, retain, gold, chance):
    start, end = Accuracies(test, retain, 1.0), Accuracies(test, retain, gold)
    low = Accuracies(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]))
    high = Accuracies(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]))
    worse, better = (unlearning_balance(start, model, end, (chance, chance)).value for model in (low, high))
    if worse is None or better is None:
        assert worse is better
        assert gold == 1 or min(test, retain) <= chance
        return
    assert 0 <= worse <= better + 1e-12
    assert better <= 1
    parts = [
        forgotten_share(start, high, end),
        kept_share(test, high.test, chance),
        kept_share(retain, high.retain, chance),
    ]
    values = [part.value for part in parts if part.value is not None]
    assert min(values) - 1e-12 <= better <= np.mean(values) + 1e-12


def test_shares_outside_0_and_1_are_refused():
    with pytest.raises(ValueError, match="retain is 87"):
        Accuracies(0.5, 87, 0.5)
    with pytest.raises(ValueError, match="forget is nan"):
        Accuracies(0.5, 0.5, float("nan"))
