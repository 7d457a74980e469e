"""The same settings at two checkpoints, before any was chosen."""

from __future__ import annotations

import numpy as np
import pytest

from llm_unlearn.report.results import Trial
from llm_unlearn.report.untuned import same_settings_grid
from llm_unlearn.stats import mean_interval

PAIRS = [("grok", "fit"), ("grok", "easy")]


def trial(kind: str, lr: float, damage: list[float], kept: list[int | None], **changes: object) -> Trial:
    n = len(damage)
    plain = {"scenario": "author", "checkpoint": kind, "method": "npo", "setting": {"optim.lr": lr},
             "seeds": [100, 101, 102][:n], "kept": kept, "excess": [-0.1] * n, "damage": damage,
             "enough": [True] * n}  # fmt: skip
    return Trial.model_validate(plain | changes)


def cells(trials: list[Trial]) -> tuple[str, ...]:
    grid = same_settings_grid(trials, "author", PAIRS)
    assert grid is not None
    assert grid.rows[0].cells == ("grok minus fit",)
    assert len(grid.rows) == 2, "no trial of easy"
    return grid.rows[1].cells


def test_differences_are_of_the_same_setting_and_seed():
    trials = [
        trial("grok", 1e-4, [0.2, 0.3, 0.1], [20, 40, 40]),
        trial("fit", 1e-4, [0.1, 0.1, 0.1], [10, 10, 10]),
        trial("grok", 1e-3, [0.4, 0.4, 0.4], [10, 10, 20], excess=[-0.1, 0.2, -0.1]),
        trial("fit", 1e-3, [0.2, 0.2, 0.2], [10, 10, 10], enough=[True, True, False]),
        trial("fit", 1e-2, [0.9] * 3, [10] * 3),  # not tried at grok
        trial("grok", 1e-4, [0.0] * 3, [10] * 3, scenario="fact"),
    ]
    method, settings, seeds, shares, damage, updates = cells(trials)
    assert (method, settings, seeds) == ("npo", "2", "3")
    assert shares == "83 % / 83 %"
    by_seed = [(0.1 + 0.2) / 2, (0.2 + 0.2) / 2, (0.0 + 0.2) / 2]
    found = mean_interval(by_seed)
    assert damage == f"{found.mean:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}]"
    # seed 101's second setting did not come down at grok, seed 102's left too little at fit
    logs = mean_interval([np.log(2) / 2, np.log(4), np.log(4)])
    assert updates == "x " + "{:.2g} [{:.2g}, {:.2g}]".format(*np.exp([logs.mean, logs.lo, logs.hi]))


def test_one_tuning_seed_has_no_interval_and_what_broke_down_no_updates():
    trials = [trial("grok", 1e-4, [1.0], [None], enough=[False]), trial("fit", 1e-4, [0.25], [10])]
    assert cells(trials) == ("npo", "1", "1", "0 % / 100 %", "+0.750", "–")


@pytest.mark.parametrize("trials", [[], [trial("grok", 1e-4, [0.1], [10])]])
def test_without_both_sides_there_is_no_table(trials):
    assert same_settings_grid(trials, "author", PAIRS) is None
