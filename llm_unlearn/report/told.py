"""What a reader has to know of a study before its tables: how it was made, what was reached, and every departure from
its design.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.report.results import StudyFile, Tuning
from llm_unlearn.report.text import counted

MOST, FEW = 12, 4  # items of a list that are named, and of one within a list


def told(file: StudyFile) -> list[str]:
    """Return the study's command, who grokked, its cost and machine, and then `departures`."""
    c = file.content
    rows = [row for row in c.trainings if "gold" not in row.run and "/" not in row.run]
    grokked = [row for row in rows if row.phase.startswith("grok")]
    ratios = [row.ratio for row in grokked if row.ratio]
    spread = f", {min(ratios):.1f} to {max(ratios):.1f} times as many steps as memorising took" if ratios else ""
    cost = "; ".join(f"{kind} {counted(spent.cells, 'cell')}, {spent.seconds:.0f} s" for kind, spent in c.cost.items())
    models = counted(len(rows), "model")
    who = f"{len(grokked)} of {models} grokked (the tuning seeds' included){spread}. " if rows else ""
    first = f"{file.name}: {who}{cost}."
    machines = dict.fromkeys(e.machine for e in (*c.environments_before, c.environment))
    return [f"`{c.command}`", f"{first} {', '.join(machines)}.", *departures(file)]


def departures(file: StudyFile) -> list[str]:
    """Return what is not as it was declared, or was not reached; nothing where all was."""
    c = file.content
    lines = [f"Changed on the command line: `{change}`." for design in c.designs if (change := _changed(design))]
    if len(c.designs) > 1:
        lines.append(f"Its cells were made under {len(c.designs)} designs: {', '.join(map(_named, c.designs))}.")
    if c.left_out:
        lines.append(f"No settings were found for, and so left out: {', '.join(c.left_out)}.")
    if missed := infeasible(c.tuned):
        lines.append(
            f"No setting tried came to the level with enough kept in more than half of the tuning draws: {missed}."
        )
    if c.censored:
        some = "; ".join(c.censored[:MOST]) + ("; ..." if len(c.censored) > MOST else "")
        lines.append(f"Never reached: {counted(len(c.censored), 'checkpoint')} of single seeds or golds ({some}).")
    if c.retrained_otherwise:
        some = ", ".join(c.retrained_otherwise[:MOST]) + (", ..." if len(c.retrained_otherwise) > MOST else "")
        lines.append(f"Trained again for further runs, and not the same as before: {some}.")
    if c.errors:
        named = [f"{label} ({why})" for label, why in list(c.errors.items())[:MOST]]
        some = "; ".join(named) + ("; ..." if len(c.errors) > MOST else "")
        lines.append(f"Failed: {counted(len(c.errors), 'cell')}: {some}.")
    unfinished = {how: n for how, n in c.cells.get("measured", {}).items() if how not in ("ok", "censored")}
    if unfinished:
        lines.append("Not finished: " + ", ".join(f"{n} cells {how}" for how, n in unfinished.items()) + ".")
    return lines


def designed(file: StudyFile) -> str:
    """Return under which design a study's cells were made."""
    if not (designs := file.content.designs):
        return "The cells do not say under which design file they were made."
    return f"Design: sha256 {', '.join(dict.fromkeys(map(_named, designs)))} of the study's file."


def infeasible(tuned: Sequence[Tuning]) -> str:
    """Return where tuning had to take the least bad setting, by method."""
    several = any(row.scenario for row in tuned)  # then the choices over all of them name none
    by_method: dict[str, list[str]] = {}
    for row in tuned:
        if row.score and not row.feasible_trials and (row.scenario or not several):
            by_method.setdefault(row.method, []).append(f"{row.scenario} {row.checkpoint}".strip())
    return "; ".join(f"{method} ({_some(places)})" for method, places in by_method.items())


def _some(places: Sequence[str]) -> str:
    more = len(places) - FEW
    return ", ".join(places[:FEW]) + (f" and {more} more" if more > 0 else "")


def _named(design: str) -> str:
    return design.partition(" with ")[0][:16]


def _changed(design: str) -> str:
    return design.partition(" with ")[2]
