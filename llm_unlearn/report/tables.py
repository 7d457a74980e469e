"""A comparison for the terminal, as markdown and as JSON; a run's answers; a model's metrics."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llm_unlearn.eval.compare import Comparison
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.primary import PrimaryResult
from llm_unlearn.report.answers import Said, answer_rows, pick_run
from llm_unlearn.report.grid import Grid
from llm_unlearn.report.grids import axes, cell, collapsed, grids, reference, runs_of, seeds_note
from llm_unlearn.report.text import DASH, number, printable
from llm_unlearn.report.words import words_of
from llm_unlearn.study.tune import Choice

STYLES = {"gold": "yellow", "start": "dim", "collapsed": "red", "method": ""}
PIPE_WIDTH = 160  # columns when nobody's terminal sets them


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the overview, one table per group and, from 3 seeds on, the paired differences.

    Gold and doing nothing have rows of their own at every checkpoint. Intervals appear from 2 seeds on; with fewer than
    3 the overview's caption says that paired differences need 3.
    """
    return [_rich(part) for grid in grids(comparison) for part in _by_section(grid)]


def markdown(comparison: Comparison) -> str:
    """Return the same tables as GitHub-flavoured markdown."""
    return grids_markdown(grids(comparison))


def grids_markdown(parts: Sequence[Grid], level: int = 3) -> str:
    """Return grids as GitHub-flavoured markdown, one below the other, with headings of that level."""
    return "\n\n".join(_markdown(grid, level) for grid in parts) + "\n"


def before_after(outcomes: Sequence[Outcome]) -> Table:
    """Return what the run `pick_run` chooses answers, before, after and gold: three forgotten, three kept items."""
    words, chosen = words_of(outcomes), pick_run(outcomes)
    rows = answer_rows(chosen) if chosen else []
    about = "" if chosen is None else f": {chosen.method} from {chosen.checkpoint}, seed {chosen.seed}"
    collapsed_too = " (COLLAPSED)" if chosen is not None and chosen.collapsed else ""
    table = _table(f"Before and after{about}{collapsed_too}")
    if not rows:
        table.add_row(words.nothing)
        return table
    table.add_column(words.item, ratio=3)
    for who in ("truth", "before", "after", "gold"):
        table.add_column(who, ratio=2)
    for forget in (True, False):
        table.add_row(Text("to be forgotten" if forget else "to be kept", style="bold"))
        for row in (r for r in rows if r.forget is forget):
            said = [_said(answer) for answer in (row.before, row.after, row.gold)]
            table.add_row(Text(printable(row.question)), Text(printable(row.truth)), *said)
        table.add_section()
    table.caption = (
        f"In brackets: the probability the model gives the true {words.answer}. Green: it is the true {words.answer}."
    )
    return table


def metrics_table(result: Mapping[str, Any]) -> Table:
    """Return the metrics of one evaluation (the content of a results.json), each beside gold's and doing nothing's."""
    table = _table(f"{result['model']}: suite {result['suite']}")
    table.add_column("metric")
    heads = ["value", "95 % interval", "gold", "do nothing", "n"]
    blind = any(line.get("blind") is not None for line in result["metrics"].values())
    for head in [*heads[:4], *(["no model"] if blind else []), heads[4]]:
        table.add_column(head, justify="right")
    table.add_column("unit")
    table.add_column("better")
    better = {"up": "higher", "down": "lower", "gold": "nearer gold"}
    for name, line in result["metrics"].items():
        interval = "" if line["ci"] is None else f"{line['ci'][0]:.3f} to {line['ci'][1]:.3f}"
        beside = [_exact(line.get(key)) for key in ("gold", "start", *(["blind"] if blind else []))]
        values = (_exact(line["value"]), interval, *beside, str(line["n"]))
        table.add_row(Text(printable(name)), *values, line["unit"], better[line["direction"]])
    return table


def probes_table(result: Mapping[str, Any]) -> Table:
    """Return the numbers of the probes a call ran (what `probe_model` returns), each beside its null."""
    table = _table(f"{result['model']}: probes")
    for head in ("probe", "what"):
        table.add_column(head)
    for head in ("value", "null, 95 %", "CPU s"):
        table.add_column(head, justify="right")
    for name in result["ran"]:
        found = result["probes"][name]
        for i, line in enumerate(found["lines"]):
            null = "" if line["null"] is None else f"{line['null'][0]:.3f} to {line['null'][1]:.3f}"
            told = line["value"]
            value = DASH if told is None or not math.isfinite(told) else _exact(told)
            cost = f"{found['cost']['cpu_seconds']:.1f}" if i == 0 else ""
            table.add_row(name if i == 0 else "", Text(printable(line["name"])), value, null, cost)
        table.add_section()
    return table


def tuned_table(found: Sequence[Choice]) -> Table:
    """Return what tuning chose, by checkpoint and method."""
    table = _table("Settings with the least damage that forget down to gold's level plus the margin")
    for i, head in enumerate(("scenario", "checkpoint", "method", "settings", "short", "damage", "feasible", "")):
        table.add_column(head, justify="right" if 4 <= i <= 6 else "left")
    for choice in found:
        scenario = Text(printable(choice.scenario)) if choice.scenario else "all"
        if choice.setting is None or choice.score is None:
            table.add_row(
                scenario, choice.checkpoint, Text(printable(choice.method)), DASH, DASH, DASH, DASH, "no result"
            )
            continue
        told = " ".join(f"{key.rsplit('.', 1)[-1]}={value:g}" for key, value in choice.setting.items()) or "(none)"
        flag = "" if choice.score.feasible else "not feasible: the nearest"
        numbers = (f"{choice.score.shortfall:.3f}", f"{choice.score.damage:+.3f}")
        feasible = f"{choice.feasible_trials}/{choice.trials}"
        row = (scenario, choice.checkpoint, Text(printable(choice.method)), Text(told))
        table.add_row(*row, *numbers, feasible, flag)
    table.caption = (
        "short: forget probability above gold's plus the margin; damage: fall of the kept answers' probability, direct "
        "and two-hop; feasible: trials that came down to that level in most draws with as much left as "
        "stop.floor asks."
    )
    return table


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values for JSON: every measure of every cell, gold, doing nothing, all contrasts."""
    methods, checkpoints = axes(comparison)
    cells = [
        {
            "method": m,
            "checkpoint": k,
            "runs": len(runs_of(comparison, m, k)),
            "collapsed": collapsed(comparison, m, k),
            "ends": [
                {"seed": o.seed, "stop": o.stop, "kept_faults": list(o.kept_faults), "cost": dict(o.cost)}
                for o in runs_of(comparison, m, k)
            ],
            "measures": {name: asdict(cell(comparison, m, k, name)) for name in comparison.measures},
        }
        for m in methods
        for k in checkpoints
        if runs_of(comparison, m, k)
    ]
    plain = [name for name in comparison.measures if "~" not in name and "_target" not in name]
    beside = {
        k: {
            who: {name: asdict(reference(comparison.outcomes, k, name, who)) for name in plain}
            for who in ("gold", "start")
        }
        for k in checkpoints
    }
    return _finite(
        {
            "by": comparison.by,
            "methods": list(methods),
            "checkpoints": list(checkpoints),
            "seeds": list(comparison.seeds),
            "cells": cells,
            "references": beside,
            "primary": None if comparison.primary is None else _primary(comparison.primary),
            "starts": [_start(comparison, k) for k in checkpoints],
            "contrasts": [asdict(c) for c in comparison.contrasts],
            "note": seeds_note(comparison),
        }
    )


def _primary(result: PrimaryResult) -> dict[str, Any]:
    contrasts = [asdict(x) for x in result.contrasts]
    return {"declared": result.declared.model_dump(mode="json"), "problem": result.problem, "contrasts": contrasts}


def _start(comparison: Comparison, checkpoint: str) -> dict[str, Any]:
    """What a checkpoint's models were to begin with, by seed."""
    models = {o.seed: o for o in reversed(comparison.outcomes) if o.checkpoint == checkpoint}
    keys = ("seed", "start_step", "start_train_acc", "start_held_out_acc")
    told = [{key: getattr(o, key) for key in keys} for _, o in sorted(models.items())]
    return {
        "checkpoint": checkpoint,
        "match": next((o.match for o in models.values() if o.match), None),
        "models": told,
    }


def show(tables: Sequence[RenderableType]) -> None:
    """Print tables on stdout, a blank line between them."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for i, table in enumerate(tables):
        if i:
            console.print()
        console.print(table)


def _table(title: str) -> Table:
    """An empty table without side walls: ten columns of numbers have to fit a terminal of 80."""
    return Table(
        title=Text(printable(title), style="bold"), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
    )  # fmt: skip


def _rich(grid: Grid) -> Table:
    table = _table(grid.title)
    if len(grid.columns) > 9:
        table.padding = 0
    for i, head in enumerate(grid.columns):
        table.add_column(Text(printable(head)), justify="right" if i else "left", no_wrap=i == 0)
    one_gold = sum(row.kind == "gold" for row in grid.rows) == 1
    for row in grid.rows:
        if row.kind == "start":
            table.add_section()
        label = row.cells[0].replace(" ", "\n") if row.kind == "collapsed" else row.cells[0]  # the flag below the name
        table.add_row(*(Text(printable(text)) for text in (label, *row.cells[1:])), style=STYLES[row.kind])
        if row.kind == "gold" and one_gold:
            table.add_section()
    table.caption = "\n".join(grid.notes) or None
    return table


def _by_section(grid: Grid) -> list[Grid]:
    """Split at section rows: their words would make a terminal's first column as wide as themselves."""
    starts = [i for i, row in enumerate(grid.rows) if row.kind == "section"]
    if not starts:
        return [grid]
    ends = [*starts[1:], len(grid.rows)]
    parts = [
        Grid(f"{grid.title}: {grid.rows[a].cells[0]}", grid.columns, grid.rows[a + 1 : b])
        for a, b in zip(starts, ends, strict=True)
    ]
    return [*parts[:-1], replace(parts[-1], notes=grid.notes)]


def _markdown(grid: Grid, level: int) -> str:
    def line(cells: Sequence[str]) -> str:
        # a name of a method is the user's: no cell may end a table or begin a tag
        return (
            "| "
            + " | ".join(printable(c).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for c in cells)
            + " |"
        )

    marks = {"section": "**", "gold": "*", "start": "*"}
    lines = [
        line(grid.columns),
        "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(grid.columns))) + "|",
    ]
    for row in grid.rows:
        mark = marks.get(row.kind, "")
        first = f"{mark}{row.cells[0]}{mark}"
        lines.append(line([first, *row.cells[1:], *[""] * (len(grid.columns) - len(row.cells))]))
    title, *notes = (printable(text).replace("<", "&lt;") for text in (grid.title, *grid.notes))
    return f"{'#' * level} {title}\n\n" + "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def _said(answer: Said | None) -> Text:
    if answer is None:
        return Text(DASH)
    share = "" if answer.probability is None else f" ({number(answer.probability)})"
    return Text(printable(answer.text) or "(nothing)", style="green" if answer.right else "") + Text(share, style="dim")


def _exact(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.2e}" if value != 0 and abs(value) < 1e-3 else f"{value:.3f}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
