"""llm-unlearn tune: settings for a study's methods, searched with equal budgets on other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.cli.evaluate import Json
from llm_unlearn.cli.study import ConfigPath, Overrides


def tune_command(
    config: ConfigPath,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: tuned.yaml in the study's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search learning rate and knobs of every method at every checkpoint with equally many trials of equally many
    updates, on seeds the study does not use, and write tuned.yaml; run again to go on; exit 1 if a trial failed.

    Taken is the trial with the least damage among those that forgot down to gold's level plus unlearn.stop.margin.
    """
    start_logging()
    from llm_unlearn.errors import UserError
    from llm_unlearn.log import get_logger
    from llm_unlearn.study.config import load_study
    from llm_unlearn.study.runner import run_missing
    from llm_unlearn.study.store import Store
    from llm_unlearn.study.tune import choices, plan_tuning, write_tuned

    study = load_study(config, overrides or [])
    cells = plan_tuning(study)
    trials = [cell for cell in cells if cell.kind == "tune"]
    get_logger(__name__).info("%d trainings, %d trials on %d processes", len(cells) - len(trials), len(trials), jobs)
    ended = run_missing(Path(study.out), cells, jobs)
    store = Store(Path(study.out))
    found = choices(study, cells, store)
    path = out or Path(study.out) / "tuned.yaml"
    if all(choice.setting is None for choice in found):
        why = (store.read(trials[0]) or {}).get("error", "").strip().splitlines()
        raise UserError(f"no trial has a result{': ' + why[-1] if why else ''}; {path} is not written")
    write_tuned(path, study, found)
    if as_json:
        print_json({"cells": ended, "path": str(path), "choices": [asdict(choice) for choice in found]})
    else:
        _show(found, path)
    if ended.get("failed") or ended.get("waiting"):
        raise typer.Exit(1)


def _show(found: Sequence[Any], path: Path) -> None:
    from llm_unlearn.report.tables import show, tuned_table

    show([tuned_table(found)])
    typer.echo(f"tuned: {path}; name it in the study's config (tuned: {path})")
