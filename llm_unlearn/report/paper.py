"""Everything the published study of images shows, and what it lacks, as grids: for the page, for markdown, for JSON."""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.claims import claims, claims_grid
from llm_unlearn.report.course import frontier_grid, spread_grid, times_grid
from llm_unlearn.report.grid import Grid
from llm_unlearn.report.paper_table import by_place, differences, layout


def paper(outcomes: Sequence[Outcome]) -> list[Grid]:
    """Return the grids of all runs that have a test accuracy, by scenario: the published table; then for every
    architecture paired differences, times to gold's level, areas below frontiers, spread over seeds, and the published
    claims with their verdicts if there are seeds enough to judge one. [] where no run has one. Every architecture and
    scenario is judged on its own.
    """
    places = by_place([o for o in outcomes if o.number("test_acc") is not None])
    grids: list[Grid] = []
    for scenario in dict.fromkeys(place.scenario for place in places):
        mine = {place: runs for place, runs in places.items() if place.scenario == scenario}
        grids.append(layout(mine))
        for place, runs in mine.items():
            words, judged = place.words, claims(runs)
            found = (
                differences(runs, words=words),
                times_grid(runs, words=words),
                times_grid(runs, unit="seconds", words=words),
                times_grid(runs, unit="flops", words=words),
                frontier_grid(runs, words=words),
                frontier_grid(runs, relative=True, words=words),
                frontier_grid(runs, kept="test_acc", words=words),
                spread_grid(runs, words=words),
                claims_grid(judged, words) if any(j.effect for j in judged) else None,  # else too few seeds for each
            )
            grids += [grid for grid in found if grid is not None]
    return grids
