"""Methods ranked by how near they come to gold, among those that keep what was to be kept.

A method that destroys the model forgets everything, so forgetting alone ranks nothing: who does not keep enough, or
collapsed in a seed, has a row and no rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_unlearn.eval.compare import Summary, summarise
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import Beside, reference, updates
from llm_unlearn.report.text import DASH, counted, mean, number

RETAIN_AT_LEAST = 0.80
FALL_AT_MOST = 0.10  # of two-hop questions that stay, or of utility where a suite has no accuracies, from the start's
REACHED_MARGIN = 0.10  # forget probability above gold's
STEP = ("step", "forget_prob", "retain_acc", "retain_inf_acc")
COLUMNS = (
    ("forget prob", "forget_Q_A_Prob"),
    ("forget acc", "forget_acc"),
    ("two-hop leak", "forget_inf_acc"),
    ("truth ratio", "forget_truth_ratio"),
    ("retain acc", "retain_acc"),
    ("retain two-hop", "retain_inf_acc"),
    ("utility", "model_utility"),
)


@dataclass(frozen=True)
class Standing:
    """A method at one scenario and checkpoint. `rank` counts from 1; None with the reason in `barred`."""

    scenario: str
    checkpoint: str
    method: str
    rank: int | None
    barred: str
    distance: Summary
    measures: Mapping[str, Summary]
    cpu_seconds: Summary
    reached: int
    """Seeds in which the evaluated model forgot down to gold's level plus .10 and kept what it had to."""
    best: Mapping[str, float] | None
    """Means over seeds of the step on the way that came nearest to `reached`: its numbers, and by how much it missed;
    None without runs.
    """
    runs: tuple[Outcome, ...]
    seeds: int
    """Seeds that any method has here: a method that failed in one has fewer runs."""


def standings(outcomes: Sequence[Outcome], scenario: str, methods: Sequence[str] = ()) -> list[Standing]:
    """Return every method at every checkpoint of one scenario, by checkpoint and rank, the barred ones last.

    `methods` are listed even where they have no run. The rank is that of the mean over seeds of `Outcome.distance`,
    smaller is better, among those that `holds` lets pass.
    """
    out: list[Standing] = []
    for checkpoint in dict.fromkeys(o.checkpoint for o in outcomes):
        there = [o for o in outcomes if o.checkpoint == checkpoint]
        names = dict.fromkeys([*methods, *(o.method for o in there)])
        by_method = {name: [o for o in there if o.method == name] for name in names}
        seeds = len({o.seed for o in there})
        rows = [_standing(scenario, checkpoint, method, runs, seeds) for method, runs in by_method.items()]
        ranked = sorted((s for s in rows if not s.barred), key=lambda s: (s.distance.mean, s.method))
        out += [_with_rank(s, i) for i, s in enumerate(ranked, 1)]
        out += sorted((s for s in rows if s.barred), key=lambda s: s.method)
    return out


def holds(runs: Sequence[Outcome], seeds: int) -> str:
    """Return why a method may not be ranked, an empty text if it may. Means over seeds are judged."""
    if any(o.collapsed for o in runs):
        return f"collapsed in {sum(o.collapsed for o in runs)}/{len(runs)}"
    if len(runs) < seeds:
        return f"only {len(runs)} of {seeds} seeds"
    if summarise([o.distance() for o in runs]).mean is None:
        return "no distance to gold"
    found = []
    kept = _mean([o.number("retain_acc") for o in runs])
    if kept is not None and kept < RETAIN_AT_LEAST:
        found.append(f"retain {kept:.2f} < {RETAIN_AT_LEAST:.2f}")
    has_accuracies = kept is not None
    fall = _mean([_fall(o, "retain_inf_acc" if has_accuracies else "model_utility") for o in runs])
    if fall is not None and fall > FALL_AT_MOST:
        found.append(f"{'two-hop retain' if has_accuracies else 'utility'} fell by {fall:.2f}")
    return ", ".join(found)


def reached(outcome: Outcome) -> bool:
    """Whether the evaluated model forgot down to gold's probability plus .10, kept at least .80 of the direct questions
    and lost at most .10 of the two-hop ones (without accuracies: of utility).
    """
    forget = outcome.metrics.get("forget_Q_A_Prob") or {}
    value, gold = forget.get("value"), forget.get("gold")
    if outcome.collapsed or value is None or gold is None or value > gold + REACHED_MARGIN:
        return False
    return not holds([outcome], 1)


def share_reached(found: Sequence[Standing], scenario: str, checkpoint: str) -> tuple[int, int]:
    """Return (methods that reached it in at least two thirds of the seeds, methods) at a scenario and checkpoint."""
    there = [s for s in found if (s.scenario, s.checkpoint) == (scenario, checkpoint)]
    return sum(3 * s.reached >= 2 * s.seeds for s in there), len(there)


def as_json(found: Sequence[Standing]) -> dict[str, Any]:
    """Return standings, gold, doing nothing and the shares as plain values for JSON."""
    places = list(dict.fromkeys((s.scenario, s.checkpoint) for s in found))
    rows = [
        {
            **{
                key: getattr(s, key)
                for key in ("scenario", "checkpoint", "method", "rank", "barred", "reached", "best")
            },
            "seeds": [o.seed for o in s.runs],
            "distance": asdict(s.distance),
            "cpu_seconds": asdict(s.cpu_seconds),
            "measures": {name: asdict(value) for name, value in s.measures.items()},
        }
        for s in found
    ]
    beside: list[dict[str, Any]] = []
    for scenario, checkpoint in places:
        outcomes = _outcomes(found, scenario, checkpoint)
        for who in ("start", "gold"):
            values = {m: asdict(reference(outcomes, checkpoint, m, who)) for _, m in COLUMNS}
            distance = asdict(_distance_of(outcomes, who))
            beside.append(
                {"scenario": scenario, "checkpoint": checkpoint, "who": who, "distance": distance, "measures": values}
            )
    shares = [
        {"scenario": a, "checkpoint": b, **dict(zip(("reached", "methods"), share_reached(found, a, b), strict=True))}
        for a, b in places
    ]
    return {"rows": rows, "beside": beside, "shares": shares}


def grids(found: Sequence[Standing]) -> list[Grid]:
    """Return the overview of ranks, one grid per scenario and checkpoint, and how near the others came."""
    places = list(dict.fromkeys((s.scenario, s.checkpoint) for s in found))
    missed = [s for s in found if 3 * s.reached < 2 * s.seeds]
    return [_overview(found, places), *(_detail(found, a, b) for a, b in places), _frontier(missed)]


def _standing(scenario: str, checkpoint: str, method: str, runs: Sequence[Outcome], seeds: int) -> Standing:
    names = [*(m for _, m in COLUMNS), "updates_to_target", "retain_at_target", "retain_inf_at_target"]
    return Standing(
        scenario=scenario,
        checkpoint=checkpoint,
        method=method,
        rank=None,
        barred=holds(runs, seeds),
        distance=summarise([o.distance() for o in runs]),
        measures={name: summarise([o.number(name) for o in runs]) for name in names},
        cpu_seconds=summarise([o.cost.get("cpu_seconds") for o in runs]),
        reached=sum(map(reached, runs)),
        best=_best_step(runs),
        runs=tuple(sorted(runs, key=lambda o: o.seed)),
        seeds=seeds,
    )


def _with_rank(standing: Standing, rank: int) -> Standing:
    return Standing(**{**vars(standing), "rank": rank})


def _best_step(runs: Sequence[Outcome]) -> dict[str, float] | None:
    """Return, averaged over runs, the step after the first evaluation that missed by least (on the watched subset)."""
    steps: list[dict[str, float]] = []
    for o in runs:
        gold = (o.metrics.get("forget_Q_A_Prob") or {}).get("gold")
        if gold is None or len(o.trajectory) < 2:
            continue
        lines = [{**line, "missed": _missed(line, o.trajectory[0], gold)} for line in o.trajectory[1:]]
        steps.append(min(lines, key=lambda line: line["missed"]))
    shared = [key for key in (*STEP, "missed") if steps and all(key in line for line in steps)]
    return {key: float(np.mean([line[key] for line in steps])) for key in shared} or None


def _missed(line: Mapping[str, float], start: Mapping[str, float], gold: float) -> float:
    """Return by how much the worst of the three conditions fails at a step; 0 where all are met."""
    fails = [0.0, line["forget_prob"] - gold - REACHED_MARGIN, RETAIN_AT_LEAST - line["retain_acc"]]
    if "retain_inf_acc" in line:
        fails.append(start["retain_inf_acc"] - FALL_AT_MOST - line["retain_inf_acc"])
    return max(fails)


def _overview(found: Sequence[Standing], places: Sequence[tuple[str, str]]) -> Grid:
    methods: dict[str, dict[tuple[str, str], Standing]] = {}
    for s in found:
        methods.setdefault(s.method, {})[s.scenario, s.checkpoint] = s

    def order(name: str) -> tuple[float, float, str]:
        ranked = [s for s in methods[name].values() if s.rank is not None]
        return (-len(ranked), _mean([s.distance.mean for s in ranked]) or 0.0, name)

    def told(s: Standing | None) -> str:
        if s is None:
            return DASH
        return f"{s.rank}: {number(s.distance.mean)}" if s.rank is not None else f"barred ({number(s.distance.mean)})"

    rows = [Row((m, *(told(methods[m].get(place)) for place in places))) for m in sorted(methods, key=order)]
    shares = (
        "Reached (forget probability at most gold's + .10, direct retain at least .80, two-hop retain within .10 of "
        "the start's, in at least two thirds of the seeds): "
        + "; ".join("{} {} {}/{}".format(a, b, *share_reached(found, a, b)) for a, b in places)
        + " methods."
    )
    notes = (
        "rank: distance to gold, the mean of the distances in forget accuracy, forget probability and two-hop leak. "
        "Sorted by the number of places a method is ranked at, then by mean distance there.",
        shares,
    )
    return Grid("Leaderboard", ("method", *(f"{a} {b}".strip() for a, b in places)), tuple(rows), notes)


def _detail(found: Sequence[Standing], scenario: str, checkpoint: str) -> Grid:
    there = [s for s in found if (s.scenario, s.checkpoint) == (scenario, checkpoint)]
    outcomes = _outcomes(found, scenario, checkpoint)
    columns = [(head, m) for head, m in COLUMNS if any(s.measures[m].mean is not None for s in there)]
    rows = []
    labels: dict[Beside, str] = {"gold": "gold", "start": "do nothing"}
    for who, label in labels.items():
        values = (mean(reference(outcomes, checkpoint, m, who)) for _, m in columns)
        rows.append(Row((label, "", mean(_distance_of(outcomes, who)), *values, "", "", ""), who))
    for s in there:
        values = (mean(s.measures[m]) for _, m in columns)
        rank = DASH if s.rank is None else str(s.rank)
        steps = updates(s.runs, s.measures["updates_to_target"])
        cells = (s.method, rank, mean(s.distance), *values, steps, mean(s.cpu_seconds, 0), s.barred)
        rows.append(Row(cells, "collapsed" if "collapsed" in s.barred else "method"))
    head = ("method", "rank", "distance to gold", *(h for h, _ in columns), "updates to target", "CPU s", "barred for")
    title = f"Forget {scenario}, from {checkpoint}, {counted(there[0].seeds, 'seed')}"
    return Grid(title, head, tuple(rows))


def _frontier(missed: Sequence[Standing]) -> Grid:
    rows = []
    for s in missed:
        at = s.best or {}
        numbers = (number(at.get(key)) for key in ("forget_prob", "retain_acc", "retain_inf_acc", "missed"))
        step = number(at.get("step"), 0)
        rows.append(Row((s.method, s.scenario, s.checkpoint, f"{s.reached}/{s.seeds}", step, *numbers)))
    head = (
        "method",
        "scenario",
        "checkpoint",
        "seeds",
        "step",
        "forget prob",
        "retain acc",
        "retain two-hop",
        "missed by",
    )
    notes = (
        "The step of each run that failed the three conditions by least (on the watched subset), mean over seeds.",
    )
    return Grid("What the others reached", head, tuple(rows), notes)


def _outcomes(found: Sequence[Standing], scenario: str, checkpoint: str) -> list[Outcome]:
    return [o for s in found if (s.scenario, s.checkpoint) == (scenario, checkpoint) for o in s.runs]


def _distance_of(outcomes: Sequence[Outcome], who: Beside) -> Summary:
    by_seed = {o.seed: 0.0 if who == "gold" else o.distance("start") for o in outcomes}
    return summarise(list(by_seed.values()))


def _fall(outcome: Outcome, name: str) -> float | None:
    line = outcome.metrics.get(name) or {}
    value, start = line.get("value"), line.get("start")
    return None if value is None or start is None else start - value


def _mean(values: Sequence[float | None]) -> float | None:
    return summarise(values).mean
