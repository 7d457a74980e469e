"""Running what is missing on one machine: a plain process pool that starts a cell once what it waits for is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from llm_unlearn.errors import Interrupted, UserError
from llm_unlearn.interrupt import noted, seen
from llm_unlearn.log import progress, setup
from llm_unlearn.study.cells import check_ready, run_cell
from llm_unlearn.study.matrix import Cell
from llm_unlearn.study.store import Store

TRAIN_WEIGHT, UNLEARN_WEIGHT = 100, 2  # relative duration, for the time left


def run_missing(study: Path, cells: Sequence[Cell], jobs: int) -> dict[str, int]:
    """Run every cell without a result on `jobs` processes of one thread each; return how many ended how.

    A cell that waits for a failed one is not started. Killing the runner loses at most the running cells' last seconds,
    since its processes end with it: call it again. Raises UserError as `check_ready`, before anything starts.

    A signal that asks to end (see `llm_unlearn.interrupt`) is passed on to the processes: their trainings save,
    anything else ends at once; then Interrupted is raised.
    """
    check_ready(cells)
    store = Store(study)
    ended: dict[str, str] = {c.id: (store.read(c) or {"status": "failed"})["status"] for c in cells if store.done(c)}
    waiting = [c for c in cells if c.id not in ended]
    running: dict[Future[str], Cell] = {}
    total = sum(_weight(c) for c in cells)
    context = multiprocessing.get_context("spawn")
    with (
        noted(),
        ProcessPoolExecutor(
            max_workers=jobs, mp_context=context, initializer=_prepare, initargs=(os.getpid(),)
        ) as pool,
        _ended_together(),
        progress(total, "study", "unit") as bar,
    ):
        while waiting or running:
            free = jobs - len(running)
            for cell in _next(waiting, ended)[:free] if free else ():
                waiting.remove(cell)
                running[pool.submit(run_cell, study, cell)] = cell
            if not running:
                break  # what is left waits for something that failed
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            if signum := seen():
                raise Interrupted(signum)
            for future in finished:
                cell = running.pop(future)
                ended[cell.id] = _result(future, cell)
            done = sum(_weight(c) for c in cells if c.id in ended)
            bar.update(done + sum(_partly(c) for c in running.values()), "; ".join(_now(c) for c in running.values()))
    statuses = list(ended.values()) + ["waiting"] * len(waiting)
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def _next(waiting: Sequence[Cell], ended: Mapping[str, str]) -> list[Cell]:
    """Return the cells that nothing is to be waited for any more, trainings last: a seed is measured before the next is
    trained, but for what idle processes begin with, so that a mistake shows early and a study that is cut off holds
    whole seeds.
    """
    ready = [c for c in waiting if all(ended.get(a) in ("ok", "censored") for a in c.after)]
    return sorted(ready, key=lambda c: c.kind == "train")


@contextmanager
def _ended_together() -> Iterator[None]:
    """When a signal ends the runner or one of its processes, end the others with it."""
    try:
        yield
    except Interrupted:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _result(future: Future[str], cell: Cell) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a process of the study was killed (out of memory?) with {cell.label} under way; run it again, with fewer "
            "--jobs if it was memory"
        ) from None


def _prepare(runner: int) -> None:
    import torch

    threading.Thread(target=_end_with, args=(runner,), daemon=True).start()

    os.environ["LLM_UNLEARN_QUIET"] = "1"  # the parent shows the progress of all
    torch.set_num_threads(1)
    setup("warning")


def _end_with(runner: int) -> None:
    """A killed parent cannot tell its workers, which would train on unseen and keep its folders locked."""
    while os.getppid() == runner:
        time.sleep(0.5)
    os._exit(1)


def _weight(cell: Cell) -> int:
    return TRAIN_WEIGHT if cell.kind == "train" else UNLEARN_WEIGHT


def _partly(cell: Cell) -> int:
    if cell.kind != "train":
        return 0
    expected = cell.spec["config"]["loop"]["max_steps"] / 2
    return int(min(0.95, _last_evaluation(cell).get("step", 0) / expected) * TRAIN_WEIGHT)


def _now(cell: Cell) -> str:
    last = _last_evaluation(cell) if cell.kind == "train" else {}
    if not last:
        return cell.label
    trained, held_out = last["train_acc"], last["held_out_acc"]
    return f"{cell.label} step {last['step']}: trained {trained:.2f}, held out {held_out:.2f}"


def _last_evaluation(cell: Cell) -> dict:
    path = Path(cell.spec["config"]["out"]) / "curve.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}  # a line being written this very moment
