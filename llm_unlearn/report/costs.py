"""What grokking costs beside memorising, what a request then costs, and from how many requests on it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from llm_unlearn.eval.breakeven import NEVER, BreakEven, break_even
from llm_unlearn.eval.outcome import Outcome, Unit
from llm_unlearn.eval.reach import horizon_of
from llm_unlearn.report.course import judged_by, times_by_place
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.results import StudyFile, Training
from llm_unlearn.report.text import DASH, count
from llm_unlearn.stats import mean_interval

Currency = Literal["flops", "cpu_seconds"]
SPENT_BY: dict[Currency, Unit] = {"flops": "flops", "cpu_seconds": "seconds"}
"""What a training took -> the same of unlearning; its seconds are of the clock, on one thread."""
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))


def training_cost(
    trainings: Sequence[Training], outcomes: Sequence[Outcome], checkpoint: str, currency: Currency
) -> dict[int, float]:
    """Return seed -> what training took up to a checkpoint, in proportion to its step; seeds where that is not known
    are not in it.
    """
    rows, out = {row.run: row for row in trainings}, {}
    for o in outcomes:
        label = f"{checkpoint}/seed{o.seed}" if o.control else f"seed{o.seed}"
        row = rows.get(label)
        total = None if row is None else getattr(row, currency)
        if o.checkpoint == checkpoint and row is not None and total is not None and o.start_step and row.steps:
            out[o.seed] = total * o.start_step / row.steps
    return out


def request_cost(
    outcomes: Sequence[Outcome], method: str, group: str, baseline: str, unit: Unit
) -> dict[int, tuple[float, float]]:
    """Return seed -> what a request took down to the forget level from two checkpoints; a run that never came to it
    takes all the time that every run was watched for.
    """
    mine = [o for o in outcomes if o.method == method]
    times = times_by_place(mine, judged_by(outcomes), unit)
    a, b = times.get((method, group), {}), times.get((method, baseline), {})
    seeds = sorted(a.keys() & b.keys())
    limit = horizon_of([side[s] for side in (a, b) for s in seeds])
    return {s: tuple(min(t.at, limit) if t.reached else limit for t in (a[s], b[s])) for s in seeds}  # type: ignore[misc]


def paid_back(
    file: StudyFile, method: str, group: str, baseline: str, currency: Currency, scenario: str | None = None
) -> BreakEven | None:
    """Return the break-even number of requests of a method; None where no seed has all four costs."""
    outcomes = file.of(file.scenario if scenario is None else scenario)
    dear, cheap = (training_cost(file.content.trainings, outcomes, kind, currency) for kind in (group, baseline))
    asked = request_cost(outcomes, method, group, baseline, SPENT_BY[currency])
    seeds = sorted(dear.keys() & cheap.keys() & asked.keys())
    if not seeds:
        return None
    return break_even([dear[s] - cheap[s] for s in seeds], [asked[s][1] - asked[s][0] for s in seeds])


def training_grid(file: StudyFile) -> Grid:
    """Return what training took to every checkpoint, means over seeds."""
    outcomes = file.of(file.scenario)
    kinds = [k for k in dict.fromkeys(o.checkpoint for o in outcomes)]
    found = {c: {k: training_cost(file.content.trainings, outcomes, k, c) for k in kinds} for c in SPENT_BY}
    scale, prefix = _prefix([v for by_seed in found["flops"].values() for v in by_seed.values()])
    rows = []
    for kind in kinds:
        cells = (_mean(found["flops"][kind], scale), _mean(found["cpu_seconds"][kind], 1.0))
        rows.append(Row((kind, str(len(found["cpu_seconds"][kind])), *cells)))
    notes = (
        "Up to the checkpoint, in proportion to its step of the run, evaluation on the way included in the seconds; "
        "means over seeds [95 % interval]. fit_scaled and fit_normed are made from fit at no cost, but need grok to be "
        "made like.",
    )
    return Grid("What training took", ("checkpoint", "seeds", f"{prefix}FLOPs", "CPU seconds"), tuple(rows), notes)


def break_even_grid(file: StudyFile, methods: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Grid | None:
    """Return a line per pair of checkpoints and method: extra training, saved per request, break-even, in FLOPs and in
    seconds; None where no seed has the numbers.
    """
    rows: list[Row] = []
    for group, baseline in pairs:
        part = []
        for method in methods:
            found: Mapping[Currency, BreakEven | None] = {
                c: paid_back(file, method, group, baseline, c) for c in SPENT_BY
            }
            if any(found.values()):
                n = max(b.n for b in found.values() if b)
                cells = [text for currency, b in found.items() for text in _told(b, currency)]
                part.append(Row((method, str(n), *cells)))
        rows += [Row((f"{group} rather than {baseline}",), "section"), *part] if part else []
    if not rows:
        return None
    heads = ("extra training", "saved per request", "break-even requests")
    columns = ("method", "seeds", *(f"{head}, {unit}" for unit in ("FLOPs", "seconds") for head in heads))
    notes = (
        "A request: what it took to come down to the forget level; a run that never did takes all the time that was "
        "watched. Saved below 0: lost. Break-even: mean extra over mean saved [95 % interval, bootstrap over seeds]; "
        "never: nothing is saved. Every number in the unit of its columns; seconds of training are of one CPU thread.",
    )
    return Grid("From how many requests on grokking pays", columns, tuple(rows), notes)


def requests_in_words(b: BreakEven) -> str:
    """Return the break-even number with its interval."""
    text = _requests(b.requests)
    return text if b.lo is None or b.hi is None else f"{text} [{_requests(b.lo)}, {_requests(b.hi)}]"


def _told(b: BreakEven | None, currency: Currency) -> tuple[str, str, str]:
    if b is None:
        return (DASH, DASH, DASH)
    if currency == "cpu_seconds":
        return f"{b.extra:+,.1f}", f"{b.saved:+,.2f}", requests_in_words(b)
    return _flops(b.extra), _flops(b.saved), requests_in_words(b)


def _flops(value: float) -> str:
    scale, prefix = _prefix([abs(value)])
    return f"{value / scale:+,.3g} {prefix}".strip()


def _requests(value: float) -> str:
    return "never" if value == NEVER else count(round(value, 1) if value < 10 else float(round(value)))


def _mean(by_seed: Mapping[int, float], scale: float) -> str:
    values = np.array(list(by_seed.values())) / scale
    if not len(values):
        return DASH
    if len(values) == 1:
        return f"{values[0]:,.1f}"
    found = mean_interval(values)
    return f"{found.mean:,.1f} [{found.lo:,.1f}, {found.hi:,.1f}]"


def _prefix(values: Sequence[float]) -> tuple[float, str]:
    most = max(values, default=0.0)
    return next(((scale, name) for scale, name in PREFIXES if most >= scale), (1.0, ""))


def training_ratios(file: StudyFile, group: str, baseline: str) -> list[float]:
    """Return how many times as much training a checkpoint took as another, by seed; FLOPs, or CPU seconds where a file
    has none.
    """
    outcomes, trainings = file.of(file.scenario), file.content.trainings
    for currency in SPENT_BY:
        a, b = (training_cost(trainings, outcomes, kind, currency) for kind in (group, baseline))
        if found := [a[s] / b[s] for s in sorted(a.keys() & b.keys()) if b[s] > 0]:
            return found
    return []
