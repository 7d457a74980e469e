"""How many seeds grok on images? A small CNN and a residual net on digits, per seed: when they memorised, when they
generalised, what that cost.

    nice python benchmarks/vision_grokking.py --jobs 2

Trains the shipped recipes with several seeds (a seed draws the training images, the initial weights and every order),
in processes side by side, and writes what the detector's vision preset says of each. A seed counts where t_gen / t_fit
is at least 5 and test accuracy rose by at least 12 points from fit to its best later value. Finished runs are read.
About 20 (CNN) and 40 (ResNet) CPU-seconds a seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "recipes/configs/grok"
RECIPES = {"cnn": "digits.yaml", "resnet8": "digits_resnet.yaml"}
RATIO, RISE = 5.0, 0.12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="cnn,resnet8", help="by comma")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--runs", default="runs/grokking_vision", help="folder of runs; finished ones are not run again"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grokking_digits.json"))
    parser.add_argument("overrides", nargs="*", help="overrides of both recipes; give another --runs with them")
    from llm_unlearn.errors import run_main

    run_main(lambda: measure(parser.parse_args()))


def measure(args: argparse.Namespace) -> None:
    from llm_unlearn.files import write_atomic
    from llm_unlearn.stats import wilson
    from llm_unlearn.study.store import environment

    started = time.time()
    archs = [name.strip() for name in args.arch.split(",")]
    tasks = [(arch, seed, args.runs, tuple(args.overrides)) for arch in archs for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(one, tasks))
    nets = {}
    for arch in archs:
        runs = [row for row in rows if row["arch"] == arch]
        good = sum(row["grokked"] for row in runs)
        share = wilson(good, len(runs))
        nets[arch] = {
            "recipe": f"recipes/configs/grok/{RECIPES[arch]}",
            "grokked": good, "of": len(runs), "wilson_95": [share.lo, share.hi], "runs": runs,
        }  # fmt: skip
    content = {
        "what": f"grokking on digits: delay ratio >= {RATIO:g} and a rise of test accuracy after fit >= {RISE:g}",
        "command": " ".join(["python benchmarks/vision_grokking.py", f"--seeds {args.seeds}", *args.overrides]),
        "nets": nets,
        "seconds": time.time() - started,
        "environment": environment(),
    }
    write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())
    print("| net | seed | t_fit | t_gen | ratio | test acc at fit | best later | rise | phase | CPU-s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(told(row)) + " |")
    print("; ".join(f"{arch}: {net['grokked']} of {net['of']} grokked" for arch, net in nets.items()))


def one(task: tuple[str, int, str, tuple[str, ...]]) -> dict[str, Any]:
    """Train one seed; a finished run is read."""
    os.environ["LLM_UNLEARN_QUIET"] = "1"
    import torch

    from llm_unlearn.config import load_config
    from llm_unlearn.files import read_jsonl
    from llm_unlearn.grok.config import GrokConfig
    from llm_unlearn.grok.run import train_grok

    torch.set_num_threads(1)
    arch, seed, runs, overrides = task
    out = Path(runs) / f"{arch}-seed{seed}"
    settings = [f"out={out}", f"seed={seed}", f"data.seed={seed}", f"scenario.seed={seed}", *overrides]
    result = train_grok(load_config(GrokConfig, CONFIGS / RECIPES[arch], settings))
    report, curve = result["report"], read_jsonl(out / "curve.jsonl")
    later = [line for line in curve if report["t_fit"] is not None and line["step"] >= report["t_fit"]]
    at_fit, best = (later[0]["held_out_acc"], max(line["held_out_acc"] for line in later)) if later else (None, None)
    rise = None if at_fit is None else best - at_fit
    delayed = report["ratio"] is not None and report["ratio"] >= RATIO
    return {
        "arch": arch,
        "seed": seed,
        "grokked": delayed and rise is not None and rise >= RISE and report["phase"].startswith("grok"),
        "test_acc_at_fit": at_fit,
        "test_acc_best": best,
        "rise": rise,
        "lowest_train_acc_after_fit": min((line["train_acc"] for line in later), default=None),
        "steps": result["step"],
        "stop": result["stop"],
        "report": report,
        "parameters": result["parameters"],
        "cost": result["cost"],
    }


def told(row: dict[str, Any]) -> list[str]:
    report = row["report"]
    numbers = [report["ratio"], row["test_acc_at_fit"], row["test_acc_best"], row["rise"]]
    shown = [
        "–" if value is None else f"{value:.{digits}f}" for value, digits in zip(numbers, (1, 3, 3, 3), strict=True)
    ]
    return [row["arch"], str(row["seed"]), str(report["t_fit"]), str(report["t_gen"]), *shown, report["phase"],
            f"{row['cost']['cpu_seconds']:.0f}"]  # fmt: skip


if __name__ == "__main__":
    main()
