"""Train the same runs on one process and on two (gloo, CPU) under DDP, DeepSpeed ZeRO-1, 2 and 3 and FSDP2. Compared
are the losses step by step, the final weights (beside how far unlearning moved them), and runs that were killed, or
asked to end by a SIGTERM to one process, and resumed under the same or another engine.

    python benchmarks/engines.py --out benchmarks/results/engines.json

Nothing is small enough to stay undivided here: ZeRO-3 keeps no weight whole, and gradients are reduced in many buckets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
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
ENGINES = ("ddp", *SMALL, "fsdp2")
MOVED = ("zero3", "fsdp2")  # under which finetune is also ended when begun on one process, and the other way
STRUCK = ("whole", "killed", "asked")  # what befalls a run: nothing, its end after 3/5, SIGTERM to its last process
Job = tuple[str, str, str]  # folder, case, one of STRUCK


class Killed(Exception):
    """What ends a run that is resumed from its newest state."""


class Striker:
    """A callback of fine-tunings, also of those that nothing befalls, so that callbacks' memories agree."""

    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def __call__(self, run: Any) -> None:
        weights = list(run.model.parameters())
        if run.step == 1 and hasattr(weights[0], "to_local"):  # FSDP2: what this process holds between steps
            held = sum(weight.to_local().numel() for weight in weights) / sum(weight.numel() for weight in weights)
            Path(f"{run.out}.held{run.accelerator.process_index}").write_text(str(held))
        if run.step != self.step or self.how == "whole":
            return
        if self.how == "killed":
            raise Killed
        if run.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


def train(root: Path, job: Job, steps: int) -> None:
    """Run a job in this process, which may be one of several."""
    from accelerate.state import AcceleratorState

    from llm_unlearn.config import load_config
    from llm_unlearn.grok.config import GrokConfig
    from llm_unlearn.grok.run import train_grok
    from llm_unlearn.train.finetune import FinetuneConfig, finetune
    from llm_unlearn.unlearn.config import UnlearnConfig
    from llm_unlearn.unlearn.run import run_unlearn

    AcceleratorState._reset_state(reset_partial_state=False)
    name, case, how = job
    recipe, own = CASES[case]
    given = [*LOOP, *own, f"loop.max_steps={steps}", f"loop.save_every={max(steps // 2, 1)}", f"out={root / name}"]
    if recipe == "grok":
        train_grok(load_config(GrokConfig, None, given))
    elif recipe == "unlearn":
        run_unlearn(load_config(UnlearnConfig, None, [*given, f"model={root / 'start'}"]))
    else:
        finetune(load_config(FinetuneConfig, None, given), [Striker(how, 3 * steps // 5)])


def work(root: Path, jobs: dict[str, list[Job]], steps: int) -> None:
    """Run each engine's jobs, one after the other; the last of all ends this process if it is asked to end."""
    from accelerate import Accelerator, PartialState

    from llm_unlearn.errors import Interrupted
    from llm_unlearn.train.checkpoint import newest_valid, verify

    Accelerator.end_training = lambda self: None  # it would end the process group, and starting is most of the time
    for engine, its in jobs.items():
        if engine in SMALL:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(root / f"{engine}.json")
        for job in its:
            began = time.perf_counter()
            try:
                train(root, job, steps)
            except Killed:
                pass
            except Interrupted as ended:
                newest = newest_valid(root / job[0] / "checkpoints")
                told = {"code": ended.code, "saved_step": newest and verify(newest)["step"]}
                (root / f"{job[0]}.ended{PartialState().process_index}").write_text(json.dumps(told))
                if job == list(jobs.values())[-1][-1]:
                    raise
            print(f"{engine} {' '.join(job)}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def launch(root: Path, jobs: dict[str, list[Job]], steps: int) -> float:
    """Run `work` in two processes, under DDP, DeepSpeed or FSDP2; return the seconds it took."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed builds an extension with ninja
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not SMALL.keys() & jobs.keys():
        (engine,) = jobs
        env["ACCELERATE_USE_CPU"] = "true"
        options = ["--config_file", str(ROOT / "recipes" / "launch" / f"{engine}.yaml")]
    else:
        options = ["--use_deepspeed", "--deepspeed_config_file", str(root / f"{next(iter(jobs))}.json")]
    for engine in SMALL.keys() & jobs.keys():
        config = json.loads((ROOT / "recipes" / "launch" / "deepspeed" / f"{engine}.json").read_text())
        config["zero_optimization"] |= SMALL[engine]
        (root / f"{engine}.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", str(Path(__file__).resolve())]
    command += ["--out", str(root), "--steps", str(steps), "--work", json.dumps(jobs)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    asked = list(jobs.values())[-1][-1][2] == "asked"
    if ("exitcode  : 143" not in done.stdout) if asked else done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout[-6000:]}")
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


def same_bits(one: Path, other: Path) -> bool:
    """Return whether two runs left the same weights and logged the same losses."""
    left = ("final/model.safetensors", "train_log.jsonl")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in left)


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
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        from llm_unlearn.errors import run_main

        jobs = {engine: [tuple(job) for job in its] for engine, its in json.loads(args.work).items()}
        run_main(lambda: work(args.out, jobs, args.steps))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        result = measure(runs, {name: args.cases.split(",") for name in args.engines.split(",")}, args.steps)
    result = {"command": f"python benchmarks/engines.py --cases {args.cases} --steps {args.steps}", **result}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def jobs_of(engine: str, cases: list[str]) -> list[Job]:
    """Return what is run under an engine: every case, and `finetune` stopped and gone on with."""
    jobs: list[Job] = [(f"{engine}/{case}", case, "whole") for case in cases]
    if "finetune" in cases:
        for how in ("killed", "asked"):
            jobs += [(f"{engine}_{how}", "finetune", how), (f"{engine}_{how}", "finetune", "whole")]
        if engine in MOVED:
            jobs += [(f"one_to_{engine}", "finetune", "whole"), (f"{engine}_to_one", "finetune", "asked")]
    return jobs


def measure(root: Path, asked: dict[str, list[str]], steps: int) -> dict[str, Any]:
    """Run each engine's cases below a folder and compare. What is run on one process is run in this one."""
    began, moves = time.perf_counter(), [engine for engine in MOVED if "finetune" in asked.get(engine, [])]
    cases = list(dict.fromkeys(name for its in asked.values() for name in its))
    if any(CASES[name][0] == "unlearn" for name in cases):
        train(root, ("start", "finetune", "whole"), 20)
    for case in cases:
        train(root, (f"one/{case}", case, "whole"), steps)
    for engine in moves:
        with contextlib.suppress(Killed):
            train(root, (f"one_to_{engine}", "finetune", "killed"), steps)
    seconds = {"one": time.perf_counter() - began}
    jobs = {engine: jobs_of(engine, asked[engine]) for engine in ENGINES if engine in asked}
    for name, these in (("ddp", ["ddp"]), ("zero", [*SMALL]), ("fsdp2", ["fsdp2"])):
        if its := {engine: jobs[engine] for engine in these if engine in jobs}:
            seconds[name] = launch(root, its, steps)
    for engine in moves:
        train(root, (f"{engine}_to_one", "finetune", "whole"), steps)
    runs = list(dict.fromkeys(name for its in jobs.values() for name, _, _ in its))
    found = {
        name: compare(root / "one" / (Path(name).name if "/" in name else "finetune"), root / name) for name in runs
    }
    for name in runs:  # resumed under the same engine
        if name.endswith(("_killed", "_asked")):
            found[name]["bit_identical"] = same_bits(root / name.partition("_")[0] / "finetune", root / name)
        for what in ("ended", "held"):
            if told := [json.loads(path.read_text()) for path in sorted(root.glob(f"{name}.{what}*"))]:
                found[name][what] = told
    return {
        "steps": steps, "processes": 2, "runs": found, "seconds": seconds,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
