"""The leaderboard on TOFU: ranked by distance to gold, never by forget quality, and utility first."""

from __future__ import annotations

import pytest

from llm_unlearn.report.tofu_board import COLUMNS, distance, tofu_board


def row(method, forgotten, utility=0.9, quality=0.5):
    metrics = {name: {"value": forgotten, "ci": [forgotten - 0.1, forgotten + 0.1], "gold": 0.1, "start": 1.0}
               for name in COLUMNS}  # fmt: skip
    metrics["model_utility"] = {"value": utility, "ci": None, "gold": 0.95, "start": 0.92}
    metrics["forget_quality"] = {"value": quality, "ci": None, "gold": 1.0, "start": 0.001}
    return {"split": "forget10", "method": method, "metrics": metrics, "kept_step": 30, "cost": {"cpu_seconds": 12.4}}


def test_distance_is_to_gold_on_either_side():
    assert distance(row("npo", 0.3)["metrics"]) == pytest.approx(0.2)
    assert distance(row("npo", 0.0)["metrics"]) == pytest.approx(0.1)
    assert distance(row("npo", 0.3)["metrics"], "start") == pytest.approx(0.9)


def test_ranks_are_by_distance_among_those_that_kept_utility():
    rows = [row("far", 0.8, quality=0.99), row("near", 0.2, quality=0.01), row("broken", 0.1, utility=0.3)]
    rows.append({"split": "forget10", "method": "altpo", "error": "UserError: no alternates"})
    (grid,) = tofu_board(rows)
    assert grid.title == "forget10"
    assert [r.cells[:3] for r in grid.rows] == [
        ("gold", "–", "0.00"), ("doing nothing", "–", "0.90"), ("near", "1", "0.10"), ("far", "2", "0.70"),
        ("broken", "barred", "0.00"),
    ]  # fmt: skip
    assert grid.rows[2].cells[3] == "0.2 [0.1, 0.3]"
    assert grid.rows[2].cells[-2:] == ("30", "12")
    assert grid.notes[1] == "altpo: no alternates"


def test_every_split_has_a_table():
    assert [g.title for g in tofu_board([row("npo", 0.3), {**row("npo", 0.2), "split": "forget01"}])] == [
        "forget10", "forget01"]  # fmt: skip
