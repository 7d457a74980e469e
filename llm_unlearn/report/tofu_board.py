"""The leaderboard on TOFU's splits, as grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.text import DASH, count, number

NEAR = ("extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE")
"""What a distance to gold is the mean of."""
COLUMNS = (*NEAR, "forget_quality", "model_utility", "privleak")
UTILITY_LEFT = 0.95  # of the start model's, to be ranked


def tofu_board(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Return one grid per split: gold, doing nothing, then methods by distance to gold among those that kept utility.

    Args:
        rows: split, method, metrics (name -> value, ci, gold, start), kept_step, cost; or error.
    """
    return [
        _split(split, [r for r in rows if r["split"] == split]) for split in dict.fromkeys(r["split"] for r in rows)
    ]


def distance(metrics: Mapping[str, Mapping[str, Any]], of: str = "value") -> float:
    """Return the mean of |value - gold| over extraction strength, forget probability and forget ROUGE."""
    return float(np.mean([abs(metrics[name][of] - metrics[name]["gold"]) for name in NEAR]))


def _split(split: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    done = sorted((r for r in rows if "error" not in r), key=lambda r: (_barred(r["metrics"]), distance(r["metrics"])))
    first = done[0]["metrics"]
    heads = ("method", "rank", "distance", *COLUMNS, "kept update", "CPU s")
    body = [
        Row(("gold", DASH, number(0.0), *(_plain(first[name]["gold"]) for name in COLUMNS), DASH, DASH), "gold"),
        Row(("doing nothing", DASH, number(distance(first, "start")),
             *(_plain(first[name]["start"]) for name in COLUMNS), DASH, DASH), "start"),
    ]  # fmt: skip
    for rank, row in enumerate(done, 1):
        m = row["metrics"]
        barred = _barred(m)
        cells = (
            row["method"],
            "barred" if barred else str(rank),
            number(distance(m)),
            *(_shown(m[n]) for n in COLUMNS),
        )
        body.append(Row((*cells, count(row["kept_step"]), count(round(row["cost"]["cpu_seconds"]))),
                        "collapsed" if barred else "method"))  # fmt: skip
    notes = [
        f"Distance: mean of |value - gold| over {', '.join(NEAR)}; ranked by it are those with at least "
        f"{UTILITY_LEFT:.0%} of the start's model utility. In brackets: 95 % interval over authors, one run; "
        "forget_quality is a p-value, privleak in percent."
    ]
    notes += [f"{r['method']}: {r['error'].split(': ', 1)[-1]}" for r in rows if "error" in r]
    return Grid(split, heads, tuple(body), tuple(notes))


def _barred(metrics: Mapping[str, Mapping[str, Any]]) -> bool:
    utility = metrics["model_utility"]
    return utility["value"] is None or utility["value"] < UTILITY_LEFT * utility["start"]


def _plain(value: float | None) -> str:
    return DASH if value is None else f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _shown(line: Mapping[str, Any]) -> str:
    ends = line.get("ci")
    return _plain(line["value"]) + (f" [{ends[0]:.2g}, {ends[1]:.2g}]" if ends else "")
