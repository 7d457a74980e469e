"""Trials of benchmarks/reliability.py on numbers: not finite, of another model, or not the same twice."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability_trials import JOBS, ROOT, Bench, kill_me, left_by, struck

KINDS = ("item", "gradient", "loss", "update")


def not_finite(bench: Bench, k: int) -> dict[str, Any]:
    """T6: inf in an item's embedding, a gradient or the loss, or an update that makes the weights overflow.

    The run has to end in that step, say which and with what items, and keep the newest state and all it has written
    finite. A run of unlearning that has evaluated a step ends with that one as its result.
    """
    from llm_unlearn.train.checkpoint import newest_valid, verify

    draw, job = random.Random(8000 + k), list(JOBS)[k % len(JOBS)]
    kind = KINDS[k % 4]
    if kind == "item" and job not in ("grok", "finetune"):  # a weight spoilt from outside is no result of a step
        kind = "gradient"
    step = 2 if kind == "update" else draw.randint(2, 24)
    out, said = bench.folder / "trial", bench.folder / "said"
    shutil.rmtree(out, ignore_errors=True)

    def work() -> None:
        spoil(kind, step, draw)
        bench.go(job, out, ["optim.lr=1e30", "optim.clip=0"] if kind == "update" else [])

    code = bench.run(work, said)
    text = said.read_text()
    lines = [line for line in text.splitlines() if f"step {step}: the loss is" in line]
    newest = newest_valid(out / "checkpoints") if (out / "checkpoints").exists() else None
    saved = 0 if newest is None else verify(newest)["step"]
    result = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    ended = code == 2 and not result or code == 0 and result.get("stop") == "diverged"
    named = len(lines) == 1 and "(counted from 0)" in lines[0] or "the weights are at fault" in text
    kept = saved in (step - 1, (step - 1) // 7 * 7)
    return {
        "passed": bool(ended and named and kept and finite(out) and "Traceback" not in text),
        "job": job, "kind": kind, "step": step, "code": code, "saved_step": saved, "said": lines,
    }  # fmt: skip


def spoil(kind: str, step: int, draw: random.Random) -> None:
    """Have a number of a step cease to be finite, in a process that is forked for it."""
    import torch

    from llm_unlearn.train import loop

    value, one_step, update = draw.choice([float("nan"), float("inf")]), loop._one_step, loop._before_update

    def poisoned_step(run: Any, task: Any, *rest: Any) -> None:
        if kind == "item" and run.step == step - 1:
            (numbers, items) = task.drawn(run.step)["train"]
            with torch.no_grad():
                run.lm.get_input_embeddings().weight[int(items[int(numbers[0])].ids[0])] = value
        one_step(run, task, *rest)

    def poisoned_update(run: Any, task: Any, total: Any, optim: Any, edits: Any, names: Any) -> None:
        if run.step == step - 1 and kind == "gradient":
            gradient = draw.choice([p.grad for _, p in names if p.grad is not None])
            gradient.view(-1)[draw.randrange(gradient.numel())] = value
        if run.step == step - 1 and kind == "loss":
            total.fill_(value)
        update(run, task, total, optim, edits, names)

    loop._one_step, loop._before_update = poisoned_step, poisoned_update


def finite(out: Path) -> bool:
    """Return whether all weights and journals of a run's folder are finite, its states too."""
    import torch
    from safetensors.torch import load_file

    tensors = [t for path in out.rglob("*.safetensors") for t in load_file(path).values() if t.is_floating_point()]
    logs = "".join(path.read_text() for path in out.rglob("*.jsonl"))
    return all(bool(torch.isfinite(t).all()) for t in tensors) and "NaN" not in logs and "Infinity" not in logs


def stale(bench: Bench, k: int) -> dict[str, Any]:
    """T9: an evaluation killed and made again; then another model, or weights edited in place, at the same place."""
    draw, folder = random.Random(9000 + k), bench.folder / "stale"
    kind = ("killed", "another model", "edited in place")[k % 3]
    for name in ("llm_unlearn.cli", "llm_unlearn.eval.evaluate", "rouge_score.rouge_scorer"):
        importlib.import_module(name)  # here, not in every process that is forked
    if not (folder / "whole").exists():
        folder.mkdir(exist_ok=True)
        bench.run(lambda: None)  # makes the start model
        evaluate(bench, bench.folder / "start/final", folder / "whole")
    whole = told(folder / "whole")
    model, out = folder / "run/model", folder / "run/out"
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(bench.folder / "start/final", model)
    if kind == "killed":
        place, calls = draw.choice([("scoring.collate", 2), ("score.write_records", 3), ("score.write_atomic", 2)])
        module, name = place.split(".")
        number = draw.randint(1, calls)

        def strike() -> None:
            struck(importlib.import_module(f"llm_unlearn.eval.{module}"), name, number, kill_me)

        died = evaluate(bench, model, out, strike)
        code = evaluate(bench, model, out)
        return {
            "passed": died == -signal.SIGKILL and code == 0 and told(out) == whole,
            "kind": kind, "in": place, "call": number,
        }  # fmt: skip
    evaluate(bench, model, out)
    fresh = whole
    while fresh == whole:  # the embedding of a token that no question has changes no number
        edit(model, 1 if kind == "edited in place" else 200, draw)
        shutil.rmtree(folder / "run/fresh", ignore_errors=True)
        again = evaluate(bench, model, folder / "run/fresh")
        fresh = told(folder / "run/fresh")
    code = evaluate(bench, model, out)
    said, found = (bench.folder / "said").read_text(), told(out)
    refused = code == 2 and found == whole and "error: " in said
    return {
        "passed": again == 0 and (refused or (code == 0 and found == fresh)),
        "kind": kind, "refused": refused, "code": code,
    }  # fmt: skip


def edit(model: Path, n: int, draw: random.Random) -> None:
    """Change n weights of a model by 10 to 100 %, leaving size and times of its file as they were."""
    path = model / "model.safetensors"
    times, data = path.stat(), bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(n):
        at = begin + 4 * draw.randrange((len(data) - begin) // 4)
        (value,) = struct.unpack("<f", data[at : at + 4])
        data[at : at + 4] = struct.pack("<f", value * draw.uniform(1.1, 2))
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def evaluate(bench: Bench, model: Path, out: Path, first: Callable[[], None] = lambda: None) -> int:
    """Run `llm-unlearn eval` as a process of its own."""

    def work() -> None:
        from llm_unlearn.cli import app

        first()
        app(["eval", str(model), "--suite", "quick", "--out", str(out)], standalone_mode=False)

    return bench.run(work, bench.folder / "said")


def told(out: Path) -> dict[str, Any]:
    """Return what an evaluation says: metrics and answers, not what it cost and who the model was."""
    result = json.loads((out / "results.json").read_text())
    return {key: result[key] for key in ("metrics", "answers", "collapse")}


AGAIN = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from reliability_trials import JOBS, Bench
bench = Bench(Path({folder!r}))
for job in JOBS:
    bench.go(job, Path({out!r}) / job)
"""


def same_twice(bench: Bench, k: int) -> dict[str, Any]:
    """T10: every job of T1 in a fresh process with hash seed 0, 1 or drawn, against the same job in another process;
    every fourth trial is another seed, which has to differ.
    """
    out, said = bench.folder / "again", bench.folder / "said"
    shutil.rmtree(out, ignore_errors=True)
    whole = {job: bench.whole(job) for job in JOBS}
    if k % 4 == 3:
        code = bench.run(lambda: bench.go("finetune", out, [f"seed={k + 1}"]), said)
        return {"passed": code == 0 and left_by(out)["final"] != whole["finetune"]["final"], "seed": k + 1}
    seed = ("0", "1", "random")[k % 4]
    program = AGAIN.format(benchmarks=str(ROOT / "benchmarks"), folder=str(bench.folder), out=str(out))
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "LLM_UNLEARN_QUIET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    same = {job: done.returncode == 0 and left_by(out / job) == whole[job] for job in JOBS}
    return {"passed": all(same.values()), "hash_seed": seed, "same": same, "said": done.stderr[-500:]}
