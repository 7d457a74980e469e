"""Is it the alignment of gradients that decides what forgetting costs? recipes/configs/study/interventions.yaml, run.

    python benchmarks/interventions.py --jobs 2       # about 3 CPU-hours: 50 trainings, 200 runs
    python benchmarks/interventions.py --jobs 2 --design interventions_apart      # what it left open, on 15 other seeds
    python benchmarks/interventions.py --quick        # toy: 12 authors, 3 seeds; a minute, says nothing

Models whose gradients were pushed apart, or together, beside shams that took the same steps without, all forgetting at
the same settings until their level; and a projection of the gradients while forgetting. Probes of every start model
tell what the pushes did. Writes DESIGN.json; `llm-unlearn study report` makes a section of the findings of it.
Everything finished is kept: run it again to go on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llm_unlearn.errors import run_main
from llm_unlearn.eval.packed import unpack
from llm_unlearn.eval.probes.table import Settings
from llm_unlearn.log import setup
from llm_unlearn.study.collect import study_content, write_rows
from llm_unlearn.study.config import StudyConfig, load_study
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.probing import Look, probe_starts
from llm_unlearn.study.runner import run_missing
from llm_unlearn.study.store import Store

CONFIG = Path(__file__).resolve().parent.parent / "recipes/configs/study/interventions.yaml"
DESIGNS = ("interventions", "interventions_apart")
LOOK = Look(
    ("alignment", "local_complexity", "cka_paper", "norms", "logits"),
    ("cka", "hessian", "modules"),
    Settings(items=128, loss=0.5),
)
PUSHED = (
    "take: last, changes: {watch: {until: max_steps}, orthogonality: {of: margin, after: start, steps: 60, weight: "
)
QUICK = (  # trainings too short to memorise anything, so the penalty acts from the start
    "seeds=[0, 1, 2]",
    "checkpoints=[apart, sham]",
    f"controls={{apart: {{match: sham, {PUSHED}1}}}}}}, sham: {{{PUSHED}0}}}}}}}}",
    "scenarios={author: {kind: author, size: 2}}",
    "methods={npo: {}, npo_gru: {method: {name: npo, gradient: gru}}}",
    "extra=[]",
    "primary.methods=[npo]",
    "primary.contrasts=[[apart, sham]]",
    "grok.data.preset=world12",
    "grok.model.size=nano",
    "grok.optim.lr=1e-2",
    "grok.loop={max_steps: 60, batch_size: 64, threads: 1}",
    "unlearn.loop={max_steps: 10, threads: 1}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--design", choices=DESIGNS, default=DESIGNS[0], help="file of recipes/configs/study")
    parser.add_argument("--quick", action="store_true", help="toy size: does it run?")
    parser.add_argument("--study", help="folder of runs and records; default studies/DESIGN, quick: -quick")
    parser.add_argument("--probe-seeds", type=int, default=5, help="seeds whose start models are probed")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", help="overrides of the study config: another design, told in results")
    setup()
    args = parser.parse_args()

    def run() -> None:
        name = f"{args.design}{'-quick' if args.quick else ''}"
        changes = [f"out={args.study or f'studies/{name}'}", *(QUICK if args.quick else ()), *args.overrides]
        content = measure(load_study(CONFIG.with_stem(args.design), changes), args.jobs, args.probe_seeds)
        design = [] if args.design == DESIGNS[0] else [f"--design {args.design}"]
        flags = [*design, *(["--quick"] if args.quick else []), *(f"'{o}'" for o in args.overrides)]
        content["command"] = " ".join(["python benchmarks/interventions.py", *flags])
        path = args.results / f"{name.replace('-', '_')}.json"
        write_rows(path, content)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

    run_main(run)


def measure(study: StudyConfig, jobs: int, probe_seeds: int) -> dict[str, Any]:
    """Run what is missing of the study and look into its start models; return what the file of results holds."""
    folder, cells = Path(study.out), plan(study)
    ended = run_missing(folder, cells, jobs)
    content = study_content(study, cells, [], [], Store(folder))
    outcomes = unpack(content["outcomes"])
    return {
        "what": "forgetting from language models whose gradients were pushed apart or together, beside shams",
        "command": "",
        "cells": {"measured": ended},
        **content,
        "probes": probe_starts(study, outcomes, LOOK, study.seeds[:probe_seeds], jobs),
    }


if __name__ == "__main__":
    main()
