"""Secondary outcomes of a study: what they were, beside gold's and doing nothing's, and paired differences.

Exploratory: every interval stands on its own, and no test decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llm_unlearn.eval.compare import paired_numbers, summarise
from llm_unlearn.eval.outcome import KEPT_AT_LEVEL, LEAST_EXCESS, Outcome
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS, reference
from llm_unlearn.report.text import DASH, number
from llm_unlearn.stats import Difference, paired_difference

Pairs = Sequence[tuple[str, str]]
ByScenario = Mapping[str, Sequence[Outcome]]
INFERRED = "forget_inf_acc"
TEXT = {
    "forget_acc~gold": "distance to gold on forgotten questions (less is better)",
    "forget_Q_A_Prob~gold": "distance to gold in forget probability (less is better)",
    INFERRED: "indirect: held-out questions that need a forgotten fact",
    "forget_inf_acc~left": "the same, as a share of what the start model answers more than gold",
    "forget_about_acc": "indirect: two hops, the first of them a forgotten fact",
    "forget_through_acc": "indirect: asked of somebody else, through a forgotten fact",
    "forget_inverse_acc": "indirect: a forgotten fact asked backwards",
    "forget_para_acc": "forgotten questions in another wording",
    "relearn_acc": "relearning: forgotten facts that come back when others are told again",
    "relearn_prob": "relearning: their probability",
    "neighbour_acc": "kept facts that point to an author of whom something is forgotten",
    "retain_inf_acc": "kept two-hop questions",
    "model_utility": "model utility",
}
IMAGES = {
    "forget_acc~gold": "distance to gold on forgotten images (less is better)",
    "average_gap": "mean distance to gold in TA, RA and UA (less is better)",
    "holdout_acc": "indirect: images like the forgotten, never trained on",
    "bystander_acc": "images of classes nothing is forgotten of",
    "test_acc": "test images",
    "mia_loss": "membership by loss, AUC (.5: no more is known of the forgotten)",
    "mia_rmia": "membership by ratios, AUC",
}


def secondary_grid(outcomes: Sequence[Outcome], kinds: Sequence[str], pairs: Pairs) -> Grid | None:
    """Return every secondary measure of the runs of one request: means by method and checkpoint, in brackets gold's and
    doing nothing's, and the differences of the pairs; None without any.
    """
    wanted: Mapping[str, str] = IMAGES if any("test_acc" in o.metrics for o in outcomes) else TEXT
    rows: list[Row] = []
    for measure, words in wanted.items():
        part = []
        for method in sorted({o.method for o in outcomes}):
            cells = [_cell(outcomes, method, kind, measure) for kind in kinds]
            if any(cell != DASH for cell in cells):
                told = (_shown(_difference(outcomes, method, pair, measure)) for pair in pairs)
                part.append(Row((method, *cells, *told)))
        rows += [Row((words,), "section"), *part] if part else []
    if not rows:
        return None
    notes = (
        "Means over seeds (gold; doing nothing, of the same seeds). Of a distance to gold only doing nothing's. "
        f"Differences: paired by seed [95 % interval, each on its own]; {DASH}: not run, fewer than {MIN_SEEDS} seeds, "
        "or a side collapsed in one.",
    )
    if wanted is TEXT:
        share = "who infers more has more to leave, and this says how much of it is left"
        few = f"The share: without the seeds whose start model exceeds gold by less than {LEAST_EXCESS:.2f}; {share}."
        notes = (*notes, few)
    return Grid("Secondary outcomes", ("method", *kinds, *(f"{a} minus {b}" for a, b in pairs)), tuple(rows), notes)


def requests_grid(by_scenario: ByScenario, pairs: Pairs, measure: str = KEPT_AT_LEVEL) -> Grid | None:
    """Return the paired differences of the primary's measure for every request and method; None without any."""
    notes = (
        f"Paired by seed [95 % interval, each on its own], exploratory but for the primary's cells; {DASH}: fewer than "
        f"{MIN_SEEDS} seeds, not run, or a side collapsed in one.",
    )
    heads = tuple(f"{a} minus {b}" for a, b in pairs)
    return _by_request(
        by_scenario,
        lambda runs, method: [_shown(_difference(runs, method, pair, measure)) for pair in pairs],
        Grid(f"{measure}: all requests and checkpoints", ("method", *heads), (), notes),
    )


def levels_grid(by_scenario: ByScenario, kinds: Sequence[str], measure: str = INFERRED) -> Grid | None:
    """Return a measure's means for every request, method and checkpoint, gold's and doing nothing's in brackets; None
    without any.
    """
    words = (IMAGES if measure in IMAGES else TEXT).get(measure, measure)
    title = f"{words[:1].upper()}{words[1:]}: all requests and checkpoints"
    return _by_request(
        by_scenario,
        lambda runs, method: [_cell(runs, method, kind, measure) for kind in kinds],
        Grid(title, ("method", *kinds), (), ("Means over seeds (gold; doing nothing, of the same seeds).",)),
    )


def reached_grid(by_scenario: ByScenario, kinds: Sequence[str]) -> Grid | None:
    """Return how many runs came to their forget level, and what the models they delivered keep, for every request,
    method and checkpoint; None without any.
    """

    def cell(runs: Sequence[Outcome], method: str, kind: str) -> str:
        mine = [o for o in runs if (o.method, o.checkpoint) == (method, kind)]
        kept = summarise([o.number("retain_acc") for o in mine]).mean
        return f"{sum(o.at_target() is not None for o in mine)} of {len(mine)}; {number(kept)}" if mine else DASH

    notes = (
        "Runs that came to their gold's forget level on the way, of those that ended; mean accuracy on what is kept of "
        "the models that all of them delivered, whether they came to it or not.",
    )
    return _by_request(
        by_scenario,
        lambda runs, method: [cell(runs, method, kind) for kind in kinds],
        Grid("Came to the level, and kept: all requests and checkpoints", ("method", *kinds), (), notes),
    )


def _by_request(
    by_scenario: ByScenario, cells: Callable[[Sequence[Outcome], str], Sequence[str]], plain: Grid
) -> Grid | None:
    """Return a grid with a line for every request and method that has a cell; None without any."""
    rows: list[Row] = []
    for scenario, runs in by_scenario.items():
        found = {method: cells(runs, method) for method in sorted({o.method for o in runs})}
        part = [Row((method, *its)) for method, its in found.items() if set(its) - {DASH}]
        rows += [Row((scenario or "the one request",), "section"), *part] if part else []
    return replace(plain, rows=tuple(rows)) if rows else None


def _cell(outcomes: Sequence[Outcome], method: str, kind: str, measure: str) -> str:
    mine = [o for o in outcomes if (o.method, o.checkpoint) == (method, kind)]
    s = summarise([o.number(measure) for o in mine])
    if s.mean is None:
        return DASH
    if measure.endswith("~left"):
        return number(s.mean)
    who = ("start",) if "~" in measure else ("gold", "start")
    beside = [reference(mine, kind, measure, name).mean for name in who]
    return f"{number(s.mean)} ({'; '.join(number(v) for v in beside)})"


def _difference(outcomes: Sequence[Outcome], method: str, pair: tuple[str, str], measure: str) -> Difference | None:
    both, step = paired_numbers(outcomes, method, *pair, measure)
    if len(both) < MIN_SEEDS:
        return None
    a, b = zip(*both.values(), strict=True)
    return paired_difference(a, b, resolution=step)


def _shown(d: Difference | None) -> str:
    return DASH if d is None else f"{d.mean:+.2f} [{d.lo:+.2f}, {d.hi:+.2f}], n = {d.n}"
