"""The same settings at two checkpoints: what came of every setting that tuning tried.

A comparison of checkpoints tuned each for itself rests on what was chosen for each; this one does not. It is on the
tuning seeds, and exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_unlearn.config import digest
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS
from llm_unlearn.report.results import Trial
from llm_unlearn.report.text import DASH, counted
from llm_unlearn.stats import mean_interval


class Ended(NamedTuple):
    """Whether a trial came to the level with enough left, the step it kept, and by how much the probability of the kept
    answers fell to there (None: it broke down).
    """

    reached: bool
    kept: int | None
    fall: float | None


def same_settings_grid(trials: Sequence[Trial], scenario: str, pairs: Sequence[tuple[str, str]]) -> Grid | None:
    """Return a line per pair of checkpoints and method: of the settings both were given, the share that came to the
    level with enough left and, where both did, what that took and cost beside each other; None without trials of both.
    """
    methods = sorted({t.method for t in trials})
    rows: list[Row] = []
    for group, baseline in pairs:
        part = []
        for method in methods:
            mine, theirs = (_ended(trials, scenario, method, kind) for kind in (group, baseline))
            if both := {key: (mine[key], theirs[key]) for key in sorted(mine.keys() & theirs.keys())}:
                part.append(Row((method, *_cells(both))))
        rows += [Row((f"{group} minus {baseline}",), "section"), *part] if part else []
    if not rows:
        return None
    heads = ("method", "trials", "seeds", "forgot with enough kept", "where both did", "fall of kept", "updates")
    notes = (
        "Every setting tried, the same at both checkpoints, on the tuning seeds; what the study's file itself sets for "
        "a method is kept. Forgot with enough kept: share of trials that came to the forget level with as much left as "
        "stop.floor asks, at the one and at the other. Where both did: pairs of trials (seeds they are of); fall of "
        "the kept answers' probability up to the step kept, difference; updates to that step, ratio. Means over the "
        f"pairs of a seed, then over seeds [95 % interval from {MIN_SEEDS} of them on].",
    )
    return Grid("The same settings at both checkpoints", heads, tuple(rows), notes)


def _ended(trials: Sequence[Trial], scenario: str, method: str, checkpoint: str) -> dict[tuple[int, str], Ended]:
    """(seed, setting) -> what came of it."""
    return {
        (seed, digest(t.setting)): Ended(reached, kept, fall)
        for t in trials
        if (t.scenario, t.method, t.checkpoint) == (scenario, method, checkpoint)
        for seed, reached, kept, fall in zip(t.seeds, t.reached, t.kept, t.fall, strict=True)
    }


def _cells(both: Mapping[tuple[int, str], tuple[Ended, Ended]]) -> tuple[str, ...]:
    shares = [f"{np.mean([pair[side].reached for pair in both.values()]) * 100:.0f} %" for side in (0, 1)]
    falls: dict[int, list[float]] = {}
    logs: dict[int, list[float]] = {}
    for (seed, _), (a, b) in both.items():
        if a.reached and b.reached and a.fall is not None and b.fall is not None and a.kept and b.kept:
            falls.setdefault(seed, []).append(a.fall - b.fall)
            logs.setdefault(seed, []).append(math.log(a.kept / b.kept))
    told = [_interval([float(np.mean(of)) for of in by.values()], ratio=by is logs) for by in (falls, logs)]
    pairs = f"{sum(map(len, falls.values()))} ({counted(len(falls), 'seed')})" if falls else "0"
    return (str(len(both)), str(len({seed for seed, _ in both})), " / ".join(shares), pairs, *told)


def _interval(values: Sequence[float], *, ratio: bool = False) -> str:
    if not values:
        return DASH

    def told(x: float) -> str:
        return f"{math.exp(x):.2g}" if ratio else f"{x:+.3f}"

    head = f"x {told(float(np.mean(values)))}" if ratio else told(float(np.mean(values)))
    if len(values) < MIN_SEEDS:
        return head
    interval = mean_interval(values)
    return f"{head} [{told(interval.lo)}, {told(interval.hi)}]"
