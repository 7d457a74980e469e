"""Interventions on how much gradients have in common: models pushed apart or together, beside shams, and projections.

If alignment decides what forgetting costs, a model whose gradients were pushed apart keeps more than one trained as
long without the push, one whose gradients were pushed together keeps less, and projecting the forget gradient while
forgetting shrinks what is between checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llm_unlearn.eval.compare import paired_numbers
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.answer import state
from llm_unlearn.report.course import times_grid
from llm_unlearn.report.design import primary, starts
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS
from llm_unlearn.report.paper_table import checkpoints
from llm_unlearn.report.probe_table import moved_grid
from llm_unlearn.report.results import StudyFile
from llm_unlearn.report.secondary import secondary_grid
from llm_unlearn.report.section import Section, Studied, behind
from llm_unlearn.report.text import DASH, listed
from llm_unlearn.report.told import designed, told
from llm_unlearn.stats import Difference, paired_difference

Pair = tuple[str, str]
GAP: Pair = ("grok", "fit")
GAPS = {
    "kept_at_level": "kept at the forget level",
    "forget_inf_acc~left": "indirect: share of what the start model answers more than gold",
}


class Gap(NamedTuple):
    """What is between two checkpoints with a method, with the same method projected, and what the projection adds."""

    plain: Difference
    projected: Difference
    added: Difference


def interventions(s: Studied) -> Section:
    """Return the section about a study whose checkpoints are interventions beside their shams."""
    runs = s.file.of(s.file.scenario)
    text = [*told(s.file), designed(s.file), *_said(s), *_gap_said(s.file, runs)]
    again = s.file.path.stem.partition("_")[2]
    title = "Interventions on gradients" + (f": {again}, on other seeds" if again else "")
    if s.comparison is None:
        return Section(title, (*text, "No run has ended."))
    kinds = checkpoints(runs)
    pairs = [*s.pairs, *((GAP,) if set(GAP) <= set(kinds) else ())]
    grids = [
        *primary(s.comparison),
        behind(s),
        *starts(s.comparison, kinds),
        moved_grid(s.file.content.probes, pairs),
        projection_grid(s.file, runs),
        times_grid(runs, pairs),
        secondary_grid(runs, kinds, pairs),
    ]
    return Section(title, tuple(text), grids=tuple(g for g in grids if g is not None and g.rows))


def projected_methods(file: StudyFile) -> list[tuple[str, str, str]]:
    """Return (method, the same with a wrapper around its gradients, wrapper) of a study that has both."""
    found = []
    for name, values in file.content.study.methods.items():
        method = (values or {}).get("method") or {}
        plain, wrapper = method.get("name"), method.get("gradient")
        if wrapper and plain != name and plain in file.content.study.methods:
            found.append((plain, name, wrapper))
    return found


def gap(outcomes: Sequence[Outcome], plain: str, projected: str, measure: str, pair: Pair = GAP) -> Gap | None:
    """Return what is between two checkpoints with a method and with its projected form, over the seeds that have all
    four runs; None for fewer than `MIN_SEEDS`.
    """
    found = [paired_numbers(outcomes, name, *pair, measure) for name in (plain, projected)]
    seeds = sorted(found[0][0].keys() & found[1][0].keys())
    if len(seeds) < MIN_SEEDS:
        return None
    gaps, between = [], []
    for values, step in found:
        late, early = zip(*(values[seed] for seed in seeds), strict=True)
        gaps.append(paired_difference(late, early, resolution=step))
        between.append([a - b for a, b in zip(late, early, strict=True)])
    step = math.hypot(*(step for _, step in found))  # each of the two is a difference of two rounded numbers
    return Gap(gaps[0], gaps[1], paired_difference(between[1], between[0], resolution=step))


def shrinks(found: Gap) -> str:
    """Say by rule whether a projection shrinks what is between two checkpoints: the intervals decide."""
    plain, projected, added = found
    if plain.lo <= 0 <= plain.hi:
        return "cannot tell whether there is anything between them"
    if added.lo <= 0 <= added.hi:
        return "cannot tell"
    if (added.mean > 0) == (plain.mean > 0):
        return "grows"
    turned = (projected.mean > 0) != (plain.mean > 0)
    if turned and (projected.lo > 0 or projected.hi < 0):
        return "turns round"
    return "shrinks"


def projection_grid(file: StudyFile, outcomes: Sequence[Outcome]) -> Grid | None:
    """Return what is between grok and fit with every method and with its projected form; None without such methods."""
    rows: list[Row] = []
    for measure, words in GAPS.items():
        part = []
        for plain, projected, wrapper in projected_methods(file):
            if (found := gap(outcomes, plain, projected, measure)) is None:
                part.append(Row((f"{plain}, {wrapper}", *[DASH] * 4)))
            else:
                part.append(Row((f"{plain}, {wrapper}", *map(_shown, found), shrinks(found))))
        rows += [Row((words,), "section"), *part] if part else []
    if not rows:
        return None
    heads = ("method, projection", "grok minus fit", "the same, projected", "projected less plain", "verdict")
    notes = (
        f"Paired by seed, over the seeds that have all four runs [95 % interval, each on its own]; {DASH}: fewer than "
        f"{MIN_SEEDS}, or a side collapsed in one. Shrinks (grows): what is between the checkpoints is surely not 0 "
        "without the projection, and the projection surely moves it towards 0 (away from it); turns round: surely to "
        "the other side. Chance that makes the first large also makes the last column small.",
    )
    return Grid("Projecting the gradients while forgetting", heads, tuple(rows), notes)


def _said(s: Studied) -> list[str]:
    """What came of every declared pair, by the rule that also judges the studies' answer."""
    if (result := s.primary) is None:
        return []
    if result.problem:
        return [f"The declared contrasts were not judged: {result.problem}."]
    words = {"more": "more", "less": "less", "same": f"the same within {result.declared.bound:g}"}
    lines = []
    for group, baseline in result.declared.contrasts:
        parts = []
        for c in result.contrasts:
            if (c.group, c.baseline) == (group, baseline):
                told = words.get(state(c, result.declared.alpha), "cannot tell")
                parts.append(f"{told if c.mean is not None else f'not testable ({c.why})'} with {c.method}")
        lines.append(f"`{group}` keeps, beside `{baseline}`: {listed(parts)}.")
    return lines


def _gap_said(file: StudyFile, runs: Sequence[Outcome]) -> list[str]:
    """Whether projecting shrinks what is between grok and fit, a sentence a measure."""
    lines = []
    for measure, words in GAPS.items():
        found = [(plain, gap(runs, plain, projected, measure)) for plain, projected, _ in projected_methods(file)]
        parts = [f"{shrinks(g)} with {plain}" for plain, g in found if g is not None]
        lines += [f"Projected, what is between `grok` and `fit` ({words}): {listed(parts)}."] if parts else []
    return lines


def _shown(d: Difference) -> str:
    return f"{d.mean:+.2f} [{d.lo:+.2f}, {d.hi:+.2f}], n = {d.n}"
