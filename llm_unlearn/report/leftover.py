"""What is left of what was to be forgotten, asked for directly and by way of other questions, as a figure a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_unlearn.eval.compare import summarise
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.grids import reference
from llm_unlearn.report.plots import COLOURS, MARKERS, WIDE, as_svg, colour_of, figure, key, legend_below
from llm_unlearn.report.text import listed

ASKED = {
    "forget_acc": "the forgotten fact itself",
    "forget_para_acc": "in another wording",
    "forget_inverse_acc": "backwards",
    "forget_about_acc": "two hops, the first forgotten",
    "forget_through_acc": "two hops, the second forgotten",
    "forget_inf_acc": "any held-out question that needs it",
}
"""Measure -> how the forgotten was asked for."""


def left_over(outcomes: Sequence[Outcome], methods: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """Return method -> SVG: by way of asking, the share still answered after unlearning from each checkpoint (mean and
    95 % interval over seeds), before it (hollow) and by gold (star); only of methods asked in more than one way.
    """
    panels = {}
    for method in methods:
        runs = [o for o in outcomes if o.method == method and o.checkpoint in kinds]
        asked = {m: words for m, words in ASKED.items() if any(o.number(m) is not None for o in runs)}
        if len(asked) > 1:
            panels[method] = _panel(method, runs, asked, [k for k in kinds if any(o.checkpoint == k for o in runs)])
    return panels


def _panel(method: str, runs: Sequence[Outcome], asked: Mapping[str, str], kinds: Sequence[str]) -> str:
    with figure(1.1 + 0.55 * len(asked), WIDE) as (fig, ax):
        apart = 0.66 / max(len(kinds), 1)
        for row, measure in enumerate(asked):
            for i, kind in enumerate(kinds):
                _marks(ax, row + (i - (len(kinds) - 1) / 2) * apart, [o for o in runs if o.checkpoint == kind], measure)
        ax.set_yticks(range(len(asked)), list(asked.values()))
        ax.set(xlim=(-0.02, 1.04), ylim=(len(asked) - 0.5, -0.5), xlabel=f"share answered, {method}")
        ax.grid(axis="x", color=COLOURS["faint"], linewidth=0.6)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        handles = [key(colour_of(kind), MARKERS.get(kind, "o"), kind) for kind in kinds]
        handles += [key(COLOURS["ink"], "o", "before", hollow=True), key(COLOURS["ink"], "*", "gold", size=10)]
        legend_below(fig, handles)
        return as_svg(fig, f"left-{method}", f"What is left of the forgotten with {method} from {listed(kinds)}")


def _marks(ax: Any, y: float, runs: Sequence[Outcome], measure: str) -> None:
    if not runs:
        return
    kind, summary = runs[0].checkpoint, summarise([o.number(measure) for o in runs])
    colour, mark = colour_of(kind), MARKERS.get(kind, "o")
    if summary.lo is not None and summary.hi is not None:
        ends = [max(0.0, summary.lo), min(1.0, summary.hi)]
        ax.plot(ends, [y, y], color=colour, lw=2.0, solid_capstyle="round", zorder=2)
    if summary.mean is not None:
        ax.plot(summary.mean, y, mark, color=colour, ms=6, zorder=4)
    before, gold = (reference(runs, kind, measure, beside).mean for beside in ("start", "gold"))
    if before is not None:
        ax.plot(before, y, mark, mfc="none", mec=colour, ms=6, zorder=3, clip_on=False)
    if gold is not None:
        ax.plot(gold, y, "*", color=colour, mec=COLOURS["ink"], mew=0.6, ms=10, zorder=3, clip_on=False)
