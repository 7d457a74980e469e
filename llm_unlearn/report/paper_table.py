"""The published table in our numbers: architectures x methods x checkpoints, TA / RA / UA, gold and doing nothing among
the rows, and below it the paired differences that the published table lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.eval.compare import ORDER, Contrast, contrasts_between
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.grid import Grid, Row, RowKind
from llm_unlearn.report.grids import ALPHA, MIN_SEEDS
from llm_unlearn.report.text import DASH, p_value
from llm_unlearn.stats import mean_interval

COLUMNS = (("TA", "test_acc"), ("RA", "retain_acc"), ("UA", "forget_acc"))
ALSO = (("gap to gold", "average_gap"), ("balance", "unlearning_balance"))
CONTROLS = ("early", "fit", "fit_scaled", "fit_normed", "easy", "sam", "spline", "twin")
PAIRS = tuple(("grok", baseline) for baseline in CONTROLS)
"""What is contrasted by default: grokked minus every other sort of checkpoint."""
CONTRASTED = {
    "test_acc": "TA: test accuracy (more is better)",
    "retain_acc": "RA: retain accuracy (more is better)",
    "forget_acc": "UA: forget accuracy (to come near gold's)",
    "forget_acc~gold": "UA: distance to gold's (less is better)",
    "test_acc~drop": "fall of TA from doing nothing's (less is better)",
    "retain_acc~drop": "fall of RA from doing nothing's (less is better)",
    "average_gap": "mean distance to gold in TA, RA and UA (less is better)",
    "average_gap~drop": "by how much that is less than doing nothing's (more is better)",
    "unlearning_balance": "balance of forgetting and keeping (more is better)",
    "retain_at_target": "RA on the way, once forgotten down to gold's probability (more is better)",
}


@dataclass(frozen=True, order=True)
class Place:
    """What must be the same for runs to stand in one part of the table. Empty where runs do not say."""

    scenario: str
    architecture: str

    @property
    def words(self) -> str:
        """Architecture and scenario, as far as they are known."""
        return ", ".join(filter(None, (self.architecture, self.scenario and f"forget {self.scenario}")))


def by_place(outcomes: Sequence[Outcome]) -> dict[Place, list[Outcome]]:
    """Return the runs by scenario and architecture."""
    found: dict[Place, list[Outcome]] = {}
    for o in outcomes:
        found.setdefault(Place(o.scenario, o.architecture), []).append(o)
    return {place: found[place] for place in sorted(found)}


def layout(places: Mapping[Place, Sequence[Outcome]]) -> Grid:
    """Return the published layout of one scenario, in percent: mean ± standard deviation over seeds, and the 95 %
    interval of the mean in brackets.
    """
    rows = [row for place, runs in places.items() for row in _rows(place.architecture, runs)]
    scenario = next(iter(places)).scenario
    notes = [
        "Percent: mean ± standard deviation over seeds [95 % interval of the mean, Student t]. TA: held-out images "
        "outside what is forgotten; RA: kept training images; UA: forgotten images, to come near gold's, not near 0.",
        "gap to gold: mean distance to gold in TA, RA and UA. balance: harmonic mean of how far UA came from doing "
        "nothing's to gold's and of the shares of TA and RA that are left above chance.",
    ]
    if any("†" in row.cells[1] for row in rows):
        notes.append("† collapsed in that many seeds: hardly anything kept above chance.")
    title = "Table 1: accuracies after unlearning" + (f", forget {scenario}" if scenario else "")
    heads = ("architecture", "method", "checkpoint", "seeds", *(head for head, _ in (*COLUMNS, *ALSO)))
    return Grid(title, heads, tuple(rows), tuple(notes))


def differences(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]] = PAIRS, words: str = "") -> Grid | None:
    """Return the paired differences between checkpoints in percentage points, by measure and method, Holm-corrected
    over the methods and pairs of a measure; None where no pair has enough seeds.
    """
    shown = present(outcomes, pairs)
    found = {
        (c.measure, c.method, c.group, c.baseline): c for c in contrasts_between(outcomes, shown, list(CONTRASTED))
    }
    shown = [pair for pair in shown if any(key[2:] == pair for key in found)]
    rows: list[Row] = []
    for measure, told in CONTRASTED.items():
        members = sorted({key[1] for key in found if key[0] == measure})
        rows += [Row((told,), "section")] if members else []
        for m in members:
            rows.append(Row((m, *(_points(found.get((measure, m, *pair))) for pair in shown))))
    if not rows:
        return None
    notes = (
        f"Percentage points: mean over the seeds both have [95 % interval, Student t on the differences]; p corrected "
        f"by Holm over the methods and pairs of a measure; * marks p <= {ALPHA}.",
        f"{DASH}: fewer than {MIN_SEEDS} seeds, or a side collapsed in one, or never came down to the target.",
    )
    columns = ("method", *(f"{group} minus {baseline}" for group, baseline in shown))
    return Grid("Paired differences" + (f": {words}" if words else ""), columns, tuple(rows), notes)


def present(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs of which both checkpoints have runs."""
    have = {o.checkpoint for o in outcomes}
    return [pair for pair in pairs if have.issuperset(pair)]


def checkpoints(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the checkpoints that have runs, in the order they are shown."""
    return in_order({o.checkpoint for o in outcomes})


def in_order(checkpoints: Collection[str]) -> list[str]:
    """Return names of checkpoints in the order they are shown, those that are not known last."""
    known = {name: i for i, name in enumerate(dict.fromkeys((*ORDER, *CONTROLS)))}
    return sorted(checkpoints, key=lambda name: (known.get(name, len(known)), name))


def _rows(architecture: str, runs: Sequence[Outcome]) -> list[Row]:
    order = checkpoints(runs)
    rows = [_beside_row(architecture, runs, k, who) for who in ("start", "gold") for k in order]
    for method in sorted({o.method for o in runs}):
        for kind in order:
            mine = [o for o in runs if (o.method, o.checkpoint) == (method, kind)]
            broken = sum(o.collapsed for o in mine)
            if mine:
                values = [_told([o.number(m) for o in mine]) for _, m in (*COLUMNS, *ALSO)]
                label = f"{method} †{broken}/{len(mine)}" if broken else method
                cells = (architecture or DASH, label, kind, str(len(mine)), *values)
                rows.append(Row(cells, "collapsed" if broken else "method"))
    return rows


def _beside_row(architecture: str, runs: Sequence[Outcome], kind: str, who: RowKind) -> Row:
    """Gold, or doing nothing, at a checkpoint: every method of a seed was set beside the same models."""
    one = {o.seed: o for o in runs if o.checkpoint == kind}
    values = [_told([(o.metrics.get(m) or {}).get(who) for o in one.values()]) for _, m in (*COLUMNS, *ALSO[:1])]
    label = "original" if who == "start" else "gold (retrained)"
    return Row((architecture or DASH, label, kind, str(len(one)), *values, ""), who)


def _told(numbers: Sequence[float | None]) -> str:
    values = 100 * np.array([v for v in numbers if v is not None], dtype=np.float64)
    if not len(values):
        return DASH
    if len(values) == 1:
        return f"{values[0]:.1f}"
    interval = mean_interval(values)
    short = "" if len(values) == len(numbers) else f", n = {len(values)}"
    return f"{interval.mean:.1f} ± {values.std(ddof=1):.1f} [{interval.lo:.1f}, {interval.hi:.1f}]{short}"


def _points(c: Contrast | None) -> str:
    if c is None:
        return DASH
    star = " *" if c.p_holm <= ALPHA else ""
    return f"{100 * c.mean:+.1f} [{100 * c.lo:+.1f}, {100 * c.hi:+.1f}], {p_value(c.p_holm)}, n = {c.n}{star}"
