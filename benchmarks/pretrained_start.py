"""Does a pretrained model grok, and can what grokking brings be had more cheaply?

    python benchmarks/pretrained_start.py --jobs 2              # short40, 3 seeds
    python benchmarks/pretrained_start.py --quick               # world12, a minute

A small Llama is pretrained on the world's plain text ("Dmitri Malik's mentor is Ines Tamm.", every stored fact in three
wordings, no two-hop question), then trained on the questions as any grokking run is. Arms, all with the same tokenizer
and, by seed, the same initial weights and world: from scratch and from the pretrained model; from the latter also with
hop augmentation (every trained two-hop question in four wordings), with a grokked teacher (that seed's from scratch),
with SAM, and with the gradients of two random halves of the authors pushed apart at every step. Told for each: updates,
FLOPs and CPU seconds to t_fit and to t_gen, what had to be trained before (pretraining, teacher), held-out accuracy at
fit and at the end, and how many seeds reached t_gen in budget. Ratios are to from-scratch, by seed. Further arms: --arm
NAME START JSON, for example --arm flatter text '["sam.rho=0.1"]'. Everything finished is kept: run it again to go on.

What it brings: every arm's grokked model (the memorised one, where it did not grok), and from scratch also the
memorised one, forgets four authors at one setting for all until the level of one gold a seed (from scratch, never on
these authors: it gives the level, and is no gold of a model that read of them in the plain text). Told is what is kept
there, what can still be inferred, and two of the probes that the published account rests on, asked of all on the data
of from-scratch. Each forgets on what it was trained on: with hop augmentation a third as many of the rows that are kept
while forgetting are stored facts (world short40: 11 %, elsewhere 32 %).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parent.parent / "recipes/configs/grok/short40.yaml"
RESULTS = Path("benchmarks/results")
Arm = tuple[str, list[str]]  # start, overrides; {folder} is that of the seed
ARMS: dict[str, Arm] = {
    "scratch": ("init", []),
    "scratch, distilled": ("init", ["distil.teacher={folder}/scratch@grok"]),
    "pretrained": ("text", []),
    "pretrained, hops": ("text", ["data.path={folder}/hops"]),
    "pretrained, distilled": ("text", ["distil.teacher={folder}/scratch@grok"]),
    "pretrained, sam": ("text", ["sam.rho=0.05"]),
    "pretrained, apart": ("text", ["orthogonality={weight: 1.0, after: start}"]),
}
QUICK = ["model.size=nano", "optim.lr=3e-3", "loop.max_steps=300", "loop.batch_size=64", "scenario.size=2"]
MARKS = ("t_fit", "t_gen")
GOLD, MEMORISED = "gold", "fit"
FORGETTING: dict[str, dict[str, Any]] = {  # as in recipes/configs/study/interventions.yaml
    "graddiff": {"name": "graddiff", "alpha": 5},
    "npo": {"name": "npo", "alpha": 5, "params": {"beta": 0.1}},
}
LR, UPDATES, EVERY = 1e-4, 200, 2
MARGIN = 0.05  # above gold's forget probability, as `stop.margin` has it
ASKED = ("retain_acc", "retain_inf_acc", "forget_inf_acc")
TOLD = {"kept_at_level": "retain_acc", "forget_inf_acc": "forget_inf_acc"}
PROBED = ("alignment", "local_complexity")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="short40")
    parser.add_argument("--quick", action="store_true", help="world12, a tiny model, a few hundred updates")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrained-start"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="", help="by ; (default: all); scratch is always run")
    parser.add_argument("--arm", nargs=3, action="append", default=[], metavar=("NAME", "START", "JSON"),
                        help="one more arm: START is init or text, JSON a list of overrides")  # fmt: skip
    parser.add_argument("--epochs", type=float, default=150, help="passes over the plain text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}/pretrained_start.json, quick: _quick")
    parser.add_argument("overrides", nargs="*", help="overrides of every arm's config")
    args = parser.parse_args(argv)
    if args.quick:
        args.preset, args.overrides = "world12", [*QUICK, *args.overrides]
    named = [name.strip() for name in args.arms.split(";") if name.strip()] or list(ARMS)
    more = {name: (start, json.loads(text)) for name, start, text in args.arm}
    args.arms = {"scratch": ARMS["scratch"], **{name: ARMS[name] for name in named}, **more}
    args.runs = args.runs.resolve()
    args.out = args.out or RESULTS / f"pretrained_start{'_quick' if args.quick else ''}.json"
    return args


def start_models(task: tuple[argparse.Namespace, int]) -> dict[str, Any]:
    """Write a seed's initial weights, and pretrain them on the world's plain text; tell what that took and taught."""
    from llm_unlearn.config import build_config
    from llm_unlearn.data.qa import world_corpus
    from llm_unlearn.data.schema import save_corpus, write_rows
    from llm_unlearn.data.statements import statement_rows, text_pieces
    from llm_unlearn.data.tokenise import pieces_tokenizer
    from llm_unlearn.data.world import make_world, preset
    from llm_unlearn.models.pretrained import build_model
    from llm_unlearn.train.finetune import FinetuneConfig, finetune
    from llm_unlearn.train.snapshot import save_model

    args, seed = task
    folder, config = args.runs / f"seed{seed}", grok_config(args, seed, "scratch")
    world = preset(args.preset).model_copy(update={"seed": seed})
    rows = statement_rows(make_world(world))
    write_rows(folder / "text.jsonl", rows)
    save_corpus(world_corpus(world.model_copy(update={"hop_wordings": 4}), "hops"), folder / "hops")
    if not (folder / "init").exists():
        tokenizer = pieces_tokenizer(text_pieces(world))
        shape = config.model.model_copy(update={"name": None})
        save_model(folder / "init", build_model(shape, tokenizer, seed), tokenizer, {"kind": "init", "step": 0})
    pretraining = {
        "out": str(folder / "text"), "seed": seed, "epochs": args.epochs,
        "data": {"kind": "custom", "path": str(folder / "text.jsonl")}, "model": {"name": str(folder / "init")},
        "optim": {"lr": config.optim.lr, "weight_decay": 0.1, "betas": config.optim.betas, "schedule": "constant"},
        "loop": {"batch_size": config.loop.batch_size, "threads": 1},
    }  # fmt: skip
    result = finetune(build_config(FinetuneConfig, pretraining))
    return {"cost": result["cost"], "steps": result["steps"], "known": known(str(folder / "text"), rows)}


def known(model: str, rows: Sequence[Any]) -> float:
    """Return the share of statements that end in their value whose value the model would go on with."""
    from llm_unlearn.data.tokenise import encode_rows
    from llm_unlearn.eval.scoring import score_answers
    from llm_unlearn.models.causal import answer_model
    from llm_unlearn.models.pretrained import load_model, load_tokenizer

    ending = [row for row in rows if row.template == "s0"]
    scored = score_answers(answer_model(load_model(model)), encode_rows(load_tokenizer(model), ending))
    return sum(bool(its.hit[-2]) for its in scored) / len(scored)  # the last token is the full stop


def grok_config(args: argparse.Namespace, seed: int, arm: str) -> Any:
    from llm_unlearn.config import load_config
    from llm_unlearn.grok.config import GrokConfig

    folder = args.runs / f"seed{seed}"
    start, overrides = ("init", ["exclude=forget"]) if arm == GOLD else args.arms[arm]
    return load_config(GrokConfig, CONFIG, [
        f"out={place_of(args, seed, arm)}", f"seed={seed}", f"data.preset={args.preset}", f"data.seed={seed}",
        f"scenario.seed={seed}", f"model.name={folder}/{start}", "watch.until=grok", "loop.threads=1", *args.overrides,
        *(text.replace("{folder}", str(folder)) for text in overrides),
    ])  # fmt: skip


def place_of(args: argparse.Namespace, seed: int, arm: str) -> Path:
    return args.runs / f"seed{seed}" / arm.replace(", ", "-")


def train_arm(task: tuple[argparse.Namespace, int, str]) -> dict[str, Any]:
    """Train one arm; one that cannot run (no grokked teacher, no such world) is a row that says why."""
    from llm_unlearn.errors import UserError
    from llm_unlearn.files import read_jsonl
    from llm_unlearn.grok.run import train_grok

    args, seed, arm = task
    config = grok_config(args, seed, arm)
    try:
        result = train_grok(config)
    except UserError as error:
        return {"seed": seed, "arm": arm, "error": str(error)}
    curve, report, cost = read_jsonl(Path(config.out) / "curve.jsonl"), result["report"], result["cost"]
    spent = {
        "updates": result["step"], "flops": cost["flops"] + cost["reference_flops"], "cpu_seconds": cost["cpu_seconds"]
    }  # fmt: skip
    at = {mark: report[mark] and {k: v * report[mark] / result["step"] for k, v in spent.items()} for mark in MARKS}
    at_fit = next((line["held_out_acc"] for line in curve if line["step"] == report["t_fit"]), None)
    return {
        "seed": seed, "arm": arm, **{key: report[key] for key in ("t_fit", "t_gen", "phase", "ratio")}, "to": at,
        "spent": spent, "held_out_at_fit": at_fit, "held_out_best": max(line["held_out_acc"] for line in curve),
        "held_out_last": curve[-1]["held_out_acc"], "train_items": result["train_items"],
    }  # fmt: skip


def brings(task: tuple[argparse.Namespace, int, str, str]) -> dict[str, Any]:
    """Probe an arm's model, and make it forget with every method. The memorised one stands for a checkpoint that was
    never reached; where that was not either, or something cannot be run, the row says so. A method that diverged did
    not come to the level, and has no other values.
    """
    from llm_unlearn.errors import Diverged, UserError
    from llm_unlearn.eval.evaluate import evaluate
    from llm_unlearn.eval.suite import load_suite
    from llm_unlearn.unlearn.start import open_start

    args, seed, arm, asked = task
    model, gold, common = (reached(place_of(args, seed, name), kind)
                           for name, kind in ((arm, asked), (GOLD, "grok"), ("scratch", "grok")))  # fmt: skip
    row: dict[str, Any] = {"seed": seed, "arm": arm, "checkpoint": model.rpartition("@")[2] or asked}
    if not (model and gold and common):
        return {**row, "error": f"from scratch, gold or itself reached neither grok nor {MEMORISED}"}
    try:
        same = open_start(common, None, None)
        values, suite = probed(model, same), load_suite("language_study")
        golds = evaluate(gold, suite, same.corpus, same.request, fmt=same.data.format)["metrics"]
        level = golds["forget_Q_A_Prob"]["value"] + MARGIN
        for method in FORGETTING:
            try:
                values |= forget(model, gold, level, method, same)
            except Diverged:
                values[f"{method}, came to the level"] = (0.0, 0.0)
    except UserError as error:
        return {**row, "error": str(error)}
    return {**row, "gold": gold.rpartition("@")[2], "values": values}


def probed(model: str, same: Any) -> dict[str, tuple[float | None, float]]:
    """Return what the probes find in a model, on the data `same`."""
    from llm_unlearn.eval.probes.run import probe_model
    from llm_unlearn.eval.probes.table import Settings
    from llm_unlearn.log import finite

    out = Path(model.replace("@", "-probed-"))
    found = probe_model(model, same.corpus, same.request, which=PROBED, settings=Settings(items=128), out=out)["probes"]
    return {f"{name}, {its['name']}": (finite(its["value"]), 0.0) for name in PROBED for its in found[name]["lines"]}


def reached(run: Path, kind: str) -> str:
    """Return a run's model at a checkpoint, or at the memorised one where it never reached that; "" for neither."""
    return next((f"{run}@{k}" for k in (kind, MEMORISED) if (run / k / "config.json").exists()), "")


def forget(model: str, gold: str, level: float, method: str, same: Any) -> dict[str, tuple[float | None, float]]:
    """Make a model forget until a level; return what is asked of it before and after, on the data `same`, with
    the step of the grid that a number lies on.
    """
    from llm_unlearn.config import build_config
    from llm_unlearn.eval.evaluate import evaluate
    from llm_unlearn.eval.outcome import load_outcomes
    from llm_unlearn.eval.suite import load_suite
    from llm_unlearn.unlearn.config import UnlearnConfig
    from llm_unlearn.unlearn.facts import comparison_facts
    from llm_unlearn.unlearn.run import run_unlearn
    from llm_unlearn.unlearn.start import open_start

    out, suite = f"{model.replace('@', '-forgets-')}-{method}", load_suite("language_study")
    settings = {  # gold was not trained on every arm's data, so its level is given as a number
        "out": out, "model": model, "method": FORGETTING[method], "optim": {"lr": LR},
        "loop": {"max_steps": UPDATES, "threads": 1},
        "stop": {"every": EVERY, "until": "target", "target": level, "floor": None},
    }  # fmt: skip
    facts = comparison_facts(run_unlearn(build_config(UnlearnConfig, settings)), open_start(model, None, None).origin)
    evaluate(out, suite, same.corpus, same.request, fmt=same.data.format, gold=gold, start=model, run=facts)
    (outcome,) = load_outcomes([Path(out)])
    its, updates = outcome.metrics, outcome.number("updates_to_target")
    steps = {name: 1 / its[name]["n"] for name in ASKED}
    return {
        **{name: (its[name]["start"], steps[name]) for name in ASKED},
        "gold, forget_inf_acc": (its["forget_inf_acc"]["gold"], steps["forget_inf_acc"]),
        **{f"{method}, {name}": (outcome.number(name), steps[rows]) for name, rows in TOLD.items()},
        f"{method}, came to the level": (float(updates is not None), 0.0),
        f"{method}, updates": (UPDATES if updates is None else updates, EVERY),
    }


def before(arm: Arm, text: dict[str, Any], teacher: dict[str, Any]) -> dict[str, float]:
    """Return what had to be trained before an arm could start: FLOPs and CPU seconds."""
    out = {"flops": 0.0, "cpu_seconds": 0.0}
    for needed, spent in ((arm[0] == "text", text["cost"]), (any("scratch@" in o for o in arm[1]), teacher)):
        for key in out:
            out[key] += spent.get(key, 0.0) if needed else 0.0
    return out


def against_scratch(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by arm, mark and currency, the geometric mean of the ratio to from-scratch over the seeds in which both
    got there, with its 95 % interval (from three on), and in how many of all this arm did.
    """
    from llm_unlearn.stats import mean_interval

    by = {(row["arm"], row["seed"]): row for row in rows if "error" not in row}
    out = []
    for arm in args.arms:
        for mark in MARKS:
            seeds = [s for s in range(args.seeds) if (arm, s) in by and by[arm, s]["to"][mark]]
            both = [s for s in seeds if ("scratch", s) in by and by["scratch", s]["to"][mark]]
            line: dict[str, Any] = {"arm": arm, "to": mark, "reached": len(seeds), "of": args.seeds}
            for key in ("updates", "flops", "cpu_seconds"):
                own = [by[arm, s]["to"][mark][key] for s in seeds]
                line[key] = sum(own) / len(own) if own else None
                for name, extra in (("ratio", 0), ("ratio_with_before", 1)):
                    logs = [
                        math.log((by[arm, s]["to"][mark][key] + extra * by[arm, s]["before"].get(key, 0))
                                 / by["scratch", s]["to"][mark][key])
                        for s in both
                    ]  # fmt: skip
                    if logs and not (extra and key == "updates"):
                        its = mean_interval(logs) if len(logs) > 2 else None
                        limits = [math.exp(its.lo), math.exp(its.hi)] if its else None
                        line[f"{key}_{name}"] = {"mean": math.exp(sum(logs) / len(logs)), "ci": limits, "n": len(logs)}
            out.append(line)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    from llm_unlearn.errors import run_main

    args = parse(argv)

    def go() -> None:
        if args.jobs == 1:
            quiet()
            report(args, map)
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=quiet) as pool:
                report(args, pool.map)

    run_main(go)


def report(args: argparse.Namespace, each: Any) -> None:
    from llm_unlearn.files import write_atomic
    from llm_unlearn.study.store import environment

    seeds = range(args.seeds)
    text = list(each(start_models, [(args, seed) for seed in seeds]))
    rows = list(each(train_arm, [(args, seed, "scratch") for seed in seeds]))  # the teachers
    others = [arm for arm in (*args.arms, GOLD) if arm != "scratch"]
    rows += [row for row in each(train_arm, [(args, s, arm) for arm in others for s in seeds]) if row["arm"] != GOLD]
    for row in rows:
        if "error" not in row:
            row["before"] = before(args.arms[row["arm"]], text[row["seed"]], rows[row["seed"]].get("spent", {}))
    lines = against_scratch(args, rows)
    wanted = [("scratch", MEMORISED), *((arm, "grok") for arm in args.arms)]
    tasks = [(args, seed, *model) for model in wanted for seed in seeds]
    once: dict[Any, Any] = {}  # one process a folder: an arm that fell back on its memorised model is not run twice
    for task in tasks:
        once.setdefault(reached(place_of(*task[:3]), task[3]) or task[1:], task)
    content = {
        "what": "steps, FLOPs and CPU seconds to fit and to generalise, from a pretrained start and from scratch",
        "command": f"python benchmarks/pretrained_start.py {'--quick' if args.quick else f'--preset {args.preset}'}",
        "forgetting": {"authors": grok_config(args, 0, "scratch").scenario.size, "updates": UPDATES, "lr": LR},
        "overrides": args.overrides, "arms": args.arms, "pretraining": text, "lines": lines, "rows": rows,
        "brought": list(each(brings, list(once.values()))),
        "environment": environment(),
    }  # fmt: skip
    write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())
    for line in lines:
        ratio = line.get("cpu_seconds_ratio", {"mean": math.nan, "ci": None})
        print(f"{line['arm']}, {line['to']}: {line['reached']} of {line['of']}, updates {line['updates']}, "
              f"CPU-s {line['cpu_seconds']}, x {ratio['mean']:.2f} of scratch {ratio['ci']}")  # fmt: skip


def quiet() -> None:
    os.environ["LLM_UNLEARN_QUIET"] = "1"
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
