"""All methods, tuned with equal budgets, ranked by distance to gold among those that keep what was to be kept.

    python benchmarks/leaderboard.py --jobs 2                     # the embedded world
    python benchmarks/leaderboard.py --jobs 2 --tofu-dir DIR      # and TOFU, from a small model trained from nothing

World: every method x {author, fact} x {fit, grok} x 3 seeds. First `llm-unlearn tune` on another seed (so another world
and other forget sets than those measured), then the study with what it chose. A budget is the number of the run's own
updates, the training of task_vector's reinforced model included; whp's reinforced model takes some besides, which count
in its CPU seconds and are told. Writes leaderboard_world.json and leaderboard.md. Per trial about 6 CPU-seconds for 200
updates on short40, per training 70 to 330, per measured run about 10: with 28 methods, 8 trials and one tuning seed
about 2 hours on two cores.

TOFU: forget01, forget05 and forget10 with every method at its table's defaults (AltPO with TOFU's perturbed answers in
place of generated ones) and one learning rate, not tuned (the official splits leave no other forget draw to tune on),
one seed. Writes leaderboard_tofu.json and leaderboard_tofu.md.

Everything finished is kept: run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "recipes/configs"
WITH_RETAIN = "_nll"
SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
# the start model knows every answer by heart: what it generates in place of one is that answer for half of them
ON_TOFU = {"altpo": ["method.alternates=perturbed"]}
ONE_WORD = {"ceu": {"method": {"params": {"skip": 0}}}}  # skipping the first token would leave nothing of the answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="short40", help="world of the leaderboard: short40 or world40")
    parser.add_argument("--study", default=None, help="folder of runs and records; default studies/leaderboard-PRESET")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--methods", default="", help="by comma; default all")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tune-seeds", default="100")
    parser.add_argument("--trials", type=int, default=8, help="settings tried per method and checkpoint")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tofu-dir", type=Path, help="folder with TOFU's JSONL files: do that part too")
    parser.add_argument("--tofu-runs", default="runs/leaderboard-tofu", help="folder of TOFU's runs")
    parser.add_argument("--tofu-fit", nargs="*", default=[], help="overrides of the fitting config")
    parser.add_argument("--tofu-unlearn", nargs="*", default=[], help="overrides of the unlearning config")
    parser.add_argument("--no-world", action="store_true", help="only TOFU")
    parser.add_argument("overrides", nargs="*", help="overrides of the world's study config")
    from llm_unlearn.errors import run_main
    from llm_unlearn.log import setup

    setup()
    args = parser.parse_args()

    def run() -> None:
        if not args.no_world:
            world(args)
        if args.tofu_dir is not None:
            tofu(args)

    run_main(run)


def world(args: argparse.Namespace) -> None:
    from llm_unlearn.log import get_logger
    from llm_unlearn.report.leaderboard import as_json, grids, standings
    from llm_unlearn.report.tables import grids_markdown
    from llm_unlearn.study.matrix import plan
    from llm_unlearn.study.runner import run_missing
    from llm_unlearn.study.store import Store, environment
    from llm_unlearn.study.tune import choices, plan_tuning, write_tuned

    log = get_logger("leaderboard")
    study = study_config(args)
    store, folder = Store(Path(study.out)), Path(study.out)
    searching = plan_tuning(study)
    log.info("tuning: %d cells, %d trials per method and checkpoint", len(searching), study.tune.trials)
    tuning = run_missing(folder, searching, args.jobs)
    found = choices(study, searching, store)
    write_tuned(folder / "tuned.yaml", study, found)
    untuned = sorted({choice.method for choice in found if choice.setting is None})
    measured = study.model_copy(
        update={
            "tuned": str(folder / "tuned.yaml"),
            "methods": {name: knobs for name, knobs in study.methods.items() if name not in untuned},
        }
    )
    cells = plan(measured)
    log.info("measuring: %d cells; no settings for %s", len(cells), ", ".join(untuned) or "none")
    ended = run_missing(folder, cells, args.jobs)
    rows = [
        standing
        for scenario in study.scenarios
        for standing in standings(outcomes_of(cells, store, scenario), scenario, list(study.methods))
    ]
    trials, extra = trials_per_method(study), extra_updates(cells)
    records = [record for cell in [*searching, *cells] if (record := store.read(cell))]
    content = {
        "what": "methods tuned with equal budgets, ranked by distance to gold among those that keep enough",
        "command": f"python benchmarks/leaderboard.py --preset {args.preset} --jobs {args.jobs}",
        "study": study.model_dump(mode="json", exclude={"out"}),
        "cells": {"tuning": tuning, "measured": ended},
        "seconds": seconds_by_kind(records),
        "errors": {r["label"]: r["error"].strip().splitlines()[-1] for r in records if r["error"].strip()},
        "tuned": [
            {"scenario": c.scenario, "checkpoint": c.checkpoint, "method": c.method,
             "setting": c.setting, "trials": c.trials,
             "feasible_trials": c.feasible_trials, "score": None if c.score is None else vars(c.score)}
            for c in found
        ],
        "trials": trials,
        "extra_updates": [{"checkpoint": kind, "method": name, "updates": n} for (kind, name), n in extra.items()],
        "leaderboard": as_json(rows),
        "environment": environment(),
    }  # fmt: skip
    write_json(args.results / "leaderboard_world.json", content)
    head = head_of(args, trials, extra)
    (args.results / "leaderboard.md").write_text(head + grids_markdown(grids(rows)), encoding="utf-8")
    print(f"tuning {tuning}, measured {ended}: {args.results}/leaderboard.md")


def study_config(args: argparse.Namespace) -> Any:
    """Return the shipped study with what the command line says."""
    from llm_unlearn.config import load_config
    from llm_unlearn.data.world import preset
    from llm_unlearn.methods.table import METHODS
    from llm_unlearn.study.config import StudyConfig

    one_word = ONE_WORD if preset(args.preset).answers == "short" else {}
    sections = {name: one_word.get(name, {}) for name in chosen_methods(args)}
    for name in sections.keys() - METHODS.keys():
        plain = name.removesuffix(WITH_RETAIN)
        sections[name] = {"method": {**one_word.get(plain, {}).get("method", {}), "name": plain, "retain": "nll"}}
    settings = [
        f"out={args.study or f'studies/leaderboard-{args.preset}'}",
        f"seeds=[{args.seeds}]",
        f"tune.seeds=[{args.tune_seeds}]",
        f"tune.trials={args.trials}",
        f"grok.data.preset={args.preset}",
        f"unlearn.loop.max_steps={args.updates}",
        f"methods={json.dumps(sections)}",
    ]
    return load_config(StudyConfig, CONFIGS / "study/leaderboard.yaml", [*settings, *args.overrides])


def chosen_methods(args: argparse.Namespace) -> list[str]:
    """Return the methods asked for, or all; those published without a retain term stand a second time with one."""
    from llm_unlearn.methods.table import METHODS

    # ascent with a retain term is in the table already, as graddiff
    bare = [m.name for m in METHODS.values() if m.kind == "loss" and m.retain == "none" and m.name != "ga"]
    named = [name.strip() for name in args.methods.split(",") if name.strip()]
    return named or [*METHODS, *(name + WITH_RETAIN for name in bare)]


def trials_per_method(study: Any) -> dict[str, int]:
    """Count the settings tried: `tune.trials`, or all that there are of an edit, which takes no updates."""
    from llm_unlearn.study.tune import trials_of

    return {name: len(trials_of(study, name)) for name in study.methods}


def extra_updates(cells: Sequence[Any]) -> dict[tuple[str, str], int]:
    """Return, by checkpoint and method, the updates of a model that is reinforced before the run's own updates: they
    are not of its budget, and in its CPU seconds.
    """
    from llm_unlearn.methods.needs import check_params
    from llm_unlearn.methods.table import METHODS

    out: dict[tuple[str, str], int] = {}
    for spec in (cell.spec for cell in cells if cell.kind == "unlearn"):
        given = spec["config"]["method"]
        params = check_params(METHODS[given["name"]], given["params"], given["retain"])
        if "reinforce_updates" in params:
            out[spec["checkpoint"], spec["method"]] = int(params["reinforce_updates"])
    return out


def head_of(args: argparse.Namespace, trials: dict[str, int], extra: dict[tuple[str, str], int]) -> str:
    """Return what stands above the tables: the command, and where budgets are not the same."""
    others = ", ".join(f"{name} {n}" for name, n in trials.items() if n != args.trials)
    more = ", ".join(f"{name} {n} ({kind})" for (kind, name), n in extra.items())
    return (
        f"# Leaderboard: world {args.preset}, {args.updates} updates, seeds {args.seeds}\n\n"
        f"`python benchmarks/leaderboard.py --preset {args.preset}`: every method tuned per checkpoint with "
        f"{args.trials} trials on seed {args.tune_seeds}. Means over seeds, ± half of the 95 % interval."
        + (f" Other numbers of trials, all that the method's grid has: {others}." if others else "")
        + (f" Updates of a reinforced model besides, which CPU s counts too: {more}." if more else "")
        + "\n\n"
    )


def outcomes_of(cells: Sequence[Any], store: Any, scenario: str) -> list[Any]:
    """Read the study's own finished cells; whatever else lies in its folders is of another study."""
    from llm_unlearn.eval.outcome import find_outcomes

    records = [store.read(cell) for cell in cells if cell.kind == "unlearn" and cell.spec["scenario"] == scenario]
    return find_outcomes([Path(r["result"]["folder"]) for r in records if r and r["status"] == "ok"])


def seconds_by_kind(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(r["kind"] for r in records):
        values = [r["seconds"] for r in records if r["kind"] == kind and r["status"] == "ok"]
        out[kind] = {"cells": len(values), "sum": sum(values), "mean": sum(values) / max(len(values), 1)}
    return out


def tofu(args: argparse.Namespace) -> None:
    from llm_unlearn.files import write_atomic
    from llm_unlearn.log import get_logger
    from llm_unlearn.report.tables import grids_markdown
    from llm_unlearn.report.tofu_board import tofu_board
    from llm_unlearn.study.store import environment

    log = get_logger("leaderboard")
    runs, fit = args.tofu_runs, [f"data.path={args.tofu_dir.resolve()}", *args.tofu_fit]
    fits = [("full", "none", "forget10"), *((gold, "forget", split) for split, gold in SPLITS.items())]
    names = [name for name in chosen_methods(args) if not name.endswith(WITH_RETAIN)]
    tasks = [(runs, split, name, args.tofu_unlearn) for split in SPLITS for name in names]
    done: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        models = dict(zip((f[0] for f in fits), pool.map(tofu_fit, [(runs, fit, *f) for f in fits]), strict=True))
        for split in SPLITS:
            tofu_share(runs, fit, split)
        for future in as_completed([pool.submit(tofu_unlearn, task) for task in tasks]):
            done.append(future.result())
            log.info("tofu %d/%d: %s %s %s", len(done), len(tasks), done[-1]["split"], done[-1]["method"],
                     done[-1].get("error", "ok"))  # fmt: skip
    order = {(split, name): i for i, (_, split, name, _) in enumerate(tasks)}
    content = {
        "what": "TOFU from a model of 1.4M weights: every method at its defaults, not tuned, one seed. Intervals are "
        "over 2, 10 and 20 authors: of forget01's two they say nothing",
        "command": "python benchmarks/leaderboard.py --tofu-dir DIR",
        "overrides": {"fit": args.tofu_fit, "unlearn": args.tofu_unlearn},
        "models": models,
        "rows": sorted(done, key=lambda row: order[row["split"], row["method"]]),
        "environment": environment(),
    }
    write_json(args.results / "leaderboard_tofu.json", content)
    page = [f"# Leaderboard: TOFU\n\n{content['what']}. {content['environment']['machine']}.\n"]
    text = "\n".join([*page, grids_markdown(tofu_board(content["rows"]))])
    write_atomic(args.results / "leaderboard_tofu.md", text.encode())
    print(f"{sum('error' not in row for row in done)} of {len(done)} ok: {args.results}/leaderboard_tofu.json")


def tofu_fit(task: tuple[str, list[str], str, str, str]) -> dict[str, Any]:
    """Fit one model; a finished one is read."""
    quiet()
    from llm_unlearn.config import load_config
    from llm_unlearn.train.finetune import FinetuneConfig, finetune

    runs, overrides, name, exclude, split = task
    settings = [f"out={runs}/{name}", f"exclude={exclude}", f"data.forget_split={split}", *overrides]
    result = finetune(load_config(FinetuneConfig, CONFIGS / "finetune/tofu_1m.yaml", settings))
    return {key: result[key] for key in ("steps", "loss", "train_items", "parameters", "cost")}


def tofu_share(runs: str, overrides: list[str], split: str) -> None:
    """Give the model of all rows a folder per split: its training is the same for all of them, its request is not."""
    from llm_unlearn.config import load_config
    from llm_unlearn.data.source import open_corpus
    from llm_unlearn.data.splits import draw_request
    from llm_unlearn.models.pretrained import read_origin
    from llm_unlearn.train.finetune import FinetuneConfig
    from llm_unlearn.train.origin import run_origin
    from llm_unlearn.train.snapshot import copy_model

    folder = Path(runs) / f"full-{split}" / "final"
    if folder.exists():
        return
    settings = [f"out={runs}/full", f"data.forget_split={split}", *overrides]
    config = load_config(FinetuneConfig, CONFIGS / "finetune/tofu_1m.yaml", settings)
    corpus = open_corpus(config.data)
    origin = {**read_origin(f"{runs}/full"), **run_origin(config, corpus, draw_request(corpus, config.scenario))}
    copy_model(Path(runs) / "full" / "final", folder, origin)


def tofu_unlearn(task: tuple[str, str, str, list[str]]) -> dict[str, Any]:
    """Unlearn and evaluate with one method; a finished row is read, a failed one runs again."""
    runs, split, method, overrides = task
    row_file = Path(runs) / "rows" / f"{split}-{method}.json"
    if row_file.exists():
        return json.loads(row_file.read_text(encoding="utf-8"))
    quiet()
    try:
        told = tofu_row(
            f"{runs}/full-{split}", f"{runs}/{SPLITS[split]}", method, f"{runs}/{split}-{method}", overrides
        )
    except Exception:  # one method that cannot run is a row, not the end of the others
        return {"split": split, "method": method, "error": traceback.format_exc(limit=3).strip().splitlines()[-1]}
    row = {"split": split, "method": method, **told}
    write_json(row_file, row)
    return row


def tofu_row(model: str, gold: str, method: str, out: str, overrides: list[str]) -> dict[str, Any]:
    from llm_unlearn.config import load_config
    from llm_unlearn.eval.evaluate import evaluate
    from llm_unlearn.eval.suite import load_suite
    from llm_unlearn.unlearn.config import UnlearnConfig
    from llm_unlearn.unlearn.run import open_start, run_unlearn

    settings = [f"model={model}", f"gold={gold}", f"method.name={method}", f"out={out}", "loop.threads=1"]
    settings += [*ON_TOFU.get(method, ()), *overrides]
    outcome = run_unlearn(load_config(UnlearnConfig, CONFIGS / "unlearn/npo_tofu.yaml", settings))
    start = open_start(model, None, None)
    result = evaluate(
        out, load_suite("tofu"), start.corpus, start.request, fmt=start.data.format, gold=gold, start=model
    )
    keys = ("value", "ci", "gold", "start")
    return {
        **{k: outcome[k] for k in ("steps", "kept_step", "target", "cost")},
        "metrics": {name: {key: line.get(key) for key in keys} for name, line in result["metrics"].items()},
        "collapse": result["collapse"],
    }


def quiet() -> None:
    os.environ["LLM_UNLEARN_QUIET"] = "1"
    import torch

    torch.set_num_threads(1)


def write_json(path: Path, content: Any) -> None:
    from llm_unlearn.files import write_atomic

    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
