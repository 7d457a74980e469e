"""The same settings at two checkpoints: what came of every setting that tuning tried, before any was chosen.

A comparison of checkpoints tuned each for itself rests on what was chosen; this one does not. It is on the tuning
seeds, and exploratory.
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
from llm_unlearn.report.text import DASH
from llm_unlearn.stats import mean_interval


class Ended(NamedTuple):
    """Whether a trial came to the level with enough left, its damage, and the step it kept (None: it broke down)."""

    good: bool
    damage: float
    kept: int | None


def same_settings_grid(trials: Sequence[Trial], scenario: str, pairs: Sequence[tuple[str, str]]) -> Grid | None:
    """Return a line per pair of checkpoints and method: of the settings both were given, the share that came to the
    level with enough left, and the mean difference in damage and in updates; None without trials of both sides.
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
    heads = ("method", "settings", "tuning seeds", "forgot with enough kept", "damage", "updates")
    notes = (
        "Every setting tried, the same at both checkpoints and none chosen, on the tuning seeds. Forgot with enough "
        "kept: share of trials that came to the forget level with as much left as stop.floor asks, at the one and at "
        "the other. Damage: fall of the kept answers' probability at the step kept, all trials. Updates to "
        "the step kept: ratio, of settings that did so at both. Means over settings, then over seeds [95 % interval "
        f"from {MIN_SEEDS} seeds on].",
    )
    return Grid("The same settings, before any was chosen", heads, tuple(rows), notes)


def _ended(trials: Sequence[Trial], scenario: str, method: str, checkpoint: str) -> dict[tuple[int, str], Ended]:
    """(seed, setting) -> what came of it."""
    return {
        (seed, digest(t.setting)): Ended(excess <= 0 and enough, damage, kept)
        for t in trials
        if (t.scenario, t.method, t.checkpoint) == (scenario, method, checkpoint)
        for seed, kept, excess, damage, enough in zip(t.seeds, t.kept, t.excess, t.damage, t.enough, strict=True)
    }


def _cells(both: Mapping[tuple[int, str], tuple[Ended, Ended]]) -> tuple[str, ...]:
    n_settings, seeds = (len({key[i] for key in both}) for i in (1, 0))
    shares = [f"{np.mean([pair[side].good for pair in both.values()]) * 100:.0f} %" for side in (0, 1)]
    damage: dict[int, list[float]] = {}
    logs: dict[int, list[float]] = {}
    for (seed, _), (a, b) in both.items():
        damage.setdefault(seed, []).append(a.damage - b.damage)
        if a.good and b.good and a.kept and b.kept:
            logs.setdefault(seed, []).append(math.log(a.kept / b.kept))
    told = (_interval([float(np.mean(of)) for of in by.values()], ratio=by is logs) for by in (damage, logs))
    return (str(n_settings), str(seeds), " / ".join(shares), *told)


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
