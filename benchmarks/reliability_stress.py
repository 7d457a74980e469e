"""Trials of benchmarks/reliability.py that need no struck run: many cases, many writers, many cells, many steps."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from reliability_trials import ROOT, Bench

WRITERS, KILLED = 16, 5


def gather_cases(bench: Bench, k: int) -> dict[str, Any]:
    """T8: one combination of rows 1..17, processes 1..4 and batches 1..5: mean score against one process in float64.

    Every process' share is scored by the package's scorer; what gloo would carry between them is handed over in memory.
    """
    import torch

    from llm_unlearn.data.qa import world_corpus
    from llm_unlearn.data.source import make_tokenizer
    from llm_unlearn.data.tokenise import encode_rows
    from llm_unlearn.data.world import preset
    from llm_unlearn.eval.metrics.base import make_record
    from llm_unlearn.eval.scoring import score_answers
    from llm_unlearn.eval.shards import Shard
    from llm_unlearn.models.causal import AnswerModel
    from llm_unlearn.models.tiny import SIZES, build_tiny

    n, size, batch = k % 17 + 1, k // 17 % 4 + 1, k // 68 % 5 + 1
    if not hasattr(bench, "scored"):
        corpus = world_corpus(preset("world12"), "world12")
        tokenizer = make_tokenizer(corpus)
        torch.manual_seed(0)
        model = AnswerModel(build_tiny(SIZES["nano"], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id))
        items = encode_rows(tokenizer, corpus.split("train"))[:: max(1, len(corpus.split("train")) // 17)][:17]
        truth = [float(score_answers(model, [item])[0].logp.mean()) for item in items]
        bench.scored = model, items, truth  # type: ignore[attr-defined]
    model, items, truth = bench.scored  # type: ignore[attr-defined]
    rows, parts = list(range(n)), []
    for rank in range(size):
        mine = list(Shard(rank, size).mine(rows))
        longest = max((items[i].n_inputs for i in mine), default=1)
        scored = score_answers(model, [items[i] for i in mine], max_tokens=batch * longest)
        parts.append([make_record(j, logp=s.logp) for j, s in enumerate(scored)])
    shard = Shard(0, size)
    object.__setattr__(shard, "gather", lambda _mine: parts)
    records = shard.gather_records(parts[0], n)
    found = [float(r.scored.logp.mean()) for r in records]
    error = max(abs(a - b) for a, b in zip(found, truth, strict=False))
    return {"passed": len(records) == n and error <= 1e-5, "rows": n, "processes": size, "batch": batch, "error": error}


def _append(folder: Path, writer: int, records: int, pipe: int) -> None:
    from llm_unlearn.study.matrix import Cell
    from llm_unlearn.study.store import Store

    store = Store(folder)
    for i in range(records):
        name = f"w{writer:02d}-{i:05d}"
        store.write(Cell(name, "train", name, {"out": "x"}), "ok", {"value": name})
        os.write(pipe, f"{name}\n".encode())  # acknowledged


def sixteen_writers(bench: Bench, k: int, records: int = 100) -> dict[str, Any]:
    """T13: 16 processes write one store at once, 5 of them are killed; nothing acknowledged may be lost or torn."""
    folder, draw = bench.folder / "store", random.Random(6000 + k)
    shutil.rmtree(folder, ignore_errors=True)
    ends = []
    for writer in range(WRITERS):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _append(folder, writer, records, write)
            finally:
                os._exit(0)
        os.close(write)
        ends.append((pid, read))
    victims = draw.sample(ends, KILLED)
    readers_failed = 0
    for pid, _ in victims:
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)
        readers_failed += _torn(folder)
    told = []
    for pid, read in ends:
        with os.fdopen(read) as pipe:
            told += pipe.read().split()
        os.waitpid(pid, 0)
    there = {p.stem for p in (folder / "cells").glob("*.json")}
    lost = [name for name in told if name not in there]
    torn = _torn(folder)
    return {
        "passed": not lost and not torn and not readers_failed and len(told) == len(set(told)),
        "acknowledged": len(told), "stored": len(there), "lost": len(lost), "torn": torn + readers_failed,
        "records_each": records,
    }  # fmt: skip


def _torn(folder: Path) -> int:
    bad = 0
    for path in (folder / "cells").glob("*.json"):
        try:
            bad += json.loads(path.read_text())["id"] != path.stem
        except ValueError:
            bad += 1
    return bad


MATRIX = """
import hashlib, json, sys
from pathlib import Path

from llm_unlearn.config import build_config
from llm_unlearn.study import cells as cells_module, runner
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan

TRIED = Path({tried!r})


def fake(cell):
    count = TRIED / cell.id
    n = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (n + 1))
    if int(hashlib.sha256(f"{{cell.id}} {{n}}".encode()).hexdigest(), 16) % 10 == 0:
        raise RuntimeError("crash")
    return {{"value": cell.id}}


def run(study, cell):
    cells_module._missing_checkpoint, cells_module._run = (lambda cell: ""), fake
    return cells_module.run_cell(study, cell)


if __name__ == "__main__":
    values = {{"out": {out!r}, "seeds": list(range(50)), "checkpoints": ["early", "fit", "grok", "post"],
              "methods": {{"npo": {{}}, "rmu": {{}}}}, "grok": {{"data": {{"preset": "world12"}}}}}}
    cells = plan(build_config(StudyConfig, values))
    runner.run_cell, runner.check_ready = run, lambda cells: None
    print(json.dumps(runner.run_missing(Path({out!r}), cells, 2)), len(cells), flush=True)
"""


def five_hundred_cells(bench: Bench, k: int) -> dict[str, Any]:
    """T16: 500 cells of which every tenth try crashes, the runner killed twice, then run again until none is missing.

    The cells' work is a stand-in that returns at once; plan, runner, processes and store are the package's.
    """
    folder, draw = bench.folder / "matrix", random.Random(7000 + k)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tried").mkdir(parents=True)
    program = folder / "program.py"
    program.write_text(MATRIX.format(tried=str(folder / "tried"), out=str(folder / "study")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_UNLEARN_QUIET": "1", "OMP_NUM_THREADS": "1"}
    kills, starts, said = 0, 0, ""
    while starts < 30:
        starts += 1
        process = subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True)
        if kills < 2:
            aim = draw.randint(50, 200) * (kills + 1)
            while process.poll() is None and len(list((folder / "study/cells").glob("*.json"))) < aim:
                time.sleep(0.05)
            kills += process.poll() is None
            process.kill()
        said = process.communicate()[0]
        if process.returncode == 0 and "failed" not in said and "waiting" not in said:
            break
    records = [json.loads(p.read_text()) for p in (folder / "study/cells").glob("*.json")]
    right = sum(r["status"] == "ok" and r["result"] == {"value": r["id"]} for r in records)
    tries = [len(p.read_text()) for p in (folder / "tried").iterdir()]
    return {
        "passed": right == len(records) == 500 and kills == 2, "cells": len(records), "ok": right,
        "runner_killed": kills, "starts": starts, "crashed_tries": sum(tries) - len(tries), "tries": sum(tries),
    }  # fmt: skip


def many_steps(bench: Bench, k: int, steps: int = 100_000) -> dict[str, Any]:
    """T15: tiny steps with 200 states saved on the way: memory, open files, time of a step, size of the logs."""
    out = bench.folder / "long"
    shutil.rmtree(out, ignore_errors=True)
    report = bench.folder / "long.json"

    def work() -> None:
        from llm_unlearn.data.tokenise import Encoded
        from llm_unlearn.models.causal import AnswerModel
        from llm_unlearn.models.tiny import TinyConfig, build_tiny
        from llm_unlearn.train.config import LoopConfig, OptimConfig
        from llm_unlearn.train.loop import make_accelerator, train
        from llm_unlearn.train.tasks import FitTask, Place

        items = [Encoded(np.array([1, 3 + i, 4, 2], dtype=np.int64), 2, True) for i in range(8)]
        model = AnswerModel(build_tiny(TinyConfig(hidden=8, layers=1, heads=1, ff=8), 16, 2, 0))
        config = LoopConfig(max_steps=steps, batch_size=2, save_every=max(1, steps // 200), log_every=50, threads=1)
        look = _Look(steps)
        train(
            model, FitTask(items, 2, 0, Place()), OptimConfig(lr=1e-3), config,
            accelerator=make_accelerator(config, 1), out=out, callbacks=[look],
        )  # fmt: skip
        sizes = {p.name: p.stat().st_size for p in out.glob("*.jsonl")}
        report.write_text(json.dumps({"points": look.points, "log_bytes": sizes}))

    code = bench.run(work, bench.folder / "said")
    if code:
        return {"passed": False, "code": code, "said": (bench.folder / "said").read_text()[-500:]}
    told = json.loads(report.read_text())
    first, last = told["points"][1], told["points"][-1]  # after a tenth: caches are warm then
    growth = last["rss"] / first["rss"] - 1
    cpu = [b["cpu"] - a["cpu"] for a, b in zip(told["points"][1:], told["points"][2:], strict=False)]
    drift = float(np.mean(cpu[-3:]) / np.mean(cpu[:3]) - 1) if len(cpu) >= 6 else math.nan
    return {
        "passed": growth < 0.05 and first["fds"] == last["fds"] and drift < 0.10, "steps": steps,
        "rss_growth": round(growth, 4), "fds": [first["fds"], last["fds"]], "step_cpu_drift": round(drift, 4), **told,
    }  # fmt: skip


class _Look:
    """Notes memory, open files and CPU seconds every tenth of a run."""

    def __init__(self, steps: int) -> None:
        self.every, self.points = max(1, steps // 10), []

    def __call__(self, run: Any) -> None:
        if run.step % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.points.append(
                {
                    "step": run.step,
                    "rss": pages * os.sysconf("SC_PAGE_SIZE"),
                    "fds": len(list(Path("/proc/self/fd").iterdir())),
                    "cpu": round(time.process_time(), 2),
                }  # fmt: skip
            )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is remembered."""


def two_node_fault(bench: Bench, k: int) -> dict[str, Any]:
    """T11: a process, a launcher or the link of a node is lost, or a process is asked to end (see two_nodes.py)."""
    import two_nodes

    if reason := two_nodes.possible():
        raise SystemExit(f"error: {reason}")
    folder = bench.folder / "nodes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    result = two_nodes.trial(two_nodes.FAULTS[k % 4], 20.0, folder)
    return {"passed": result["within_bar"] and result["rank_named"], **result}
