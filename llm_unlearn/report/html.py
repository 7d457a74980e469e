"""One self-contained page about runs and studies: no script, nothing fetched, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from llm_unlearn import __version__
from llm_unlearn.files import write_atomic
from llm_unlearn.methods.needs import knobs
from llm_unlearn.methods.table import METHODS
from llm_unlearn.report import plots
from llm_unlearn.report.answers import answer_rows, pick_run
from llm_unlearn.report.collect import GrokRun, ReportData, paired, report_data
from llm_unlearn.report.design import primary, starts
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import axes, contrasts, detail, ends, overview
from llm_unlearn.report.paper import paper
from llm_unlearn.report.text import DASH, count, number, printable
from llm_unlearn.report.verdict import verdict
from llm_unlearn.report.words import words_of

__all__ = ["render", "report_data", "write_report"]

# where a run lies and what it was started from differ between any two runs and explain nothing
UNTOLD = ("out", "model", "gold", "seed", "method.name")


def write_report(paths: Sequence[Path], out: Path, scenario: str | None = None) -> Path:
    """Write the page about everything below the paths to `out` (atomically) and return `out`; of a study of several
    requests about one `scenario`.

    Raises UserError when there is nothing to report or `out` cannot be written.
    """
    write_atomic(out, render(report_data(paths, scenario)).encode())
    return out


def render(data: ReportData) -> str:
    """Return the page as text."""
    c, chosen = data.comparison, pick_run(data.outcomes)
    words = words_of(data.outcomes)
    answers = answer_rows(chosen, words.shown, with_pictures=True) if chosen else []
    updates = plots.updates_to_target(c) if c else None
    return template("template.html").render(
        version=__version__,
        verdict=verdict(data),
        chosen=chosen,
        words=words,
        answers=[
            (to_be, [row for row in answers if row.forget is f]) for f, to_be in ((True, "forgotten"), (False, "kept"))
        ],
        has_answers=bool(answers),
        training=training_grid(data.runs) if data.runs else None,
        curves=_markup(plots.training_curves(data.runs)),
        overview=overview(c) if c else None,
        primary=primary(c) if c else [],
        starts=starts(c, axes(c)[1]) if c else [],
        details=[*(detail(c, group) for group in c.groups), *ends(c)] if c else [],
        contrasts=contrasts(c) if c and c.contrasts else None,
        published=paper(data.outcomes),
        frontiers=_markup(plots.frontiers(c)) if c else {},
        updates=Markup(updates) if updates else None,
        methods=methods_used(data),
        configs=data.configs,
        environments=[_environment(e) for e in data.environments],
    )


def template(name: str) -> Template:
    """Return a template of this package: every text escaped, nothing undefined let pass."""
    source = resources.files("llm_unlearn.report")
    env = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_readable,
        loader=FunctionLoader(lambda part: source.joinpath(part).read_text(encoding="utf-8")),
    )  # fmt: skip
    return env.get_template(name)


def training_grid(runs: Sequence[GrokRun]) -> Grid:
    """Return when each run memorised and when it generalised, its gold right below it."""
    rows = []
    for pair in paired(runs):
        for run in (r for r in pair if r is not None):
            r = run.report
            never = f"not in {run.step:,}"
            # an easy task has nothing left to rise by after fit, where the level is taken relative to that rise
            no_jump = "no jump" if run.generalised_at_once else never
            cells = (
                run.name,
                never if r["t_fit"] is None else count(r["t_fit"]),
                no_jump if r["t_gen"] is None else count(r["t_gen"]),
                number(r["ratio"], 1),
                r["phase"] if run.grokked else f"{r['phase']} (not grokked)",
                ", ".join(f"{kind} {step:,}" for kind, step in run.marks.items()) or DASH,
                ", ".join(dict.fromkeys(event["kind"] for event in r["events"])) or DASH,
            )
            rows.append(Row(cells, "gold" if run.gold else "method"))
    notes = (
        "t_fit: training accuracy holds .99; t_gen: held-out accuracy holds the level of grokking; "
        "ratio: t_gen / t_fit. A run that did not get there within its steps is censored, not dropped; no jump: it "
        "generalised as it memorised.",
    )
    return Grid("Runs", ("run", "t_fit", "t_gen", "ratio", "phase", "checkpoints", "events"), tuple(rows), notes)


def methods_used(data: ReportData) -> list[dict[str, Any]]:
    """Return name, formula, source, note and settings of every method with an outcome.

    Settings: learning rate and updates, and whatever else is not the same for all of them.
    """
    names = sorted({o.method for o in data.outcomes})
    told = [data.settings[name] for name in names if name in data.settings]
    keys = {key for flat in told for key in flat if not key.startswith(("data.", "scenario.", *UNTOLD))}
    differ = {key for key in keys if len({repr(flat.get(key)) for flat in told}) > 1}
    out = []
    for name in names:
        flat = data.settings.get(name, {})
        entry = METHODS.get(flat.get("method.name", name))
        settings = {
            key: flat[key]
            for key in sorted({"optim.lr", "loop.max_steps", *differ} & flat.keys())
            if flat[key] is not None
        }
        params = {} if entry is None else {f"method.params.{key}": knob.default for key, knob in knobs(entry).items()}
        out.append(
            {
                "name": name,
                "formula": entry.formula if entry else "",
                "source": entry.source if entry else "",
                "note": entry.note if entry else "",
                "retain": flat.get("method.retain") or (entry.retain if entry else ""),
                "settings": {**params, **settings},
            }
        )
    return out


def _environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions", {})
    rest = {key: value for key, value in environment.items() if key != "versions"}
    return {**rest, **{name: version for name, version in versions.items() if version}}


def _markup(panels: Mapping[str, str]) -> dict[str, Markup]:
    return {name: Markup(svg) for name, svg in panels.items()}


def _readable(value: Any) -> Any:
    """Applied to whatever the template puts out, before it is escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
