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
from llm_unlearn.files import read_json
from llm_unlearn.log import get_logger, setup
from llm_unlearn.study.arms import Wanted, wanted
from llm_unlearn.study.collect import study_content, write_rows
from llm_unlearn.study.config import StudyConfig, load_study
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
        if args.primary and path.exists() and "not run yet" not in read_json(path)["cells"]["measured"]:
            raise UserError(f"{path}: holds the whole study; leave --primary out, or give another --results")
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
    folder, everything = Path(study.out), wanted(study)
    store, searching = Store(folder), plan_tuning(study)
    asked = primary_cells(study) if primary_only else everything
    trials = [cell for cell in searching if _place(cell) in {(w.scenario, w.checkpoint, w.method) for w in asked}]
    log.info("tuning: %d trials", len(trials))
    tuning = run_missing(folder, with_trainings(searching, trials), jobs)
    untried = sum(cell.kind == "tune" for cell in searching) - len(trials)
    found = [choice for choice in choices(study, searching, store) if _tried(study, choice, asked)]
    write_tuned(folder / "tuned.yaml", study, found)
    left, left_out = with_settings(asked, found)
    measured = study.model_copy(update={"tuned": str(folder / "tuned.yaml")})
    cells = plan(measured, left)
    log.info("measuring: %d runs; no settings for %s", len(left), ", ".join(left_out) or "none")
    ended = run_missing(folder, cells, jobs)
    content = study_content(measured, [*with_trainings(searching, trials), *cells], found, left_out, store)
    outcomes = unpack(content["outcomes"])
    judged = primary_of(outcomes)
    contrasts = () if judged is None else judged.contrasts
    content = {
        "what": "forgetting from memorised, grokked and control checkpoints of language models, against gold",
        "command": "",
        "cells": {"tuning": _and_rest(tuning, untried), "measured": _and_rest(ended, len(everything) - len(asked))},
        **content,
        "primary": [vars(contrast) for contrast in contrasts],
        "probes": probe_starts(measured, outcomes, LOOK, measured.seeds[:probe_seeds], jobs),
    }
    return content, contrasts


def _and_rest(ended: dict[str, int], rest: int) -> dict[str, int]:
    return {**ended, "not run yet": rest} if rest else ended


def _place(cell: Cell) -> tuple[str, str, str] | None:
    return None if cell.kind == "train" else (cell.spec["scenario"], cell.spec["checkpoint"], cell.spec["method"])


def _tried(study: StudyConfig, choice: Choice, asked: Sequence[Wanted]) -> bool:
    """Whether every trial of a choice was asked for; where only some were, that is not that nothing was found, and no
    choice over all scenarios either.
    """
    same = {w.scenario for w in wanted(study) if (w.checkpoint, w.method) == (choice.checkpoint, choice.method)}
    here = {w.scenario for w in asked if (w.checkpoint, w.method) == (choice.checkpoint, choice.method)}
    return choice.scenario in here if choice.scenario else same == here


def primary_cells(study: StudyConfig) -> list[Wanted]:
    """Return what the primary contrast reads. Raises UserError if there is none."""
    if (p := study.primary) is None:
        raise UserError("--primary: the study declares no primary contrast; leave it out")
    kinds = {kind for pair in p.contrasts for kind in pair}
    return [w for w in wanted(study) if w.scenario == p.scenario and w.checkpoint in kinds and w.method in p.methods]


def with_settings(asked: Sequence[Wanted], found: Sequence[Choice]) -> tuple[list[Wanted], list[str]]:
    """Return what can be measured, without what tuning found no settings for: a checkpoint that no method has any for,
    and of the others a method that lacks them somewhere; and the names left out. The study itself stays as declared,
    so what is trained for the rest stays the same too. Raises UserError if nothing is left.
    """
    lacking = {(c.checkpoint, c.method) for c in found if c.setting is None}  # in any of the scenarios
    tried = {(c.checkpoint, c.method) for c in found}
    gone = {kind for kind, _ in tried if all(pair in lacking for pair in tried if pair[0] == kind)}
    fewer = {name for kind, name in lacking if kind not in gone}
    left = [w for w in asked if w.checkpoint not in gone and w.method not in fewer]
    if not left:
        raise UserError("no trial of tuning has a result; see the records in the study's folder cells")
    return left, sorted([*gone, *fewer])


def told(c: PrimaryContrast) -> str:
    """Say what came of a primary contrast in one line."""
    head = f"primary: {c.method}, {c.group} minus {c.baseline}: {c.verdict}"
    if c.mean is None:
        return f"{head} ({c.why})"
    return f"{head}, {c.mean:+.3f} [{c.lo:+.3f}, {c.hi:+.3f}], {c.n} of {c.of} seeds, detectable {c.detectable:.3f}"


if __name__ == "__main__":
    main()
