"""Non-dominated points and the area below them: by hand, and what must hold for any points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.eval.frontier import area, non_dominated, points

LINES = [
    {"step": 0, "forget_acc": 1.0, "retain_acc": 0.8},
    {"step": 1, "forget_acc": 0.5, "retain_acc": 0.6},
    {"step": 2, "forget_acc": 0.5, "retain_acc": 0.4},
    {"step": 3, "forget_acc": 0.2},
]


def test_points_of_lines():
    assert points(LINES, "forget_acc", "retain_acc").tolist() == [[1, 0.8], [0.5, 0.6], [0.5, 0.4]]
    np.testing.assert_allclose(points(LINES, "forget_acc", "retain_acc", relative=True)[:, 1], [1, 0.75, 0.5])
    assert points(LINES, "forget_prob", "retain_acc").shape == (0, 2)
    with pytest.raises(ValueError, match="retain_acc is 0"):
        points([{"forget_acc": 1.0, "retain_acc": 0.0}], "forget_acc", "retain_acc", relative=True)


def test_frontier_and_area_by_hand():
    p = points(LINES, "forget_acc", "retain_acc")
    assert non_dominated(p).tolist() == [[0.5, 0.6], [1, 0.8]]
    assert area(p, (0, 1)) == pytest.approx(0.5 * 0.6)
    assert area(p, (0, 2)) == pytest.approx((0.5 * 0.6 + 1 * 0.8) / 2)
    assert area(p, (0.6, 1)) == pytest.approx(0.6), "already below the lower limit"
    assert area(p, (0, 1), kept=(0.2, 0.7)) == pytest.approx(0.5 * 0.8)
    assert area([(0, 1)], (0, 1)) == 1
    assert area([(1, 1)], (0, 1)) == 0, "doing nothing"
    assert area([], (0, 1)) == 0


def test_refusals():
    with pytest.raises(ValueError, match="no room: forget 1 to 1"):
        area([(0, 1)], (1, 1))
    with pytest.raises(ValueError, match="finite"):
        non_dominated([(0, np.nan)])


SHARE = st.floats(0, 1)
POINTS = st.lists(st.tuples(SHARE, SHARE), max_size=8)


@given(POINTS, st.tuples(SHARE, SHARE), SHARE)
def test_a_further_point_never_lowers_the_area_and_a_dominated_one_leaves_it(found, new, shift):
    whole = area([*found, new], (0.1, 0.9))
    assert 0 <= area(found, (0.1, 0.9)) <= whole + 1e-12
    assert whole <= 1
    behind = (min(1.0, new[0] + shift), new[1] * (1 - shift))
    assert area([*found, new, behind], (0.1, 0.9)) == pytest.approx(whole, abs=1e-12)
    assert non_dominated([*found, new, new]).tolist() == non_dominated([*found, new]).tolist()


@given(POINTS)
def test_nobody_on_the_frontier_is_beaten_and_everybody_else_is(found):
    best = non_dominated(found)
    assert (np.diff(best, axis=0) > 0).all(), "both levels ascend"
    for f, r in found:
        assert ((best[:, 0] <= f) & (best[:, 1] >= r)).any()
    assert {tuple(p) for p in best} <= set(found)


@given(POINTS, st.integers(200, 400))
def test_area_is_the_mean_of_the_best_kept_level(found, n):
    grid = 0.1 + 0.8 * (np.arange(n) + 0.5) / n
    best = [max((r for f, r in found if f <= x), default=0.0) for x in grid]
    assert area(found, (0.1, 0.9)) == pytest.approx(np.mean(best), abs=(len(found) + 1) / n)
