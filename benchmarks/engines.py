"""Train the same runs on one process and under DeepSpeed ZeRO-1, 2 and 3 on two (gloo, CPU). Compared are the losses
step by step, the final weights (beside how far unlearning moved them), and runs that were interrupted and resumed under
the same or another engine.

    python benchmarks/engines.py --out benchmarks/results/engines.json

Nothing is small enough to stay undivided here: ZeRO-3 keeps no weight whole, and gradients are reduced in many buckets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOOP = ["loop.batch_size=16", "loop.log_every=1", "loop.threads=1", "optim.lr=1e-3", "optim.warmup=5"]
WORLD = ["data.kind=world", "data.preset=world12", "scenario.size=2", "model.size=nano"]
UNLEARN = ["stop.items=8", "stop.every=20", "stop.until=max_steps", "stop.floor=null", "stop.collapse=null"]
LORA = ["lora.rank=4", "loop.gradient_checkpointing=true"]
# recipe and settings; micro_batch divides a process' share, so gradients are accumulated
CASES: dict[str, tuple[str, list[str]]] = {
    "finetune": ("finetune", [*WORLD, "epochs=1000", "loop.micro_batch=4"]),
    "finetune_sgd": ("finetune", [*WORLD, "epochs=1000", "optim.optimizer=sgd", "optim.betas=[0.9,0.999]"]),
    "grok": ("grok", [*WORLD[1:], "watch.until=max_steps", "watch.items=10", "watch.first=10"]),
    "grok_images": ("grok", ["data.kind=digits", "scenario.kind=class", "scenario.size=1", "watch.thresholds=vision",
                             "watch.until=max_steps", "watch.items=10"]),
    "npo": ("unlearn", [*UNLEARN, "method.name=npo", "method.retain=nll", "loop.micro_batch=4"]),
    "npo_kl": ("unlearn", [*UNLEARN, "method.name=npo", "method.retain=kl"]),
    "npo_lora": ("unlearn", [*UNLEARN, "method.name=npo", "method.retain=kl", *LORA]),
    "npo_checkpointed": ("unlearn", [*UNLEARN, "method.name=npo", "loop.gradient_checkpointing=true"]),
    "rmu": ("unlearn", [*UNLEARN, "method.name=rmu", "optim.weight_decay=0"]),
    "scrub": ("unlearn", [*UNLEARN, "method.name=scrub"]),
}  # fmt: skip
SMALL = {  # of the shipped configs: a tiny model would else be one bucket, and whole under ZeRO-3
    "zero1": {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000},
    "zero2": {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000},
    "zero3": {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 0},
}
ENGINES = ("zero1", "zero2", "zero3")
MOVED = ("one_to_zero3", "zero3_to_one")  # finetune, stopped under one engine and resumed under another


class Killed(Exception):
    """What ends the run that is resumed."""


class Stopper:
    """A callback that dies after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, run: Any) -> None:
        if run.step == self.step:
            raise Killed

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


def train(case: str, settings: list[str], start: Path, stop_at: int | None = None) -> None:
    """Run a case in this process, which may be one of several."""
    from accelerate.state import AcceleratorState

    from llm_unlearn.config import load_config
    from llm_unlearn.grok.config import GrokConfig
    from llm_unlearn.grok.run import train_grok
    from llm_unlearn.train.finetune import FinetuneConfig, finetune
    from llm_unlearn.unlearn.config import UnlearnConfig
    from llm_unlearn.unlearn.run import run_unlearn

    AcceleratorState._reset_state(reset_partial_state=False)
    recipe, own = CASES[case]
    given = [*LOOP, *own, *settings]
    if recipe == "grok":
        train_grok(load_config(GrokConfig, None, given))
    elif recipe == "unlearn":
        run_unlearn(load_config(UnlearnConfig, None, [*given, f"model={start}"]))
    else:
        # in both parts of a stopped run, so that callbacks' memories agree
        finetune(load_config(FinetuneConfig, None, given), [Stopper(-1 if stop_at is None else stop_at)])


def work(root: Path, engine: str, cases: list[str], stopped: list[str], resumed: list[str], steps: int) -> None:
    """Run cases under an engine, stop some runs after 3/5 of their steps, resume others."""
    from accelerate import Accelerator

    Accelerator.end_training = lambda self: None  # it would end the process group, and starting is most of the time
    settings = [f"loop.max_steps={steps}", f"loop.save_every={max(steps // 5, 1)}"]
    for name in cases:
        began = time.perf_counter()
        train(name, [*settings, f"out={root / engine / name}"], root / "start")
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for name in stopped:
        with contextlib.suppress(Killed):
            train("finetune", [*settings, f"out={root / name}"], root / "start", 3 * steps // 5)
    for name in resumed:
        train("finetune", [*settings, f"out={root / name}"], root / "start")


def launch(root: Path, engine: str, *work_args: list[str], steps: int) -> float:
    """Run `work` in one process, or under an engine in two; return the seconds it took."""
    program = [str(Path(__file__).resolve()), "--out", str(root), "--steps", str(steps), "--work", engine]
    program += [",".join(names) for names in work_args]
    command = [sys.executable, *program]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed builds an extension with ninja
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if engine != "one":
        config = json.loads((ROOT / "recipes" / "launch" / "deepspeed" / f"{engine}.json").read_text())
        config["zero_optimization"] |= SMALL[engine]
        (root / f"{engine}.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--use_deepspeed"]
        command += ["--deepspeed_config_file", str(root / f"{engine}.json"), "--num_processes", "2"]
        command += ["--num_machines", "1", "--main_process_port", "0", *program]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{engine}: exit code {done.returncode}\n{done.stdout[-6000:]}")
    return time.perf_counter() - began


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Return the largest relative difference of a logged value, and the largest difference of a final weight."""
    from safetensors.torch import load_file

    logs = [[json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(logs[0]) == len(logs[1]), (one, other)
    folder = "last" if (one / "last").exists() else "final"
    weights = [load_file(run / folder / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys(), (one, other)
    found = {
        "steps": len(logs[0]),
        "loss_relative": max(
            abs(b["loss"] - a["loss"]) / max(abs(a["loss"]), 1e-12) for a, b in zip(*logs, strict=True)
        ),
        "weight_absolute": apart(*weights),
    }
    if (one / "trajectory.jsonl").exists():
        found["moved_absolute"] = apart(
            load_file(one.parent.parent / "start" / "final" / "model.safetensors"), weights[1]
        )
    return found


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the largest difference of two models' weights."""
    return max(float((b[name] - weight).abs().max()) for name, weight in a.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, help="empty folder to leave the runs in")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        engine, *names = args.work
        work(args.out, engine, *([n for n in part.split(",") if n] for part in names), steps=args.steps)
        return
    engines, cases = args.engines.split(","), args.cases.split(",")
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        result = measure(runs, engines, cases, args.steps)
    result = {"command": f"python benchmarks/engines.py --cases {args.cases} --steps {args.steps}", **result}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(root: Path, engines: list[str], cases: list[str], steps: int) -> dict[str, Any]:
    """Run everything below a folder and compare."""
    moves = "zero3" in engines and "finetune" in cases
    if any(CASES[name][0] == "unlearn" for name in cases):
        launch(root, "one", ["finetune"], [], [], steps=20)
        shutil.move(root / "one" / "finetune", root / "start")
    seconds = {"one": launch(root, "one", cases, [MOVED[0]] if moves else [], [], steps=steps)}
    for engine in engines:
        same = [f"{engine}_resumed"] if "finetune" in cases else []
        here = moves and engine == "zero3"
        seconds[engine] = launch(
            root, engine, cases, [*same, *([MOVED[1]] if here else [])], [*same, *([MOVED[0]] if here else [])],
            steps=steps,
        )  # fmt: skip
    if moves:
        launch(root, "one", [], [], [MOVED[1]], steps=steps)
    runs = [f"{engine}/{case}" for engine in engines for case in cases]
    runs += [f"{engine}_resumed" for engine in engines if "finetune" in cases] + (list(MOVED) if moves else [])
    found = {
        name: compare(root / "one" / (Path(name).name if "/" in name else "finetune"), root / name) for name in runs
    }
    return {
        "steps": steps, "processes": 2, "runs": found, "seconds": seconds,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
