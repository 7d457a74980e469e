"""Times to a level: by hand, and against what a survival curve is."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_unlearn.eval.reach import Time, first_at, horizon_of, log_rank, restricted_difference, survival, time_to

LINES = [{"step": 0, "forget_acc": 1.0}, {"step": 5, "forget_acc": 0.5}, {"step": 10, "forget_acc": 0.2}]


def got(*at):
    return [Time(t, True) for t in at]


def never(*at, ended=False):
    return [Time(t, False, ended) for t in at]


def test_the_first_line_at_or_below_the_level():
    assert first_at(LINES, "forget_acc", 0.5) is LINES[1]
    assert first_at(LINES, "forget_acc", 0.1) is None
    assert first_at(LINES, "forget_prob", 1.0) is None, "not watched"
    assert time_to(LINES, "forget_acc", 0.5, 0.2, ended=True) == Time(1.0, True), "it got there before it was stopped"
    assert time_to(LINES, "forget_acc", 0.1, 1.0, ended=False) == Time(10, False)
    assert time_to(LINES, "forget_acc", 0.1, 1.0, ended=True) == Time(10, False, True)
    assert time_to(LINES, "forget_prob", 0.1, 1.0, ended=True) is None


def test_survival_by_hand():
    # 4 runs: at 2 and 4 reached, given up at 3 and 6. S = 3/4 from 2 on, times 1/2 of those left from 4 on
    found = survival([*got(2, 4), *never(3, 6)], horizon=6)
    assert found.median == 4
    assert found.restricted_mean == pytest.approx(2 * 1 + 2 * 0.75 + 2 * 0.375)
    assert (found.reached, found.n, found.horizon) == (2, 4, 6)


def test_the_mean_of_those_that_got_there_is_not_the_answer():
    found = survival([*got(2, 2), *never(10, 10, 10)])
    assert (found.median, found.horizon) == (None, 10), "most never got there"
    assert found.restricted_mean == pytest.approx((2 + 2 + 30) / 5)


def test_a_run_that_broke_down_is_not_taken_for_one_that_was_not_watched_longer():
    broken, given_up = (survival([*got(4, 6), *never(1, ended=e)], horizon=6) for e in (True, False))
    assert broken.restricted_mean == pytest.approx((4 + 6 + 6) / 3)
    assert given_up.restricted_mean == pytest.approx((4 + 6) / 2), "of it nothing is known"
    assert horizon_of([*got(8), *never(3, ended=True), *never(5)]) == 5
    assert horizon_of([*got(8), *never(3, ended=True)]) == 8


def test_paired_difference_up_to_the_shared_horizon():
    found = restricted_difference([*got(2, 4), *never(10)], [*got(9, 5), *never(8)])
    assert found.mean == pytest.approx(np.mean([2 - 8, 4 - 5, 8 - 8]))
    assert found.n == 3
    with pytest.raises(ValueError, match="match them by seed"):
        restricted_difference(got(1, 2, 3), got(1, 2))


def test_log_rank_tells_far_apart_from_alike():
    assert log_rank(got(1, 2, 3, 4, 5), [*got(20, 30), *never(40, 40, 40)]) < 0.01
    assert log_rank(got(1, 2, 3), got(1, 2, 3)) == pytest.approx(1)
    assert np.isnan(log_rank(never(3, 3), never(3, 3)))
    assert np.isnan(log_rank(got(3, 3), got(3, 3)))


def test_refusals():
    with pytest.raises(ValueError, match="wants times"):
        survival([])
    with pytest.raises(ValueError, match="horizon above 0"):
        survival(got(0, 0))


TIMES = st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=12)


@given(TIMES)
@example([(1, False)] * 5 + [(1, True)] * 2 + [(2, True)] * 2 + [(3, True)])
def test_with_one_budget_the_restricted_mean_is_the_mean_of_capped_times(drawn):
    times = [Time(float(t), True) if hit else Time(31.0, False) for t, hit in drawn]
    found = survival(times, horizon=31.0)
    assert found.restricted_mean == pytest.approx(np.mean([t.at for t in times]))
    assert 0 < found.restricted_mean <= 31
    ranked = sorted(t.at for t in times)
    half = ranked[(len(ranked) + 1) // 2 - 1]
    assert found.median == (half if half < 31 else None)
