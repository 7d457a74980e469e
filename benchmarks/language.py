"""Does grokking make forgetting easier, in language? The whole study of recipes/configs/study/language.yaml.

    python benchmarks/language.py --jobs 2             # about 12 CPU-hours: 54 + 110 trainings, 1,782 trials, 540 runs
    python benchmarks/language.py --jobs 2 --primary   # the primary contrast's cells first: about a third of the time
    python benchmarks/language.py --quick              # toy: 12 authors, 2 methods, 3 seeds; a minute, says nothing

Steps: tune (every method at every checkpoint and scenario it is measured at, on a seed of its own), the study with what
was chosen, probes of the start models, results. Writes language.json: a row per run, training, choice and probed model,
the design's sha256, and the machine. Prints what came of the primary contrast. Everything finished is kept: run it
again to go on. `llm-unlearn study report` makes the findings of it.

What no model reached is left out and told: a checkpoint that the tuning seed never reached has no settings, one that a
seed of the study never reached is a censored cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError, run_main
from llm_unlearn.eval.compare import primary_of
from llm_unlearn.eval.packed import unpack
from llm_unlearn.eval.primary import PrimaryContrast
from llm_unlearn.eval.probes.table import Settings
from llm_unlearn.log import get_logger, setup
from llm_unlearn.study.arms import Wanted, wanted
from llm_unlearn.study.collect import study_content, write_rows
from llm_unlearn.study.config import Extra, StudyConfig, load_study
from llm_unlearn.study.matrix import Cell, plan, with_trainings
from llm_unlearn.study.probing import Look, probe_starts
from llm_unlearn.study.runner import run_missing
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import Choice, choices, plan_tuning, write_tuned

CONFIG = Path(__file__).resolve().parent.parent / "recipes/configs/study/language.yaml"
LOOK = Look(  # as many rows as of images, curvature at one loss; small requests have too few pairs for some
    ("alignment", "local_complexity", "cka_paper", "norms", "logits"),
    ("cka", "hessian", "modules", "bridge"),
    Settings(items=128, loss=0.5),
)
LAST = "take: last, changes: {optim: {lr: 1e-2}, loop: {max_steps: 60}, watch: {until: max_steps}"
QUICK = (  # trainings too short to memorise anything: `fit` is never reached, and what follows from that is seen too
    "seeds=[0, 1, 2]",
    "checkpoints=[easy, twin]",
    "methods={graddiff: {}, npo: {}}",
    f"controls={{easy: {{{LAST}}}}}, twin: {{{LAST}, shuffle: inferred}}}}}}",
    "scenarios={author: {kind: author, size: 2}}",
    "extra=[{seeds: [0], checkpoints: [fit], methods: [npo]}]",
    "primary.methods=[graddiff, npo]",
    "primary.contrasts=[[easy, twin]]",
    "tune.seeds=[100]",
    "tune.trials=2",
    "tune.lrs=[1e-4, 1e-3]",
    "relearn={facts: 2, updates: 4, every: 2}",
    "grok.data.preset=world12",
    "grok.model.size=nano",
    "grok.loop={max_steps: 60, batch_size: 64, threads: 1}",
    "unlearn.loop={max_steps: 10, threads: 1}",
    "unlearn.stop={every: 5, until: max_steps, floor: null}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="toy size: does it run?")
    parser.add_argument(
        "--primary", action="store_true", help="tune and run what the primary contrast rests on, no more"
    )
    parser.add_argument("--study", help="folder of runs and records; default studies/language, quick: -quick")
    parser.add_argument("--probe-seeds", type=int, default=5, help="seeds whose start models are probed")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", help="overrides of the study config: another design, told in results")
    setup()
    args = parser.parse_args()

    def run() -> None:
        study = study_config(args)
        path = args.results / f"language{'_quick' if args.quick else ''}.json"
        content, contrasts = measure(study, args.jobs, args.probe_seeds, args.primary)
        flags = [flag for flag, given in (("--quick", args.quick), ("--primary", args.primary)) if given]
        content["command"] = " ".join(["python benchmarks/language.py", *flags, *(f"'{o}'" for o in args.overrides)])
        write_rows(path, content)
        print("\n".join([*map(told, contrasts), f"{path}: {path.stat().st_size / 1e6:.2f} MB"]))

    run_main(run)


def study_config(args: argparse.Namespace) -> StudyConfig:
    """Return the shipped study with what the command line says."""
    out = args.study or ("studies/language-quick" if args.quick else "studies/language")
    return load_study(CONFIG, [f"out={out}", *(QUICK if args.quick else ()), *args.overrides])


def measure(
    study: StudyConfig, jobs: int, probe_seeds: int = 5, primary_only: bool = False
) -> tuple[dict[str, Any], Sequence[PrimaryContrast]]:
    """Tune and run; return what the file of results holds, and what came of the primary contrast."""
    log = get_logger("language")
    folder = Path(study.out)
    store, searching = Store(folder), plan_tuning(study)
    only = primary_cells(study) if primary_only else None
    asked = {(w.scenario, w.checkpoint, w.method) for w in only or ()}
    if only is not None:
        searching = with_trainings(searching, [cell for cell in searching if _place(cell) in asked])
    log.info("tuning: %d cells", len(searching))
    tuning = run_missing(folder, searching, jobs)
    found = choices(study, searching, store)
    if only is not None:  # of the others nothing was tried, which is not that nothing was found
        found = [c for c in found if (c.scenario or next(iter(only)).scenario, c.checkpoint, c.method) in asked]
    write_tuned(folder / "tuned.yaml", study, found)
    measured, left_out = with_settings(study, found, folder / "tuned.yaml")
    cells = plan(measured, only)
    log.info("measuring: %d cells; no settings for %s", len(cells), ", ".join(left_out) or "none")
    ended = run_missing(folder, cells, jobs)
    if rest := len(wanted(measured)) - sum(cell.kind == "unlearn" for cell in cells):
        ended["not run yet"] = rest
    content = study_content(measured, [*searching, *cells], found, left_out, store)
    outcomes = unpack(content["outcomes"])
    judged = primary_of(outcomes)
    contrasts = () if judged is None else judged.contrasts
    content = {
        "what": "forgetting from memorised, grokked and control checkpoints of language models, against gold",
        "command": "",
        "cells": {"tuning": tuning, "measured": ended},
        **content,
        "primary": [vars(contrast) for contrast in contrasts],
        "probes": probe_starts(measured, outcomes, LOOK, measured.seeds[:probe_seeds], jobs),
    }
    return content, contrasts


def primary_cells(study: StudyConfig) -> set[Wanted]:
    """Return what the primary contrast reads. Raises UserError if there is none."""
    if (p := study.primary) is None:
        raise UserError("--primary: the study declares no primary contrast; leave it out")
    kinds = {kind for pair in p.contrasts for kind in pair}
    return {w for w in wanted(study) if w.scenario == p.scenario and w.checkpoint in kinds and w.method in p.methods}


def _place(cell: Cell) -> tuple[str, str, str] | None:
    return None if cell.kind == "train" else (cell.spec["scenario"], cell.spec["checkpoint"], cell.spec["method"])


def with_settings(study: StudyConfig, found: Sequence[Choice], path: Path) -> tuple[StudyConfig, list[str]]:
    """Return the study without what tuning found no settings for: of the grid a checkpoint that no method has any for,
    and of the others a method that lacks them somewhere; of extra cells the same. Raises UserError if nothing is left.
    """
    lacking = {(c.checkpoint, c.method) for c in found if c.setting is None}  # in any of the scenarios
    asked = {(c.checkpoint, c.method) for c in found}
    gone = {kind for kind, _ in asked if all(pair in lacking for pair in asked if pair[0] == kind)}
    fewer = {name for kind, name in lacking if kind not in gone}
    kinds = tuple(kind for kind in study.checkpoints if kind not in gone)
    methods = {name: section for name, section in study.methods.items() if name not in fewer}
    if not kinds or not methods:
        raise UserError(f"{study.out}: no trial of tuning has a result; see the records in {study.out}/cells")
    extra = [part for old in study.extra if (part := _left(old, gone, fewer)) is not None]
    changes = {"tuned": str(path), "checkpoints": kinds, "methods": methods, "extra": tuple(extra)}
    p = study.primary
    if p and (gone & {kind for pair in p.contrasts for kind in pair} or fewer & set(p.methods)):
        get_logger("language").warning("no primary contrast: tuning found no settings for a part of it")
        changes["primary"] = None
    return study.model_copy(update=changes), sorted([*gone, *fewer])


def _left(part: Extra, gone: set[str], fewer: set[str]) -> Extra | None:
    """A part of `extra` without these checkpoints and methods; None if that was all it had."""
    kinds = tuple(kind for kind in part.checkpoints if kind not in gone)
    names = tuple(name for name in part.methods if name not in fewer)
    if (part.checkpoints and not kinds) or (part.methods and not names):
        return None
    return part.model_copy(update={"checkpoints": kinds, "methods": names})


def told(c: PrimaryContrast) -> str:
    """Say what came of a primary contrast in one line."""
    head = f"primary: {c.method}, {c.group} minus {c.baseline}: {c.verdict}"
    if c.mean is None:
        return f"{head} ({c.why})"
    return f"{head}, {c.mean:+.3f} [{c.lo:+.3f}, {c.hi:+.3f}], {c.n} of {c.of} seeds, detectable {c.detectable:.3f}"


if __name__ == "__main__":
    main()
