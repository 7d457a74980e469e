"""Trials of benchmarks/reliability.py: each strikes one toy run once and says what was left.

A trial returns a dict with `passed`, and numbers to look at. Runs are processes forked from one that has imported torch
(one thread): what is struck is the same program, without seconds of imports for every trial.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import

import torch  # noqa: E402

from llm_unlearn.config import load_config  # noqa: E402
from llm_unlearn.data.qa import world_corpus  # noqa: E402
from llm_unlearn.data.source import make_tokenizer  # noqa: E402
from llm_unlearn.data.world import preset  # noqa: E402
from llm_unlearn.errors import UserError, run_main  # noqa: E402
from llm_unlearn.eval import scoring  # noqa: E402
from llm_unlearn.grok.config import GrokConfig  # noqa: E402
from llm_unlearn.grok.run import train_grok  # noqa: E402
from llm_unlearn.log import setup  # noqa: E402
from llm_unlearn.models.pretrained import load_model  # noqa: E402
from llm_unlearn.models.tiny import SIZES, build_tiny  # noqa: E402
from llm_unlearn.train import checkpoint, loop, resume  # noqa: E402
from llm_unlearn.train.checkpoint import clean_staging, commit, newest_valid, rotate, step_dir, verify  # noqa: E402
from llm_unlearn.train.config import LoopConfig  # noqa: E402
from llm_unlearn.train.finetune import FinetuneConfig, finetune  # noqa: E402
from llm_unlearn.train.snapshot import save_model  # noqa: E402
from llm_unlearn.unlearn.config import UnlearnConfig  # noqa: E402
from llm_unlearn.unlearn.run import run_unlearn  # noqa: E402

TOY = [
    "data.preset=world12", "scenario.size=2", "model.size=nano", "loop.batch_size=16", "loop.threads=1",
    "loop.save_every=7", "loop.log_every=1", "optim.lr=3e-3", "optim.warmup=0", "loop.max_steps=24",
]  # fmt: skip
GROK = [*TOY, "watch.items=40", "watch.first=5", "watch.until=max_steps"]
FIT = [*TOY, "data.kind=world", "epochs=100"]
UNLEARN = [
    "loop.max_steps=24", "loop.batch_size=8", "loop.threads=1", "loop.save_every=7", "loop.log_every=1",
    "optim.lr=1e-3", "optim.warmup=0", "stop.every=5", "stop.items=20", "stop.floor=null", "stop.collapse=null",
    "stop.until=max_steps",
]  # fmt: skip
JOBS: dict[str, tuple[Callable, type, list[str]]] = {
    "grok": (train_grok, GrokConfig, [*GROK, "grokfast={alpha: 0.9, lamb: 0.5}"]),
    "finetune": (finetune, FinetuneConfig, [*FIT, "loop.micro_batch=4"]),
    "ga": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=ga"]),
    "npo": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=npo", "loop.micro_batch=2"]),
    "idk_dpo": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=idk_dpo"]),
    "rmu": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=rmu"]),
    "npo_lora": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=npo", "lora.rank=2"]),
}
SYSCALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir")
TOO_LONG_S = 300


class Bench:
    """Toy runs in a scratch folder: the start model, what every job leaves when nothing strikes it, and new trials."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        torch.set_num_threads(1)
        import peft  # noqa: F401

        # what is imported when it is first used is imported once here, and not in every forked run
        loop.make_accelerator(LoopConfig(threads=1), 1)
        tokenizer = make_tokenizer(world_corpus(preset("world12"), "world12"))
        lm = build_tiny(SIZES["nano"], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        save_model(folder / "warm", lm, tokenizer, {})
        load_model(str(folder / "warm"))

    def go(self, job: str, out: Path, more: Sequence[str] = ()) -> None:
        """Run a job to its end, in this process."""
        function, config, given = JOBS[job]
        start = [f"model={self.folder / 'start'}"] if config is UnlearnConfig else []
        function(load_config(config, None, [*given, *start, f"out={out}", *more]))

    def begin(self, work: Callable[[], None], said: Path | None = None) -> int:
        """Fork; the child runs `work` as a program does, and ends with its exit code. Return its process id."""
        if not (self.folder / "start/run.json").exists():
            shutil.rmtree(self.folder / "start", ignore_errors=True)
            self._wait(
                self._fork(lambda: finetune(load_config(FinetuneConfig, None, [*FIT, f"out={self.folder}/start"])))
            )
        return self._fork(work, said)

    def _fork(self, work: Callable[[], Any], said: Path | None = None) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            stream = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            setup("warning")
            run_main(lambda: work() and None)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _wait(self, pid: int) -> int:
        """Return the exit code of a forked run, minus the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def run(self, work: Callable[[], None], said: Path | None = None) -> int:
        return self._wait(self.begin(work, said))

    def whole(self, job: str) -> dict[str, Any]:
        """Return what an uninterrupted run of a job leaves."""
        if job not in self.known:
            out = self.folder / f"whole-{job}"
            if not (out / "run.json").exists():
                shutil.rmtree(out, ignore_errors=True)
                assert self.run(lambda: self.go(job, out), self.folder / "said") == 0, (
                    self.folder / "said"
                ).read_text()
            self.known[job] = left_by(out)
        return self.known[job]

    def finishes(self, job: str, out: Path) -> tuple[bool, int | None]:
        """Start a struck run again; return whether it ends as the uninterrupted one, and the step it went on from."""
        newest = newest_valid(out / "checkpoints") if (out / "checkpoints").exists() else None
        step = None if newest is None else verify(newest)["step"]
        code = self.run(lambda: self.go(job, out), self.folder / "said")
        return code == 0 and left_by(out) == self.whole(job), step


def left_by(out: Path) -> dict[str, Any]:
    """Weights and journals of a finished run; how long things took is left out."""
    found: dict[str, Any] = {p.parent.name: p.read_bytes() for p in sorted(out.glob("*/model.safetensors"))}
    for path in out.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


def struck(module: Any, name: str, number: int, strike: Callable[[], None]) -> None:
    """Have call `number` of a function strike before it does its work; for a process that is forked for one trial."""
    real, calls = getattr(module, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            strike()
        return real(*args, **kwargs)

    setattr(module, name, call)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def random_kill(bench: Bench, k: int) -> dict[str, Any]:
    """T1: kill -9 in a random step (forward, backward or before the update), once or three times, and resume; each kill
    in one of the steps that are left after the last.
    """
    draw, job = random.Random(k), list(JOBS)[k % len(JOBS)]
    out, times = bench.folder / "trial", 3 if k % 5 == 4 else 1
    shutil.rmtree(out, ignore_errors=True)
    whole, killed = bench.whole(job), 0
    for _ in range(times):
        newest = newest_valid(out / "checkpoints") if (out / "checkpoints").exists() else None
        number = draw.randint(1, 24 - (0 if newest is None else verify(newest)["step"]))

        def work(number: int = number) -> None:
            struck(loop, draw.choice(["_one_step", "_before_update"]), number, kill_me)
            bench.go(job, out)

        killed += bench.run(work) == -signal.SIGKILL
    same, step = bench.finishes(job, out)
    passed = same and whole == bench.whole(job) and killed == times
    return {"passed": passed, "job": job, "kills": killed, "from_step": step}


def save_kill(bench: Bench, k: int) -> dict[str, Any]:
    """T2: kill -9 inside a save: in the middle of a file, or before or after any call that changes the folder."""
    draw, job = random.Random(1000 + k), ("grok", "npo", "npo_lora")[k % 3]
    out = bench.folder / "trial"
    shutil.rmtree(out, ignore_errors=True)
    save, where = draw.randint(1, 4), "a file" if k % 4 == 0 else "a call"
    last = 24 if save == 4 else 7 * save

    def work() -> None:
        real, saves = resume.save_resume, []

        def striking(*args: Any) -> None:
            saves.append(1)
            if len(saves) == save:
                torn_write(draw) if where == "a file" else die_in_call(draw)
            real(*args)

        loop.save_resume = striking
        bench.go(job, out)

    code = bench.run(work)
    same, step = bench.finishes(job, out)
    lost = last - (step or 0)
    return {
        "passed": same and lost <= 7 and (code == -signal.SIGKILL or where == "a call"),
        "job": job, "in": where, "killed": code == -signal.SIGKILL, "steps_lost": lost,
    }  # fmt: skip


def torn_write(draw: random.Random) -> None:
    """Leave the state file cut off at a random byte, and die."""
    real = resume.save_state

    def save(path: Path, tree: Any) -> None:
        real(path, tree)
        os.truncate(path, draw.randrange(path.stat().st_size))
        kill_me()

    resume.save_state = save


def die_in_call(draw: random.Random) -> None:
    """Die before or after a random one of the calls that a save makes (they are 8 to 25)."""
    stage, calls = draw.randrange(40), []

    def wrap(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            number = len(calls)
            if stage == 2 * (number - 1):
                kill_me()
            result = real(*args, **kwargs)
            if stage == 2 * number - 1:
                kill_me()
            return result

        return call

    for name in SYSCALLS:
        setattr(os, name, wrap(getattr(os, name)))


def schedule(bench: Bench, k: int) -> dict[str, Any]:
    """T3: a random schedule of saves and rotations with a crash in between; a folder of an older run is in the way."""
    draw, root = random.Random(2000 + k), bench.folder / "schedule"
    shutil.rmtree(root, ignore_errors=True)
    stale = draw.random() < 0.5
    if stale:
        commit(step_dir(root, 900), lambda folder: (folder / "x").write_text("stale"), {"step": 900})
        (step_dir(root, 900) / "x").write_text("damaged")
    valid, wrong, crashes = 0, 0, 0
    for step in range(1, draw.randint(4, 8)):
        keep = {step, *draw.sample(range(1, step + 1), min(step, draw.randint(0, 2)))}
        before = {p.name for p in root.iterdir() if p.name.startswith("step-")} if root.exists() else set()

        def work(step: int = step, keep: set[int] = keep) -> None:
            commit(step_dir(root, step), lambda folder: (folder / "x").write_text(str(step)), {"step": step})
            rotate(root, keep)

        pid = os.fork()
        if pid == 0:
            try:
                if draw.random() < 0.6:
                    die_in_call(random.Random(k * 100 + step))
                work()
            finally:
                os._exit(0)
        crashes += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
        after = {p.name for p in root.iterdir()} if root.exists() else set()
        valid += newest_valid(root) is not None or step == 1 or not _good(before)
        kept = {step_dir(root, n).name for n in keep} & before
        wrong += len(kept - after)
        clean_staging(root)
    return {"passed": valid == step and wrong == 0, "saves": step, "crashes": crashes, "wrong_deletions": wrong}


def _good(names: set[str]) -> bool:
    return bool(names - {"step-00000900"})


SIGNALLED = ("start-up", "step", "evaluation", "save", "twice")


def signalled(bench: Bench, k: int) -> dict[str, Any]:
    """T4: SIGTERM or SIGUSR1 in start-up, a step, an evaluation, a save, or once more while saving."""
    draw, moment, job = random.Random(3000 + k), SIGNALLED[k % 5], ("grok", "npo", "npo_lora")[k // 5 % 3]
    signum = signal.SIGUSR1 if k % 2 else signal.SIGTERM
    out, sent = bench.folder / "trial", bench.folder / "sent"
    shutil.rmtree(out, ignore_errors=True)
    sent.unlink(missing_ok=True)
    bench.whole(job)

    def strike() -> None:
        sent.write_text(str(time.time()))
        os.kill(os.getpid(), signum)

    def work() -> None:
        if moment == "start-up":
            strike()
        elif moment == "evaluation":
            real = loop.notify

            def notify(callbacks: Any, run: Any) -> None:
                if run.step == 10:
                    struck(scoring, "collate", draw.randint(1, 2), strike)
                real(callbacks, run)

            loop.notify = notify
        elif moment == "step":
            struck(loop, "_before_update", draw.randint(2, 24), strike)
        else:
            struck(resume, "save_state", draw.randint(1, 4), strike)
        if moment == "twice":
            struck(checkpoint, "_seal", draw.randint(1, 4), strike)
        bench.go(job, out)

    code = bench.run(work)
    ended = time.time()
    folder = newest_valid(out / "checkpoints") if (out / "checkpoints").exists() else None
    steps = _steps_of(out)
    saved = None if folder is None else (folder / "manifest.json").stat().st_mtime - float(sent.read_text())
    kept = folder is not None and steps and verify(folder)["step"] == steps[-1] or moment == "start-up"
    same, _ = bench.finishes(job, out)
    # by its default action a process that has nothing to save yet ends at once: a shell sees the same number
    right = code == 128 + signum or (moment == "start-up" and code == -signum)
    took = ended - float(sent.read_text())
    soon = took <= 5 + step_seconds(bench, job)
    return {
        "passed": bool(right and kept and same and soon), "moment": moment, "job": job, "code": code, "same": same,
        "saved_after_s": None if saved is None else round(saved, 2), "ended_after_s": round(took, 2),
    }  # fmt: skip


def _steps_of(out: Path) -> list[int]:
    path = out / "train_log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def step_seconds(bench: Bench, job: str) -> float:
    """Seconds of a step of the uninterrupted run."""
    cost = json.loads((bench.folder / f"whole-{job}/run.json").read_text())["cost"]
    return cost["train_seconds"] / cost["updates"]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of its own (needs root)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk_full(bench: Bench, k: int) -> dict[str, Any]:
    """T5: the disk is full at a random point of the run; then there is room again.

    A file system cannot become read-only under a run: the open lock file keeps it from that.
    """
    draw, job, said = random.Random(4000 + k), ("grok", "npo")[k % 2], bench.folder / "said"
    bench.whole(job)
    with small_disk(bench.folder / "disk", 8 << 20) as disk:
        out = disk / "run"
        number = draw.randint(2, 24)

        def strike() -> None:
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(max(0, free - draw.choice([0, 4096, draw.randrange(600_000)]))))

        def work() -> None:
            struck(loop, "_before_update", number, strike)
            bench.go(job, out)

        code = bench.run(work, said)
        lines = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
        traceback = "Traceback" in said.read_text()
        (disk / "filler").unlink(missing_ok=True)
        tidy = not list(out.rglob(".staging-*"))
        same, step = bench.finishes(job, out)
    named = code == 0 or (len(lines) == 1 and str(out) in lines[0] and not traceback)
    said_lines = [line.replace(str(bench.folder), "") for line in lines]
    return {
        "passed": same and named and code in (0, 2) and tidy, "code": code,
        "job": job, "from_step": step, "said": said_lines, "partial_removed": tidy,
    }  # fmt: skip


def corrupted(bench: Bench, k: int) -> dict[str, Any]:
    """T17: any file of the newest state cut off or with one bit flipped, at a random place."""
    draw, job = random.Random(5000 + k), ("grok", "npo")[k % 2]
    out, kept = bench.folder / "trial", bench.folder / f"cut-{job}"
    bench.whole(job)
    if not kept.exists():

        def work() -> None:
            struck(loop, "_before_update", 20, kill_me)
            bench.go(job, kept)

        bench.run(work)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(kept, out)
    newest = newest_valid(out / "checkpoints")
    assert newest is not None
    path = draw.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
    whole, at = path.read_bytes(), 0
    at = draw.randrange(len(whole))
    cut = k % 2 == 0
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    try:
        verify(newest)
        found = False
    except UserError as error:
        found = path.name in str(error)
    same, step = bench.finishes(job, out)
    return {"passed": found and same and step == 7, "file": path.name, "at": at, "cut": cut, "from_step": step}
