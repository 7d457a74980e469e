"""llm-unlearn quickstart: the whole main job on the embedded world, or on digits, offline, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.cli.evaluate import Json
from llm_unlearn.errors import UserError


def quickstart_command(
    out: Annotated[
        Path, typer.Option(help="Folder of the runs and the report; an unfinished one is continued.")
    ] = Path("quickstart"),
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the world, the forget set and the model; 1 groks early, 0 and 2 take twice as long."
        ),
    ] = 1,
    preset: Annotated[
        str | None,
        typer.Option(
            help="World: short40 (one-word answers; the default), world40 (short sentences; takes twice as long), "
            "or world12 (a toy that does not grok)."
        ),
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="Images in place of questions: digits and a small CNN, five methods.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes, one thread each; model and gold train side by side.")
    ] = 2,
    as_json: Json = False,
) -> None:
    """Train a model until it groks, and its gold; unlearn from four checkpoints with nine methods (images: five);
    compare; write report.html.
    """
    start_logging()
    if vision and preset is not None:
        raise UserError("--preset names a world of questions, --vision takes images; give one of the two")
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks the hub
    from llm_unlearn.eval.compare import compare
    from llm_unlearn.eval.outcome import load_outcomes
    from llm_unlearn.log import get_logger
    from llm_unlearn.report.html import write_report
    from llm_unlearn.study import presets
    from llm_unlearn.study.matrix import plan
    from llm_unlearn.study.runner import run_missing

    log = get_logger(__name__)
    study = presets.vision(out, seed) if vision else presets.quickstart(out, seed, preset or "short40")
    cells = plan(study)
    training = sum(cell.kind == "train" for cell in cells)
    what = "digits" if vision else f"world {study.grok.data.preset}"
    runs = len(cells) - training
    log.info("%s, seed %d: %d trainings, %d unlearning runs on %d processes", what, seed, training, runs, jobs)
    ended = run_missing(out, cells, jobs)
    page = write_report([out], out / "report.html")
    comparison = compare(load_outcomes([out]))
    if as_json:
        from llm_unlearn.report.tables import as_json as comparison_json

        print_json({"cells": ended, "report": str(page), "comparison": comparison_json(comparison)})
    else:
        from llm_unlearn.report.tables import before_after, comparison_tables, show

        show([*comparison_tables(comparison), before_after(comparison.outcomes)])
        typer.echo(f"report: {page}")
    if ended.get("failed") or ended.get("waiting"):
        raise typer.Exit(1)
