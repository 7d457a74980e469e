"""llm-unlearn study plan, run, status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llm_unlearn.cli.common import print_json, start_logging
from llm_unlearn.cli.evaluate import Json

study_app = typer.Typer(
    help="Plan and run a grid of seeds x checkpoints x methods; finished cells are never run twice.",
    no_args_is_help=True,
)
ConfigPath = Annotated[Path, typer.Argument(help="Study config (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: seeds=[0,1] out=studies/mine.")]


def _load(config: Path, overrides: list[str] | None):
    from llm_unlearn.study.config import load_study
    from llm_unlearn.study.matrix import plan

    study = load_study(config, overrides or [])
    return study, plan(study)


@study_app.command("plan", epilog="Example: llm-unlearn study plan recipes/configs/study/prepost.yaml")
def plan_command(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """List the cells of a study and write them to cells.jsonl in its folder, one line per cell, numbered from 0."""
    import json

    from llm_unlearn.files import write_atomic
    from llm_unlearn.study.cells import check_ready

    study, cells = _load(config, overrides)
    check_ready(cells)
    lines = [
        {"number": i, "id": c.id, "kind": c.kind, "label": c.label, "after": list(c.after), "spec": c.spec}
        for i, c in enumerate(cells)
    ]
    first = sum(c.kind == "train" for c in cells)
    path = Path(study.out) / "cells.jsonl"
    write_atomic(path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode())
    if as_json:
        print_json({"cells": len(cells), "trainings": first, "path": str(path)})
        return
    for line in lines:
        typer.echo(f"{line['number']:4d}  {line['id']}  {line['kind']:7s}  {line['label']}")
    typer.echo(f"{len(cells)} cells, the first {first} of them trainings: {path}")


@study_app.command("run", epilog="Example: llm-unlearn study run recipes/configs/study/prepost.yaml --jobs 2")
def run_command(
    config: ConfigPath,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    cell: Annotated[
        int | None, typer.Option(min=0, help="Run this one cell (its number in the plan), for job arrays.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run what is missing; exit 1 if a cell failed or has to wait for others."""
    start_logging()
    from llm_unlearn.errors import UserError
    from llm_unlearn.study.cells import check_ready, run_cell
    from llm_unlearn.study.runner import run_missing

    study, cells = _load(config, overrides)
    if cell is not None:
        if cell >= len(cells):
            raise UserError(f"--cell {cell}: the study has cells 0 to {len(cells) - 1}; see llm-unlearn study plan")
        check_ready(cells)
        ended = {run_cell(Path(study.out), cells[cell]): 1}
    else:
        ended = run_missing(Path(study.out), cells, jobs)
    print_json(ended) if as_json else typer.echo(", ".join(f"{n} {status}" for status, n in ended.items()))
    if ended.get("failed") or ended.get("waiting"):
        raise typer.Exit(1)


def ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as job arrays take them: 0-3,7,9-10."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)


@study_app.command("status", epilog="Example: llm-unlearn study status recipes/configs/study/prepost.yaml")
def status_command(
    config: ConfigPath,
    overrides: Overrides = None,
    ready: Annotated[
        bool, typer.Option("--ready", help="Print only the numbers of cells that can run now, for job arrays.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Count finished, censored, failed and missing cells, and say why cells failed."""
    from llm_unlearn.study.store import Store

    study, cells = _load(config, overrides)
    store = Store(Path(study.out))
    if ready:
        numbers = store.ready(cells)
        print_json({"ready": numbers}) if as_json else typer.echo(ranges(numbers))
        return
    found = store.status(cells)
    errors = {cell.label: (store.read(cell) or {}).get("error", "") for cell in found["failed"]}
    if as_json:
        print_json({**{status: len(members) for status, members in found.items()}, "errors": errors})
        return
    typer.echo(", ".join(f"{len(members)} {status}" for status, members in found.items()))
    for label, error in errors.items():
        typer.echo(f"failed: {label}: {error.strip().splitlines()[-1] if error.strip() else ''}")


@study_app.command(
    "reproduce",
    epilog="Example: llm-unlearn study reproduce benchmarks/results/language.json 'seed0 author grok npo'",
)
def reproduce_command(
    results: Annotated[Path, typer.Argument(help="Results of a study (JSON), as benchmarks/language.py writes them.")],
    cell: Annotated[str, typer.Argument(help="Label of one of its cells, as study plan shows them.")],
    out: Annotated[Path, typer.Option(help="Folder to run it in.")] = Path("studies/reproduced"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    data_path: Annotated[str | None, typer.Option(help="Where data that was given as files lies here.")] = None,
    as_json: Json = False,
) -> None:
    """Run one cell of a committed study again, with the trainings it needs; exit 1 unless every number is the same to
    the last bit.
    """
    start_logging()
    from llm_unlearn.study.reproduce import reproduce

    found = reproduce(results, cell, out, jobs, data_path)
    if as_json:
        print_json({**vars(found), "identical": found.identical})
    elif found.identical:
        typer.echo(f"{cell}: identical to the last bit ({found.found})")
    else:
        there, here = (f"{e.get('machine')}, torch {e.get('versions', {}).get('torch')}" for e in found.environments)
        why = f"the run ended as {found.status}" if not found.found else f"committed {found.committed}: {found.found}"
        typer.echo(f"{cell}: not the same ({why}); committed on {there}, run on {here}")
    if not found.identical:
        raise typer.Exit(1)


@study_app.command("report", epilog="Example: llm-unlearn study report benchmarks/results --out docs/findings.md")
def report_command(
    results: Annotated[Path, typer.Argument(help="Folder of committed results (JSON).")] = Path("benchmarks/results"),
    out: Annotated[Path, typer.Option(help="Markdown to write; its figures go to a folder beside it.")] = Path(
        "docs/findings.md"
    ),
    html: Annotated[Path, typer.Option(help="The same as one self-contained page.")] = Path("findings.html"),
    as_json: Json = False,
) -> None:
    """Write the findings of all studies from their committed results: answer, claims, contrasts, cost, probes. What has
    no results is said to be not run.
    """
    start_logging()
    from llm_unlearn.report.findings import write_findings

    written = write_findings(results, out, html)
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    typer.echo(f"findings: {written[0]}, {written[1]} and {len(written) - 2} figures")
