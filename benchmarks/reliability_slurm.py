"""T16b of benchmarks/reliability.py: a study as a job array of recipes/launch/slurm/study.sbatch, without a cluster.

`sbatch`, `srun` and `scontrol` are stand-ins that do what SLURM's manual says of them: array tasks with SLURM's
variables, several at once and in any order, `afterany`, TERM to a job's step up to 60 s sooner than asked for,
`--requeue` after a preemption or a lost node. `llm-unlearn` is forked from a process that has imported torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "recipes/launch/slurm/study.sbatch"
PROGRAMS = {
    "sbatch": """#!/bin/bash
id=$(($(find "$CLUSTER/jobs" -type f | wc -l) + 1))
printf '%s\\n' "$@" > "$CLUSTER/jobs/$id"
echo "Submitted batch job $id"
""",
    "srun": """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
echo $$ > "$CLUSTER/steps/$SLURM_JOB_ID"
exec "$@"
""",
    "scontrol": """#!/bin/bash
[[ $1 == requeue ]] && touch "$CLUSTER/requeue/$2"
""",
    "llm-unlearn": """#!{python} -ES
import json, os, signal, socket, sys
end = socket.socket(socket.AF_UNIX)
end.connect("\\0{server}")
signal.signal(signal.SIGTERM, lambda *_: end.sendall(b"T"))
socket.send_fds(end, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [1, 2])
os._exit(end.recv(1)[0])
""",
}


@dataclass
class Strike:
    """What happens to a task, in its start number `start`, once `when()`: its time runs out, it is preempted, or its
    node is lost.
    """

    number: int
    what: Literal["time", "preempted", "node"]
    when: Callable[[], bool]
    start: int = 0
    done: bool = False


@dataclass
class Task:
    """One task of an array; `codes` are the exit codes of its starts."""

    job: int
    number: int
    argv: list[str]
    after: int | None
    codes: list[int] = field(default_factory=list)
    process: subprocess.Popen | None = None
    struck: str = ""

    @property
    def id(self) -> int:
        return self.job * 10_000 + self.number


class Cluster:
    """Stand-ins in a folder, and who starts, strikes and ends the tasks.

    Args:
        slots: tasks at once.
        seed: of the order in which tasks start.
        tried: folder in which cells whose work is a stand-in note their tries; None runs the real work.
    """

    def __init__(self, folder: Path, slots: int, seed: int, tried: Path | None = None) -> None:
        self.folder, self.slots, self.draw = folder, slots, random.Random(seed)
        for name in ("bin", "jobs", "steps", "requeue", "spool"):
            (folder / name).mkdir(parents=True)
        server = f"llm-unlearn-{os.getpid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
        for name, text in PROGRAMS.items():
            text = text.replace("{python}", sys.executable).replace("{server}", server)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            **os.environ, "CLUSTER": str(folder), "PATH": f"{folder}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT),
            "LLM_UNLEARN_QUIET": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.ended: list[Task] = []
        self.most, self.starts = 0, 0
        words = [sys.executable, __file__, server, str(tried or "")]
        self.server = subprocess.Popen(words, env=self.environment, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        self.lose()
        self.server.kill()
        self.server.communicate()

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does on the login node, in the repository."""
        words = (str(self.folder / "bin" / words[0]), *words[1:])
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True)

    def submit(self, *words: str) -> str:
        """Submit with sbatch; return the job's number."""
        said = self.command("sbatch", *words).stdout
        job = said.split()[-1]
        given = (self.folder / "jobs" / job).read_text().splitlines()
        n = next(i for i, word in enumerate(given) if not word.startswith("--"))
        options = dict(word.split("=", 1) for word in given[:n])
        spooled = self.folder / "spool" / job  # SLURM runs a copy, too
        shutil.copy(ROOT / given[n], spooled)
        after = options.get("--dependency", "")
        assert after.startswith(("", "afterany:"))
        number = int(after.partition(":")[2]) if after else None
        for part in options["--array"].partition("%")[0].split(","):
            first, _, last = part.partition("-")
            self.waiting += [
                Task(int(job), i, ["bash", str(spooled), *given[n + 1 :]], number)
                for i in range(int(first), int(last or first) + 1)
            ]
        self.draw.shuffle(self.waiting)
        return job

    def run(self, strikes: Sequence[Strike] = (), lost: Callable[[], bool] = lambda: False) -> bool:
        """Run until nothing waits, or until everything is `lost()`; return whether it was."""
        while self.waiting or self.running:
            busy = {task.job for task in (*self.waiting, *self.running)}
            for task in [task for task in self.waiting if task.after not in busy][: self.slots - len(self.running)]:
                self._start(task, [s for s in strikes if (s.number, s.start) == (task.number, len(task.codes))])
            for strike in strikes:
                self._strike(strike)
            for task in [task for task in self.running if task.process and task.process.poll() is not None]:
                self._end(task)
            if lost():
                self.lose()
                return True
            time.sleep(0.01)
        return False

    def lose(self) -> None:
        """Kill what runs and forget what waits, as when the whole cluster goes down."""
        for task in self.running:
            assert task.process is not None
            os.killpg(task.process.pid, signal.SIGKILL)
            task.process.wait()
        self.running, self.waiting = [], []

    def _start(self, task: Task, strikes: Sequence[Strike]) -> None:
        """Start a task. One whose time is to run out has a limit from which TERM is sent up to 60 s too soon."""
        _, grace = self._asked(task)
        limit = grace + 55 if any(s.what == "time" for s in strikes) else 14_400
        variables = {
            "SLURM_JOB_ID": task.id, "SLURM_ARRAY_JOB_ID": task.job, "SLURM_ARRAY_TASK_ID": task.number,
            "SLURM_CPUS_PER_TASK": 1, "SLURM_JOB_END_TIME": int(time.time()) + limit,
        }  # fmt: skip
        with (self.folder / "said").open("a") as said:
            task.process = subprocess.Popen(
                task.argv, cwd=ROOT, env=self.environment | {name: str(v) for name, v in variables.items()},
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        self.waiting.remove(task)
        self.running.append(task)
        self.starts += 1
        self.most = max(self.most, len(self.running))

    def _strike(self, strike: Strike) -> None:
        task = next((t for t in self.running if (t.number, len(t.codes)) == (strike.number, strike.start)), None)
        if strike.done or task is None or task.process is None or not strike.when():
            return
        strike.done, task.struck = True, strike.what
        if strike.what == "node":
            os.killpg(task.process.pid, signal.SIGKILL)
        else:  # without B: in --signal only the steps are told, not the script
            os.kill(int((self.folder / "steps" / str(task.id)).read_text()), signal.SIGTERM)

    def _end(self, task: Task) -> None:
        assert task.process is not None
        task.codes.append(task.process.returncode)
        asked = self.folder / "requeue" / f"{task.job}_{task.number}"
        again = asked.exists() or (task.struck in ("preempted", "node") and self._asked(task)[0])
        asked.unlink(missing_ok=True)
        task.struck = ""
        self.running.remove(task)
        (self.waiting if again else self.ended).append(task)

    @staticmethod
    def _asked(task: Task) -> tuple[bool, int]:
        """Return whether a task's script asks to be requeued, and the seconds of its --signal."""
        head = [line.split()[1] for line in Path(task.argv[1]).read_text().splitlines() if line.startswith("#SBATCH")]
        signals = [word.rpartition("@")[2] for word in head if word.startswith("--signal=TERM@")]
        return "--requeue" in head, int(signals[0])


def array_of_cells(bench: Any, k: int, seeds: int = 50) -> dict[str, Any]:
    """T16b: 500 cells as arrays of 16 tasks at once, every tenth try crashes, everything is lost twice, then what
    `study status --ready` names is submitted until it names nothing.
    """
    folder, draw = bench.folder / "array", random.Random(9000 + k)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tried").mkdir(parents=True)
    values = {
        "out": str(folder / "study"), "seeds": list(range(seeds)), "checkpoints": ["early", "fit", "grok", "post"],
        "methods": {"npo": {}, "rmu": {}}, "grok": {"data": {"preset": "world12"}},
    }  # fmt: skip
    study, records = folder / "s.yaml", folder / "study/cells"
    study.write_text(json.dumps(values))
    lost, submitted = 0, 0
    with Cluster(folder / "cluster", 16, k, folder / "tried") as cluster:
        plan = json.loads(cluster.command("llm-unlearn", "study", "plan", str(study), "--json").stdout)
        n, first = plan["cells"], plan["trainings"]
        job = cluster.submit(f"--array=0-{first - 1}%16", SCRIPT, str(study))
        cluster.submit(f"--array={first}-{n - 1}%16", f"--dependency=afterany:{job}", SCRIPT, str(study))
        while submitted < 30:
            submitted += 1
            aim = draw.randint(n // 4, n // 3) * (lost + 1) if lost < 2 else n + 1
            lost += cluster.run(lost=lambda aim=aim: len(list(records.glob("*.json"))) >= aim)
            ready = cluster.command("llm-unlearn", "study", "status", str(study), "--ready").stdout.strip()
            if not ready:
                break
            cluster.submit(f"--array={ready}%16", SCRIPT, str(study))
    found = [json.loads(path.read_text()) for path in records.glob("*.json")]
    right = sum(r["status"] == "ok" and r["result"] == {"value": r["id"]} for r in found)
    tries = [path.read_text() for path in (folder / "tried").iterdir()]
    again = sum("again" in text for text in tries)
    return {
        "passed": right == len(found) == n and lost == 2 and not again, "cells": len(found), "ok": right, "lost": lost,
        "submitted": submitted + 1, "tasks": cluster.starts, "at_once": cluster.most,
        "tries": sum(text.count("x") for text in tries), "crashed_tries": sum(text.count("!") for text in tries),
    }  # fmt: skip


def stand_in(tried: Path) -> None:
    """Have cells only note their tries: of twenty one raises and one is killed; done twice is noted too."""
    from llm_unlearn.errors import TooEarly
    from llm_unlearn.study import cells

    def state(cell_id: str) -> str:
        path = tried.parent / "study/cells" / f"{cell_id}.json"
        return json.loads(path.read_text())["status"] if path.exists() else "missing"

    def missing(cell: Any) -> str:
        if any(state(name) != "ok" for name in cell.after):
            raise TooEarly(f"{cell.label} is not trained yet")
        return ""

    def work(cell: Any) -> dict[str, Any]:
        path = tried / cell.id
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}x{'again' if state(cell.id) == 'ok' else ''}")
        end = int(hashlib.sha256(f"{cell.id} {before.count('x')}".encode()).hexdigest(), 16) % 20
        if end < 2:
            path.write_text(path.read_text() + "!")
        if end == 0:
            raise RuntimeError("crash")
        if end == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": cell.id}

    cells._missing_checkpoint, cells._run = missing, work


def serve(name: str) -> None:
    """Fork a process for each client that asks; a client's TERM is passed on, and its death is its process's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen(64)
    print("ready", flush=True)
    clients: dict[int, socket.socket] = {}
    while True:
        for end in select.select([listener, *clients.values()], [], [], 0.02)[0]:
            if end is listener:
                client = listener.accept()[0]
                clients[_fork(client)] = client
                continue
            word, pid = end.recv(1), next(pid for pid, its in clients.items() if its is end)
            os.kill(pid, signal.SIGTERM if word else signal.SIGKILL)
            if not word:
                time.sleep(0.001)  # it is dead a moment later, and then collected
        while clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            with suppress(OSError), clients.pop(pid) as end:
                end.sendall(bytes([code if code >= 0 else 128 - code]))


def _fork(client: socket.socket) -> int:
    data, streams, _, _ = socket.recv_fds(client, 1 << 16, 2)
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        return pid
    code = 1
    try:
        for stream, number in zip(streams, (1, 2), strict=True):
            os.dup2(stream, number)
        argv, folder = json.loads(data)
        os.chdir(folder)
        sys.argv = ["llm-unlearn", *argv]
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        from llm_unlearn.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    import torch

    import llm_unlearn.cli.study
    import llm_unlearn.study.cells
    import llm_unlearn.study.runner  # noqa: F401
    from llm_unlearn.models.tiny import build_tiny  # noqa: F401

    torch.set_num_threads(1)
    if sys.argv[2]:
        stand_in(Path(sys.argv[2]))
    serve(sys.argv[1])
