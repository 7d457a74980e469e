"""What happened on the way, checkpoint against checkpoint: how soon gold's forget level was reached, what was kept at
every forget level, and how much seeds differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llm_unlearn.eval.compare import paired_numbers
from llm_unlearn.eval.frontier import area, points
from llm_unlearn.eval.outcome import By, Outcome, Unit
from llm_unlearn.eval.reach import Time, horizon_of, log_rank, restricted_difference, survival
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import ALPHA, MIN_SEEDS
from llm_unlearn.report.paper_table import COLUMNS, PAIRS, checkpoints, present
from llm_unlearn.report.text import DASH, count, p_value
from llm_unlearn.stats import Difference, deviation_interval, holm, paired_difference, variance_ratio

Pairs = Sequence[tuple[str, str]]
MIN_SPREAD = 4  # seeds for an interval of a variance
Found = dict[tuple[str, str, str], Difference]  # (method, group, baseline)


def times_grid(
    outcomes: Sequence[Outcome],
    pairs: Pairs = PAIRS,
    unit: Unit = "updates",
    words: str = "",
    by: By | None = None,
) -> Grid | None:
    """Return how long it took to come down to the level that a run was held to, or to gold's forget accuracy:
    Kaplan-Meier median and restricted mean by method and checkpoint, and paired differences of the latter; None where
    no run was watched.

    Args:
        by: which of the two, as `Outcome.time_until`; None: as `judged_by`.
    """
    by = by or judged_by(outcomes)
    times = times_by_place(outcomes, by, unit)
    if not times:
        return None
    shown, found, ranks = present(outcomes, pairs), dict[tuple[str, str, str], Difference](), {}
    scale, unit_words = _scale(times, unit)
    for method in _methods(times):
        for group, baseline in shown:
            a, b = (times.get((method, kind), {}) for kind in (group, baseline))
            seeds = sorted(a.keys() & b.keys())
            if len(seeds) >= MIN_SEEDS:
                sides = [a[s] for s in seeds], [b[s] for s in seeds]
                runs = [o for o in outcomes if o.method == method and o.checkpoint in (group, baseline)]
                found[method, group, baseline] = restricted_difference(*sides, resolution=_interval(runs, by, unit))
                ranks[method, group, baseline] = log_rank(*sides)
    horizons = {
        m: horizon_of([t for key in times if key[0] == m for t in times[key].values()]) for m in _methods(times)
    }

    def shown_time(value: float) -> str:
        return count(round(value / scale, 1))

    def told(method: str, kind: str) -> str:
        mine = list(times.get((method, kind), {}).values())
        if not mine or horizons[method] <= 0:
            return DASH
        s = survival(mine, horizons[method])
        median = f"> {shown_time(s.horizon)}" if s.median is None else shown_time(s.median)
        return median if s.n == 1 else f"{median} (mean {shown_time(s.restricted_mean)}), {s.reached}/{s.n}"

    def also(key: tuple[str, str, str]) -> str:
        return "" if np.isnan(ranks[key]) else f"; log-rank {p_value(ranks[key])}"

    own = "the forget level, the same for all" if one_level(outcomes) else "the forget level, of each run's own gold"
    level = "gold's forget accuracy" if by == "acc" else own
    notes = (
        f"Median of the Kaplan-Meier curve (mean up to the {unit_words} every run of the method was watched for), runs "
        "that got there / all; of one run its own time. A run that never did counts to the end of the budget; one that "
        "broke down never gets there.",
        "Differences: of that mean, paired by seed [95 % interval], Holm over methods and pairs; the log-rank test "
        "beside it does not know the pairs.",
    )
    title = f"{unit_words[:1].upper()}{unit_words[1:]} to {level}" + (f": {words}" if words else "")
    return _grid(title, _methods(times), checkpoints(outcomes), shown, told, found, notes, also=also, scale=scale)


def held_to_levels(outcomes: Sequence[Outcome]) -> bool:
    """Whether every run was held to a forget level, of its own gold or the same for all."""
    return bool(outcomes) and all(o.target is not None for o in outcomes)


def judged_by(outcomes: Sequence[Outcome]) -> By:
    """Return by which level it is told when a run had forgotten: that which it was held to, where all were."""
    return "prob" if held_to_levels(outcomes) else "acc"


def one_level(outcomes: Sequence[Outcome]) -> bool:
    """Whether every run of a seed was held to the same forget level, whatever it started from."""
    targets: dict[tuple[str, int], set[float | None]] = {}
    for o in outcomes:
        targets.setdefault((o.scenario, o.seed), set()).add(o.target)
    return bool(targets) and all(len(found) == 1 and None not in found for found in targets.values())


def times_by_place(outcomes: Sequence[Outcome], by: By, unit: Unit) -> dict[tuple[str, str], dict[int, Time]]:
    """Return (method, checkpoint) -> seed -> time to the level (`Outcome.time_until`) of the runs that were watched."""
    out: dict[tuple[str, str], dict[int, Time]] = {}
    for o in outcomes:
        if (time := o.time_until(by, unit)) is not None:
            out.setdefault((o.method, o.checkpoint), {})[o.seed] = time
    return out


def frontier_limits(outcomes: Sequence[Outcome], forget: str = "forget_acc") -> tuple[float, float] | None:
    """Return the forget levels between which every run can be judged: the lowest of gold's or, of runs that were all
    held to one level of accuracy, that level, since none was tuned to go further; and the lowest of a start model's on
    the rows watched. None where they leave no room or are not known.
    """
    gold = [(o.metrics.get("forget_acc") or {}).get("gold") for o in outcomes]
    if one_level(outcomes) and all(o.target_by == "acc" for o in outcomes):
        gold = [o.target for o in outcomes]
    starts = [o.trajectory[0][forget] for o in outcomes if o.trajectory and forget in o.trajectory[0]]
    known = [g for g in gold if g is not None]
    return (min(known), min(starts)) if known and starts and min(known) < min(starts) else None


def frontier_areas(
    outcomes: Sequence[Outcome], kept: str = "retain_acc", relative: bool = False, forget: str = "forget_acc"
) -> dict[tuple[str, str], dict[int, float]]:
    """Return (method, checkpoint) -> seed -> area below the frontier of the run's trajectory, between `frontier_limits`
    of all runs given and between chance and 1; {} without limits.

    Args:
        kept: what stays, as trajectories name it.
        relative: as a share of the start model's, for checkpoints of different accuracy.
    """
    limits, out = frontier_limits(outcomes, forget), dict[tuple[str, str], dict[int, float]]()
    for o in outcomes if limits else ():
        found = points(o.trajectory, forget, kept, relative)
        chance = (o.metrics.get(kept.replace("_acc", "_chance")) or {}).get("value") or 0.0
        if limits and len(found):
            floor = chance / o.trajectory[0][kept] if relative else chance
            out.setdefault((o.method, o.checkpoint), {})[o.seed] = area(found, limits, (min(floor, 0.99), 1.0))
    return out


def frontier_grid(
    outcomes: Sequence[Outcome], pairs: Pairs = PAIRS, kept: str = "retain_acc", relative: bool = False, words: str = ""
) -> Grid | None:
    """Return the areas below the frontiers by method and checkpoint with paired differences; None where no run was
    watched between common forget levels.
    """
    areas, limits = frontier_areas(outcomes, kept, relative), frontier_limits(outcomes)
    if not areas or limits is None:
        return None
    shown, found = present(outcomes, pairs), dict[tuple[str, str, str], Difference]()
    for method in _methods(areas):
        for group, baseline in shown:
            a, b = (areas.get((method, kind), {}) for kind in (group, baseline))
            seeds = sorted(a.keys() & b.keys())
            if len(seeds) >= MIN_SEEDS:
                found[method, group, baseline] = paired_difference([a[s] for s in seeds], [b[s] for s in seeds])

    def told(method: str, kind: str) -> str:
        values = list(areas.get((method, kind), {}).values())
        sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{sd}" if values else DASH

    which = f"{kept.split('_')[0]} accuracy" + (" relative to the start's" if relative else "")
    notes = (
        f"Mean over forget accuracies from {limits[0]:.2f} (the lowest of gold's, or the level of all runs) to "
        f"{limits[1]:.2f} (the lowest start) of the best {which} of any step that forgot as far, on the rows watched "
        "on the way; ± standard deviation over seeds.",
        "Differences: paired by seed [95 % interval], Holm over methods and pairs.",
    )
    title = f"Area below the frontier of forget and {which}" + (f": {words}" if words else "")
    return _grid(title, _methods(areas), checkpoints(outcomes), shown, told, found, notes, digits=2)


def spread_grid(outcomes: Sequence[Outcome], pairs: Pairs = PAIRS, words: str = "") -> Grid | None:
    """Return the standard deviations over seeds and the ratios of variances between checkpoints; None below 4 seeds."""
    kinds, shown = checkpoints(outcomes), present(outcomes, pairs)
    methods = sorted({o.method for o in outcomes})
    ratios = {
        (measure, method, *pair): ratio
        for _, measure in COLUMNS
        for method in methods
        for pair in shown
        if (ratio := _ratio(outcomes, method, pair, measure)) is not None
    }
    corrected = dict(zip(ratios, holm([r.p for r in ratios.values()]) if ratios else (), strict=True))
    rows: list[Row] = []
    for head, measure in COLUMNS:
        part = [(m, [_deviation(outcomes, m, k, measure) for k in kinds]) for m in methods]
        part = [(m, cells) for m, cells in part if any(cell != DASH for cell in cells)]
        rows += [Row((f"{head}: standard deviation over seeds, percentage points",), "section")] if part else []
        for m, cells in part:
            told = (_times(ratios.get((measure, m, *p)), corrected.get((measure, m, *p))) for p in shown)
            rows.append(Row((m, *cells, *told)))
    if not rows:
        return None
    notes = (
        f"[95 % interval] of the deviation and of the ratio of variances: jackknife of their logarithm, the ratio's "
        f"paired by seed, Holm over all ratios; from {MIN_SPREAD} seeds on, where a side varies by more than one row.",
    )
    heads = ("method", *kinds, *(f"{g} / {b}: variances" for g, b in shown))
    return Grid("How much seeds differ" + (f": {words}" if words else ""), heads, tuple(rows), notes)


def _grid(
    title: str,
    methods: Sequence[str],
    kinds: Sequence[str],
    shown: Pairs,
    told: Callable[[str, str], str],
    found: Found,
    notes: tuple[str, ...],
    digits: int = 1,
    also: Callable[[tuple[str, str, str]], str] = lambda _: "",
    scale: float = 1.0,
) -> Grid:
    """Methods x checkpoints, and the differences of the pairs that have any; `scale` divides those."""
    pairs = [pair for pair in shown if any(key[1:] == pair for key in found)]
    corrected = dict(zip(found, holm([d.p for d in found.values()]) if found else (), strict=True))

    def difference(key: tuple[str, str, str]) -> str:
        if key not in found:
            return DASH
        d, p = found[key], float(corrected[key])
        star = " *" if p <= ALPHA else ""
        mean, lo, hi = (f"{value / scale:+.{digits}f}" for value in (d.mean, d.lo, d.hi))
        return f"{mean} [{lo}, {hi}], {p_value(p)}{also(key)}{star}"

    rows = [
        Row((m, *(told(m, k) for k in kinds), *(difference((m, group, base)) for group, base in pairs)))
        for m in methods
    ]
    heads = ("method", *kinds, *(f"{g} minus {b}" for g, b in pairs))
    return Grid(title, heads, tuple(rows), notes if pairs else notes[:1])


def _scale(times: dict[tuple[str, str], dict[int, Time]], unit: Unit) -> tuple[float, str]:
    """Return what times are divided by to be shown, and what they then are: operations come by the million or more."""
    if unit != "flops":
        return 1.0, unit
    most = max((time.at for by_seed in times.values() for time in by_seed.values()), default=0.0)
    return next(((s, f"{p}FLOPs") for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if most >= 10 * s), (1.0, "FLOPs"))


def _methods(places: dict[tuple[str, str], dict[int, float]] | dict[tuple[str, str], dict[int, Time]]) -> list[str]:
    return sorted({method for method, _ in places})


def _interval(outcomes: Sequence[Outcome], by: By, unit: Unit) -> float:
    """Largest time between two evaluations of a run: nothing finer is known."""
    steps = []
    for o in outcomes:
        end = o.time_until(by, unit)
        if end is not None and len(o.trajectory) > 1:
            per_update = o.time_until(by, "updates")
            scale = end.at / per_update.at if per_update is not None and per_update.at else 1.0
            steps.append(scale * (o.trajectory[1]["step"] - o.trajectory[0]["step"]))
    return max(steps, default=0.0)


def _ratio(outcomes: Sequence[Outcome], method: str, pair: tuple[str, str], measure: str) -> Difference | None:
    numbers, step = paired_numbers(outcomes, method, *pair, measure)
    if len(numbers) < MIN_SPREAD:
        return None
    a, b = zip(*numbers.values(), strict=True)
    try:
        return variance_ratio(a, b, resolution=step)
    except ValueError:  # neither side varies by more than a row
        return None


def _deviation(outcomes: Sequence[Outcome], method: str, kind: str, measure: str) -> str:
    mine = [o for o in outcomes if (o.method, o.checkpoint) == (method, kind)]
    values = [v for o in mine if (v := o.number(measure)) is not None]
    if len(values) < MIN_SPREAD:
        return DASH
    step = max(1.0 / max(o.metrics[measure]["n"], 1) for o in mine if measure in o.metrics)
    found = deviation_interval(values, resolution=step)
    return f"{100 * found.mean:.1f} [{100 * found.lo:.1f}, {100 * found.hi:.1f}]"


def _times(ratio: Difference | None, p: float | None) -> str:
    if ratio is None or p is None:
        return DASH
    star = " *" if p <= ALPHA else ""
    return f"{ratio.mean:.2g} [{ratio.lo:.2g}, {ratio.hi:.2g}], {p_value(p)}{star}"
