"""Does grokking make images easier to forget? The published comparison, with the controls and statistics it lacks.

    python benchmarks/vision.py --jobs 2                                        # digits: CNN and ResNet-8
    python benchmarks/vision.py --jobs 2 --data cifar10 --data-path DIR --seeds 0,1,2
    python benchmarks/vision.py --jobs 2 --arch cnn --arm schedule              # one schedule for all, as published
    python benchmarks/vision.py --jobs 2 --arch cnn --arm published --seeds 0,1,2   # and its optimiser
    python benchmarks/vision.py --jobs 2 --arch cnn --arm retuned               # the primary, tuned on three seeds
    python benchmarks/vision.py --tables                                        # the tables again from the JSON files

One study per net (recipes/configs/study/vision.yaml, trained as the recipe in recipes/configs/grok that groks this net
on this data): 8 checkpoints x 8 methods x 4 sorts of request. Steps: tune
(every method at every checkpoint with the same few learning rates, on seeds of its own), study, probes of the start
models, results. Writes vision_DATA_NET.json, a row per run, and vision_table1.md, made of all such files in the folder
of results and nothing else.

What no model reached is left out and told: a checkpoint that the tuning seeds never reached has no settings, one that a
seed of the study never reached is a censored cell. Everything finished is kept: run it again to go on.

`--arm schedule` gives every checkpoint the settings that were tuned at `early`, and delivers the last of equally many
updates: the published comparison, whose checkpoints are neither tuned each nor brought to one forget level. `--arm
published` does that with the published optimiser (momentum .9, weight decay 5e-4, lr .1, cosine) and the usual initial
weights, where nothing groks: `early`, `fit`, `annealed` (end of training).

`--arm retuned` is the primary contrast again, and `fit_scaled`, with settings tuned on three seeds in place of one. It
was made after the results of the first had been seen, where settings that came to the level on the one tuning seed did
so on none of the measured ones (scrub at `grok`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn.study.collect import study_content, write_rows

CONFIGS = Path(__file__).resolve().parent.parent / "recipes/configs"
RECIPES = {  # (data, net) -> the recipe that was found to grok it
    ("digits", "cnn"): "digits",
    ("digits", "resnet8"): "digits_resnet",
    ("fashion_mnist", "cnn"): "fashion",
    ("cifar10", "cnn"): "cifar10_subset",
}
DATA: dict[str, list[str]] = {
    "digits": [],
    "fashion_mnist": [  # 20 images a class: the same requests of at least 40 images take more classes
        "scenarios.half.size=4",
        "scenarios.class.size=2",
        "scenarios.subclass.size=5",
        "scenarios.random.share=0.2",
    ],
    "cifar10": [],
}
ONE_SCHEDULE = [
    "grid_scenarios=[half]",
    "tune.scenarios=[half]",
    "primary=null",
    "unlearn.stop.keep=last",
    "unlearn.stop.floor=null",
    "unlearn.stop.collapse=null",
]
ARMS: dict[str, list[str]] = {
    "main": [],
    "retuned": [
        "grid_scenarios=[half]",
        "tune.scenarios=[half]",
        "checkpoints=[fit, fit_scaled, grok, easy]",
    ],
    "schedule": [*ONE_SCHEDULE, "checkpoints=[early, fit, fit_scaled, grok, easy]"],
    "published": [
        *ONE_SCHEDULE,
        "checkpoints=[early, fit, annealed]",
        "controls={annealed: {take: last}}",
        "grok.model.net.alpha=1",
        "grok.optim={optimizer: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5e-4, decay: all, schedule: cosine, "
        "warmup: 0}",
        "grok.watch.until=max_steps",
    ],
}
PROBES = ("alignment", "local_complexity", "cka_paper", "cka", "norms", "logits")
CURVATURE = ("hessian",)  # of a model that some temperature brings to the loss
PROBE_ITEMS = 128
PROBE_LOSS = 0.5
TUNED_AT = "early"  # in an arm of one schedule
SCHEDULED = ("schedule", "published")
TUNE_SEEDS = {"retuned": "100,101,102"}
METHODS = {"retuned": "ga,neggrad_plus,scrub"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="", help="by comma; default all that a recipe groks on the data")
    parser.add_argument("--data", default="digits", choices=list(DATA))
    parser.add_argument("--data-path", help="files of --data; default where the package looks by itself")
    parser.add_argument("--arm", default="main", choices=list(ARMS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--extra-seeds", help="more, for the primary contrast; default those of the config for five "
                        "seeds or more, none for fewer; '' for none")  # fmt: skip
    parser.add_argument("--tune-seeds", help="default 100; 100,101,102 of the arm retuned")
    parser.add_argument("--trials", type=int, default=5, help="settings tried per method and checkpoint")
    parser.add_argument("--methods", default="", help="by comma; default all; of the arm retuned the primary's")
    parser.add_argument("--probe-seeds", type=int, default=5, help="seeds whose start models are probed")
    parser.add_argument("--study", default="studies/vision-{data}-{arch}", help="folder of runs and records")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="run nothing: make the tables of what is there")
    parser.add_argument("overrides", nargs="*", help="overrides of the study config, the last to win")
    from llm_unlearn.errors import run_main
    from llm_unlearn.files import write_atomic
    from llm_unlearn.log import setup
    from llm_unlearn.report.vision_tables import vision_tables

    setup()
    args = parser.parse_args()

    def run() -> None:
        known = [net for data, net in RECIPES if data == args.data]
        for arch in [] if args.tables else [name.strip() for name in args.arch.split(",") if name] or known:
            study = study_config(args, arch)
            content = measure(args, study, arch)
            name = f"vision_{args.data}_{arch}" + ("" if args.arm == "main" else f"_{args.arm}")
            write_rows(args.results / f"{name}.json", content)
        page = args.results / "vision_table1.md"
        write_atomic(page, vision_tables(args.results).encode())
        print(page)

    run_main(run)


def study_config(args: argparse.Namespace, arch: str) -> Any:
    """Return the shipped study with what the command line says."""
    from llm_unlearn.config import load_config
    from llm_unlearn.errors import UserError, suggest
    from llm_unlearn.files import sha256_file
    from llm_unlearn.study.config import StudyConfig

    known = [net for data, net in RECIPES if data == args.data]
    if arch not in known:
        raise UserError(f"--arch {arch}: no recipe groks it on {args.data}{suggest(arch, known)}")
    folder = args.study.format(data=args.data, arch=arch) + ("" if args.arm == "main" else f"-{args.arm}")
    seeds, extra = args.seeds.split(","), args.extra_seeds
    settings = [
        f"out={folder}",
        *recipe(RECIPES[args.data, arch]),
        "grok.data.image.val=400",  # chooses checkpoints, settings and targets; the test images are only measured
        *DATA[args.data],
        *ARMS[args.arm],
        f"seeds=[{args.seeds}]",
        f"tune.seeds=[{args.tune_seeds or TUNE_SEEDS.get(args.arm, '100')}]",
        f"tune.trials={args.trials}",
        *([f"grok.data.path={args.data_path}"] if args.data_path else []),
        *args.overrides,
    ]
    study = load_config(StudyConfig, CONFIGS / "study/vision.yaml", settings)
    few = args.arm in SCHEDULED or len(seeds) < 5 if extra is None else not extra
    # the recipe and the options are in the command that results name
    design = " with ".join([sha256_file(CONFIGS / "study/vision.yaml"), *filter(None, [" ".join(args.overrides)])])
    changes: dict[str, Any] = {"extra": () if few else study.extra, "design": design}
    if extra:
        own = tuple(int(seed) for seed in extra.split(","))
        changes["extra"] = tuple(part.model_copy(update={"seeds": own}) for part in study.extra)
    if chosen := args.methods or METHODS.get(args.arm):
        names = [name.strip() for name in chosen.split(",")]
        changes["methods"] = {name: study.methods.get(name, {}) for name in names}
    return decidable(study.model_copy(update=changes))


def recipe(name: str) -> list[str]:
    """Return a grokking recipe's data, net, optimizer and loop as overrides of a study."""
    from llm_unlearn.config import load_config
    from llm_unlearn.grok.config import GrokConfig

    values = load_config(GrokConfig, CONFIGS / f"grok/{name}.yaml").model_dump(mode="json")
    return [f"grok.{section}={json.dumps(values[section])}" for section in ("data", "model", "optim", "loop")]


def decidable(study: Any) -> Any:
    """Return the study, without its primary contrast and extra cells where it lacks what they need."""
    from llm_unlearn.eval.primary import MIN_SEEDS
    from llm_unlearn.log import get_logger

    scenarios = study.grid_scenarios or tuple(study.scenarios)
    extra = tuple(
        part
        for part in study.extra
        if set(part.methods) <= set(study.methods) and set(part.checkpoints) <= set(study.checkpoints)
    )
    p = study.primary
    kept = p is not None and (
        len(study.seeds) >= MIN_SEEDS
        and set(p.methods) <= set(study.methods)
        and {name for pair in p.contrasts for name in pair} <= set(study.checkpoints)
        and p.scenario in scenarios
    )
    if p is not None and not kept:
        get_logger("vision").warning("no primary contrast: this study lacks seeds, methods or checkpoints of it")
    return study.model_copy(update={"extra": extra, "primary": p if kept else None})


def measure(args: argparse.Namespace, study: Any, arch: str) -> dict[str, Any]:
    """Tune, run, probe; return what the committed file holds."""
    from llm_unlearn.eval.packed import unpack
    from llm_unlearn.log import get_logger
    from llm_unlearn.study.arms import wanted
    from llm_unlearn.study.matrix import plan
    from llm_unlearn.study.probing import probe_starts
    from llm_unlearn.study.runner import run_missing
    from llm_unlearn.study.store import Store
    from llm_unlearn.study.tune import choices, plan_tuning, with_settings, write_tuned

    log = get_logger("vision")
    store, folder = Store(Path(study.out)), Path(study.out)
    alone = {"checkpoints": (TUNED_AT,), "extra": ()} if args.arm in SCHEDULED else {}
    searching = plan_tuning(study.model_copy(update=alone))
    log.info("%s: tuning, %d cells", arch, len(searching))
    tuning = run_missing(folder, searching, args.jobs)
    found = (
        for_all(study, choices(study.model_copy(update=alone), searching, store))
        if alone
        else choices(study, searching, store)
    )
    write_tuned(folder / "tuned.yaml", study, found)
    left, left_out = with_settings(wanted(study), found)
    measured = study.model_copy(update={"tuned": str(folder / "tuned.yaml")})
    cells = plan(measured, left)
    log.info("%s: measuring, %d cells; no settings for %s", arch, len(cells), ", ".join(left_out) or "none")
    ended = run_missing(folder, cells, args.jobs)
    content = study_content(measured, [*searching, *cells], found, left_out, store)
    looked = probe_starts(
        measured, unpack(content["outcomes"]), look_of(arch), study.seeds[: args.probe_seeds], args.jobs
    )
    return {
        "what": f"unlearning images: {args.data}, {arch}, {args.arm}",
        "command": command(args, arch),
        "data": args.data, "arch": arch, "arm": args.arm,
        "cells": {"tuning": tuning, "measured": ended},
        **content,
        "probes": looked,
    }  # fmt: skip


def for_all(study: Any, found: Sequence[Any]) -> list[Any]:
    """Return what was chosen at one checkpoint as the choice at every checkpoint of the study."""
    return [replace(choice, checkpoint=kind) for kind in study.checkpoints for choice in found]


def command(args: argparse.Namespace, arch: str) -> str:
    words = ["python benchmarks/vision.py", f"--arch {arch}", f"--data {args.data}", f"--seeds {args.seeds}"]
    words += [f"--arm {args.arm}"] if args.arm != "main" else []
    words += [f"--tune-seeds {args.tune_seeds}"] if args.tune_seeds else []
    words += ["--data-path DIR"] if args.data_path else []
    words += [f"--extra-seeds '{args.extra_seeds}'"] if args.extra_seeds is not None else []
    words += [f"--methods {args.methods}"] if args.methods else []
    return " ".join([*words, *(f"'{text}'" for text in args.overrides)])


def look_of(arch: str) -> Any:
    """Return what is looked at: local complexity as in the published code of that net, curvature at one loss."""
    from llm_unlearn.eval.probes.complexity import DIRECTIONS, DIRECTIONS_RESNET
    from llm_unlearn.eval.probes.table import Settings
    from llm_unlearn.study.probing import Look

    directions = DIRECTIONS_RESNET if arch.startswith("resnet") else DIRECTIONS
    return Look(PROBES, CURVATURE, Settings(items=PROBE_ITEMS, loss=PROBE_LOSS, directions=directions))


if __name__ == "__main__":
    main()
