"""Break-even requests, by hand and at the limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_unlearn.eval.breakeven import NEVER, break_even


def test_by_hand():
    found = break_even([90.0, 110.0, 100.0], [9.0, 11.0, 10.0])
    assert (found.extra, found.saved, found.requests, found.n) == (100.0, 10.0, 10.0, 3)
    assert (found.lo, found.hi) == pytest.approx((10.0, 10.0)), "every seed says ten"
    assert found.never == 0.0


def test_it_is_a_ratio_of_means():
    found = break_even([10.0, 10.0, 10.0, 10.0], [-1.0, 1.0, 3.0, 1.0])
    assert found.requests == 10.0, "1 is saved on average; a seed alone would say never"
    assert found.lo is not None
    assert found.lo < 10.0 < found.hi == NEVER
    # two more of -1 than of 3 in four draws: 6/64 + 4/128 + 4/256 + 1/256 = 37/256
    assert found.never == pytest.approx(37 / 256, abs=0.03)


def test_never():
    found = break_even([10.0, 12.0, 11.0], [-1.0, -2.0, -3.0])
    assert (found.requests, found.lo, found.hi, found.never) == (NEVER, NEVER, NEVER, 1.0)
    assert break_even([10.0] * 3, [0.0] * 3).requests == NEVER, "no saving is never enough"
    assert break_even([0.0] * 3, [0.0] * 3).requests == NEVER


def test_a_training_that_costs_nothing_more_pays_from_the_first():
    found = break_even([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert (found.requests, found.lo, found.hi) == (0.0, 0.0, 0.0)
    assert break_even([-5.0, -5.0, -5.0], [1.0, 2.0, 3.0]).requests == 0.0
    assert break_even([-5.0, -5.0, -5.0], [-1.0] * 3).requests == NEVER, "each request gives some of it back"


def test_fewer_than_three_seeds_have_no_interval():
    found = break_even([10.0, 12.0], [1.0, 1.0])
    assert (found.requests, found.lo, found.hi, found.n) == (11.0, None, None, 2)
    assert break_even([10.0], [4.0]).requests == 2.5


def test_the_unit_does_not_matter_and_the_seed_decides():
    rng = np.random.default_rng(0)
    extra, saved = rng.normal(100, 10, 10), rng.normal(5, 2, 10)
    one, two = break_even(extra, saved), break_even(1e9 * extra, 1e9 * saved)
    assert (one.lo, one.hi) == pytest.approx((two.lo, two.hi))
    assert one == break_even(extra, saved)
    assert one.lo < one.requests < one.hi


def test_coverage():
    rng, held = np.random.default_rng(1), 0
    for i in range(200):
        extra, saved = rng.normal(100, 15, 10), rng.normal(5, 2, 10)
        found = break_even(extra, saved, seed=i, n_boot=400)
        held += found.lo <= 20 <= found.hi
    assert 0.85 <= held / 200 <= 1.0, "nominal 95 % of ten seeds"


@pytest.mark.parametrize(("extra", "saved"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([[1.0]], [[1.0]])])
def test_what_is_no_pair_of_costs_is_refused(extra, saved):
    with pytest.raises(ValueError, match="break_even: wants one finite extra and one saving a seed"):
        break_even(extra, saved)
