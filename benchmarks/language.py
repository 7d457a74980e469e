"""Does grokking make forgetting easier, in language? The whole study of recipes/configs/study/language.yaml.

    python benchmarks/language.py --jobs 2             # about 14 CPU-hours: 54 + 110 trainings, 1,782 trials, 540 runs
    python benchmarks/language.py --jobs 2 --parts primary      # a part: the primary contrast's cells, 4 CPU-hours
    python benchmarks/language.py --jobs 2 --parts methods,checkpoints --from benchmarks/results/language.json
    python benchmarks/language.py --quick              # toy: 12 authors, 2 methods, 3 seeds; a minute, says nothing

Steps: tune (every method at every checkpoint and scenario it is measured at, on seeds of their own), the study with
what was chosen, probes of the start models, results. Writes language.json: a row per run, training, choice and probed
model, the design's sha256, and the machine. Prints what came of the primary contrast. Everything finished is kept: run
it again to go on. `llm-unlearn study report` makes the findings of it.

Parts: `primary`, what the primary contrast rests on; of its scenario, `methods`, the other methods, and `checkpoints`,
the other checkpoints; `scenarios`, the other scenarios and sizes, or one of them by its name (`fact`). They have no run
in common, only start models. With `--from FILE` what a file of results holds is not run again, also where the folder of
the study is gone, and what is run joins it; models that more runs begin from are trained again.

What no model reached is left out and told: a checkpoint that the tuning seeds never reached has no settings, one that a
seed of the study never reached is a censored cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError, run_main, suggest
from llm_unlearn.eval.compare import primary_of
from llm_unlearn.eval.packed import unpack
from llm_unlearn.eval.primary import PrimaryContrast
from llm_unlearn.eval.probes.table import Settings
from llm_unlearn.files import read_json
from llm_unlearn.log import get_logger, setup
from llm_unlearn.study.arms import Wanted, wanted
from llm_unlearn.study.collect import study_content, training_row, write_rows
from llm_unlearn.study.config import StudyConfig, load_study
from llm_unlearn.study.joined import Held, held_in, join, progress_of
from llm_unlearn.study.matrix import Cell, plan, with_trainings
from llm_unlearn.study.probing import Look, probe_starts
from llm_unlearn.study.runner import run_missing
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import Choice, choices, plan_tuning, with_settings, write_tuned

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
PARTS = ("primary", "methods", "checkpoints", "scenarios")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="toy size: does it run?")
    parser.add_argument("--parts", default="", help=f"by comma, of {', '.join(PARTS)}, or scenarios' names")
    parser.add_argument("--from", dest="before", type=Path, help="file of results to go on from")
    parser.add_argument("--study", help="folder of runs and records; default studies/language, quick: -quick")
    parser.add_argument("--probe-seeds", type=int, default=5, help="seeds whose start models are probed")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", help="overrides of the study config: another design, told in results")
    setup()
    args = parser.parse_args()

    def run() -> None:
        study, parts = study_config(args), tuple(filter(None, args.parts.split(",")))
        path = args.results / f"language{'_quick' if args.quick else ''}.json"
        if parts and args.before is None and path.exists():
            raise UserError(f"{path}: is there already; go on from it with --from {path}, or give another --results")
        before = None if args.before is None else read_json(args.before)
        content, contrasts = measure(study, args.jobs, args.probe_seeds, parts, before)
        probes = [] if args.probe_seeds == 5 else [f"--probe-seeds {args.probe_seeds}"]
        flags = [*(["--quick"] if args.quick else []), *([f"--parts {args.parts}"] if parts else []), *probes]
        mine = " ".join(["python benchmarks/language.py", *flags, *(f"'{o}'" for o in args.overrides)])
        content["command"] = mine if before is None else f"{before['command']}; {mine} --from the former"
        write_rows(path, content)
        print("\n".join([*map(told, contrasts), f"{path}: {path.stat().st_size / 1e6:.2f} MB"]))

    run_main(run)


def study_config(args: argparse.Namespace) -> StudyConfig:
    """Return the shipped study with what the command line says."""
    out = args.study or ("studies/language-quick" if args.quick else "studies/language")
    return load_study(CONFIG, [f"out={out}", *(QUICK if args.quick else ()), *args.overrides])


def measure(
    study: StudyConfig,
    jobs: int,
    probe_seeds: int = 5,
    parts: Sequence[str] = (),
    before: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Sequence[PrimaryContrast]]:
    """Tune and run what a file of results does not hold; return what the new one holds, all of `before` too, and what
    came of the primary contrast.
    """
    log = get_logger("language")
    held = Held() if before is None else held_in(before, study, "--from")
    asked = [w for w in cells_of(study, parts) if w.label not in held.ended]
    folder, searching = Path(study.out), plan_tuning(study)
    store, broken = Store(folder), _broken(searching, held.failed)
    places = {_of(w) for w in asked if not held.tuned(w) or _of(w) in broken}
    trials = [cell for cell in searching if _place(cell) in places]
    log.info("tuning: %d trials", len(trials))
    run_missing(folder, with_trainings(searching, trials), jobs)
    chosen = [choice for choice in choices(study, searching, store) if _tried(study, choice, places)]
    known = [choice for choice in held.choices if _of(choice) not in set(map(_of, chosen))]
    write_tuned(folder / "tuned.yaml", study, [*known, *chosen])
    left, left_out = with_settings(asked, [*known, *chosen])
    measured = study.model_copy(update={"tuned": str(folder / "tuned.yaml")})
    cells = plan(measured, left)
    log.info("measuring: %d runs; no settings for %s", len(left), ", ".join(left_out) or "none")
    run_missing(folder, cells, jobs)
    ran = [cell for cell in (*with_trainings(searching, trials), *cells) if not _told(store.read(cell), held.trainings)]
    content = study_content(measured, ran, chosen, left_out, store)
    probed = () if before is None else before["probes"]
    new = [o for o in unpack(content["outcomes"]) if (o.seed, o.checkpoint) not in {_model(row) for row in probed}]
    content["probes"] = [*probed, *probe_starts(measured, new, LOOK, measured.seeds[:probe_seeds], jobs)]
    whole = content if before is None else join(before, content, [cell.label for cell in ran])
    judged = primary_of(unpack(whole["outcomes"]))
    contrasts = () if judged is None else judged.contrasts
    head = {
        "what": "forgetting from memorised, grokked and control checkpoints of language models, against gold",
        "command": "",
        "cells": progress_of(study, whole),
    }
    return {**head, **whole, "primary": [vars(contrast) for contrast in contrasts]}, contrasts


def _model(row: Mapping[str, Any]) -> tuple[int, str]:
    return row["seed"], row["checkpoint"]


def _told(record: Mapping[str, Any] | None, trainings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a record is of a training that the file gone on from tells, run in this folder and not again."""
    return record is not None and training_row(record) in trainings


def _broken(searching: Sequence[Cell], failed: Collection[str]) -> set[tuple[str, str, str] | None]:
    """Return where a trial failed, or a training that it waits for."""
    ids = {cell.id for cell in searching if cell.label in failed}
    return {_place(cell) for cell in searching if {cell.id, *cell.after} & ids and cell.kind == "tune"}


def _of(w: Wanted | Choice) -> tuple[str, str, str]:
    return w.scenario, w.checkpoint, w.method


def _place(cell: Cell) -> tuple[str, str, str] | None:
    return None if cell.kind == "train" else (cell.spec["scenario"], cell.spec["checkpoint"], cell.spec["method"])


def _tried(study: StudyConfig, choice: Choice, places: Collection[tuple[str, str, str]]) -> bool:
    """Whether every trial of a choice was asked for; where only some were, that is not that nothing was found, and no
    choice over all scenarios either.
    """
    pair = (choice.checkpoint, choice.method)
    of = (
        {choice.scenario}
        if choice.scenario
        else {w.scenario for w in wanted(study) if (w.checkpoint, w.method) == pair}
    )
    return {(scenario, *pair) for scenario in of} <= set(places)


def cells_of(study: StudyConfig, parts: Sequence[str]) -> list[Wanted]:
    """Return what the named parts of a study measure; all of it for none. Raises UserError for an unknown part, and for
    parts of a study without a primary contrast.
    """
    if not parts:
        return wanted(study)
    if (p := study.primary) is None:
        raise UserError("--parts: the study declares no primary contrast; leave it out")
    single = {name for name in study.scenarios if name != p.scenario}
    if unknown := sorted(set(parts) - {*PARTS, *single}):
        known = [*PARTS, *sorted(single)]
        raise UserError(f"--parts: unknown part '{unknown[0]}'{suggest(unknown[0], known)}; of {', '.join(known)}")
    kinds = {kind for pair in p.contrasts for kind in pair}

    def parts_of(w: Wanted) -> set[str]:
        if w.scenario != p.scenario:
            return {"scenarios", w.scenario}
        if w.checkpoint not in kinds:
            return {"checkpoints"}
        return {"primary" if w.method in p.methods else "methods"}

    return [w for w in wanted(study) if parts_of(w) & set(parts)]


def told(c: PrimaryContrast) -> str:
    """Say what came of a primary contrast in one line."""
    head = f"primary: {c.method}, {c.group} minus {c.baseline}: {c.verdict}"
    if c.mean is None:
        return f"{head} ({c.why})"
    return f"{head}, {c.mean:+.3f} [{c.lo:+.3f}, {c.hi:+.3f}], {c.n} of {c.of} seeds, detectable {c.detectable:.3f}"


if __name__ == "__main__":
    main()
