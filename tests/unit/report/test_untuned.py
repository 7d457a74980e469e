"""The same settings at two checkpoints, before any was chosen."""

from __future__ import annotations

import numpy as np
import pytest

from llm_unlearn.report.results import Trial
from llm_unlearn.report.untuned import same_settings_grid
from llm_unlearn.stats import mean_interval

PAIRS = [("grok", "fit"), ("grok", "easy")]


def trial(kind: str, lr: float, fall: list[float | None], kept: list[int | None], **changes: object) -> Trial:
    n = len(fall)
    plain = {"scenario": "author", "checkpoint": kind, "method": "npo", "setting": {"optim.lr": lr},
             "seeds": [100, 101, 102][:n], "reached": [True] * n, "kept": kept, "fall": fall}  # fmt: skip
    return Trial.model_validate(plain | changes)


def cells(trials: list[Trial]) -> tuple[str, ...]:
    grid = same_settings_grid(trials, "author", PAIRS)
    assert grid is not None
    assert grid.rows[0].cells == ("grok minus fit",)
    assert len(grid.rows) == 2, "no trial of easy"
    return grid.rows[1].cells


def test_differences_are_of_the_same_setting_and_seed_where_both_forgot():
    trials = [
        trial("grok", 1e-4, [0.2, 0.3, 0.1], [20, 40, 40]),
        trial("fit", 1e-4, [0.1, 0.1, 0.1], [10, 10, 10]),
        trial("grok", 1e-3, [0.4, 0.9, 0.4], [10, 10, 20], reached=[True, False, True]),
        trial("fit", 1e-3, [0.2, 0.2, 0.9], [10, 10, 10], reached=[True, True, False]),
        trial("fit", 1e-2, [0.9] * 3, [10] * 3),  # not tried at grok
        trial("grok", 1e-4, [0.0] * 3, [10] * 3, scenario="fact"),
    ]
    method, n, seeds, shares, pairs, fall, updates = cells(trials)
    assert (method, n, seeds, shares, pairs) == ("npo", "6", "3", "83 % / 83 %", "4 (3 seeds)")
    found = mean_interval([(0.1 + 0.2) / 2, 0.2, 0.0])
    assert fall == f"{found.mean:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}]"
    logs = mean_interval([np.log(2) / 2, np.log(4), np.log(4)])
    assert updates == "x " + "{:.2g} [{:.2g}, {:.2g}]".format(*np.exp([logs.mean, logs.lo, logs.hi]))


def test_one_tuning_seed_has_no_interval_and_what_broke_down_is_in_the_shares_alone():
    good = [trial("grok", 1e-4, [0.5], [20]), trial("fit", 1e-4, [0.25], [10])]
    broken = [trial("grok", 1e-3, [None], [None], reached=[False]), trial("fit", 1e-3, [0.1], [10])]
    assert cells([*good, *broken]) == ("npo", "2", "1", "50 % / 100 %", "1 (1 seed)", "+0.250", "x 2")
    assert cells(broken)[2:] == ("1", "0 % / 100 %", "0", "–", "–")


@pytest.mark.parametrize("trials", [[], [trial("grok", 1e-4, [0.1], [10])]])
def test_without_both_sides_there_is_no_table(trials):
    assert same_settings_grid(trials, "author", PAIRS) is None
