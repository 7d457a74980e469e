"""Running cells: what is run, in which order, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_unlearn.cli import app
from llm_unlearn.cli import evaluate as cli_evaluate
from llm_unlearn.config import build_config, dump_config
from llm_unlearn.errors import UserError
from llm_unlearn.study import cells as cells_module
from llm_unlearn.study import runner
from llm_unlearn.study.cells import run_cell
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.runner import run_missing
from llm_unlearn.study.store import Store
from llm_unlearn.train.lock import locked
from llm_unlearn.unlearn.facts import study_facts, write_study_facts


@pytest.fixture
def config(tmp_path):
    values = {
        "out": str(tmp_path / "study"),
        "seeds": [0, 1],
        "checkpoints": ["early"],
        "methods": {"npo": {}},
        "grok": {"data": {"preset": "world12"}},
    }
    return build_config(StudyConfig, values)


@pytest.fixture
def study(config):
    return Path(config.out)


@pytest.fixture
def cells(config):
    return {c.label: c for c in plan(config)}


class Trace:
    """Stands in for `run_cell` in a pool of threads: notes what ran when, and ends cells as it is told."""

    def __init__(self, study: Path, ends: dict[str, str]) -> None:
        self.study, self.ends, self.lock = study, ends, threading.Lock()
        self.now, self.most = 0, 0
        self.events: list[str] = []

    def __call__(self, study, cell):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.events.append(f"+{cell.label}")
        time.sleep(0.01)
        status = self.ends.get(cell.label, "ok")
        Store(study).write(cell, status)
        with self.lock:
            self.now -= 1
            self.events.append(f"-{cell.label}")
        return status

    def started(self) -> set[str]:
        return {event[1:] for event in self.events if event[0] == "+"}


@pytest.fixture
def traced(study, monkeypatch):
    def start(**ends: str) -> Trace:
        trace = Trace(study, {label.replace("_", " "): status for label, status in ends.items()})
        monkeypatch.setattr(runner, "run_cell", trace)
        monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda max_workers, **_: ThreadPoolExecutor(max_workers))
        return trace

    return start


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_cell_starts_after_what_it_waits_for(jobs, study, cells, traced):
    trace = traced()
    assert run_missing(study, list(cells.values()), jobs) == {"ok": 6}
    assert trace.most <= jobs
    for seed in ("seed0", "seed1"):
        start = trace.events.index(f"+{seed} early npo")
        assert start > max(trace.events.index(f"-{seed}"), trace.events.index(f"-{seed}-gold"))


def test_a_seed_is_measured_before_the_next_is_trained(study, cells, traced):
    trace = traced()
    run_missing(study, list(cells.values()), 1)
    started = [event[1:] for event in trace.events if event.startswith("+")]
    assert started == ["seed0", "seed0-gold", "seed0 early npo", "seed1", "seed1-gold", "seed1 early npo"]


def test_what_waits_for_a_failure_is_not_started_and_runs_the_next_time(study, cells, traced):
    trace = traced(**{"seed0-gold": "failed"})
    assert run_missing(study, list(cells.values()), 2) == {"ok": 4, "failed": 1, "waiting": 1}
    assert trace.started() == set(cells) - {"seed0 early npo"}
    again = traced()
    assert run_missing(study, list(cells.values()), 2) == {"ok": 6}
    assert again.started() == {"seed0-gold", "seed0 early npo"}, "finished cells are not run again"


def test_a_censored_cell_is_a_result(study, cells, traced):
    traced(**{"seed0_early_npo": "censored"})
    assert run_missing(study, list(cells.values()), 2) == {"ok": 5, "censored": 1}
    again = traced()
    assert run_missing(study, list(cells.values()), 2) == {"ok": 5, "censored": 1}
    assert not again.started()


def test_a_killed_process_is_one_line(study, cells, traced, monkeypatch):
    traced()

    class Broken(ThreadPoolExecutor):
        def submit(self, *_args, **_kwargs):
            future: Future[str] = Future()
            future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda max_workers, **_: Broken(max_workers))
    with pytest.raises(UserError, match="killed .*seed0 .*run it again"):
        run_missing(study, list(cells.values()), 1)


def test_failures_in_real_processes_come_back_as_records_and_an_exit_code(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    values = {"out": "s", "seeds": [0], "checkpoints": ["early"], "methods": {"npo": {}}}
    grok = {"data": {"preset": "world12"}, "model": {"shape": {"hidden": 30}}}  # what only building the model can tell
    dump_config(build_config(StudyConfig, {**values, "grok": grok}), Path("s.yaml"))
    assert app(["study", "run", "s.yaml", "--jobs", "1", "--json"], standalone_mode=False) == 1
    assert json.loads(capfd.readouterr().out) == {"failed": 2, "waiting": 1}
    app(["study", "status", "s.yaml", "--json"], standalone_mode=False)
    status = json.loads(capfd.readouterr().out)
    assert {k: status[k] for k in ("ok", "censored", "failed", "missing")} == {
        "ok": 0, "censored": 0, "failed": 2, "missing": 1,
    }  # fmt: skip
    assert all("model.hidden=30 is no multiple" in text for text in status["errors"].values())


def test_a_finished_cell_is_not_run_again_and_a_failed_one_is(study, cells, monkeypatch):
    calls = []

    def train(config):
        calls.append(config.out)
        if len(calls) == 1:
            raise RuntimeError("the disk is on fire")
        return {"step": 7}

    monkeypatch.setattr(cells_module, "train_grok", train)
    cell, store = cells["seed0"], Store(study)
    assert run_cell(study, cell) == "failed"
    assert "RuntimeError: the disk is on fire" in store.read(cell)["error"]
    assert run_cell(study, cell) == "ok"
    assert store.read(cell)["result"] == {"step": 7}
    assert store.read(cell)["error"] == ""
    assert run_cell(study, cell) == "ok"
    assert calls == [cell.spec["config"]["out"]] * 2


def train(study: Path, run: str, phase: str, *kinds: str) -> None:
    for kind in kinds:
        (study / "runs" / run / kind).mkdir(parents=True)
        (study / "runs" / run / kind / "config.json").write_text("{}")
    (study / "runs" / run).mkdir(parents=True, exist_ok=True)
    (study / "runs" / run / "run.json").write_text(json.dumps({"report": {"phase": phase}}))


def test_a_checkpoint_never_reached_censors_and_an_untrained_run_is_waited_for(study, cells, caplog):
    cell, store = cells["seed0 early npo"], Store(study)
    assert run_cell(study, cell) == "waiting"
    assert "seed0 is not trained yet; run the study's training cells first" in caplog.text
    assert store.read(cell) is None, "it did not fail"
    train(study, "seed0", "grok", "early")
    train(study, "seed0-gold", "grok")
    assert run_cell(study, cell) == "censored", "gold has no such checkpoint"
    assert store.read(cell)["error"].endswith("seed0-gold never reached 'early'")
    assert run_cell(study, cell) == "censored"


def test_a_cell_that_another_process_is_at_is_left_to_it(study, cells, monkeypatch, caplog):
    """An array submitted twice: the second must not write "failed" over what the first is about to write."""

    def train(config):
        with locked(Path(config.out)):
            raise AssertionError("two processes in one folder")

    monkeypatch.setattr(cells_module, "train_grok", train)
    cell = cells["seed0"]
    with locked(Path(cell.spec["config"]["out"])):
        assert run_cell(study, cell) == "waiting"
    assert f"is being written by process {os.getpid()}" in caplog.text
    assert Store(study).read(cell) is None


@pytest.mark.parametrize("phase", ["comprehension", "semi-grok", "undecided"])
@pytest.mark.parametrize("which", ["seed0", "seed0-gold"])
def test_unlearning_from_grok_and_post_takes_a_run_that_grokked(which, phase, study, config, monkeypatch):
    """A run that generalised without delay has a `grok` folder too; it is no grokked model."""
    monkeypatch.setattr(cells_module, "_unlearn_and_evaluate", lambda cell: {"label": cell.label})
    for run in ("seed0", "seed0-gold"):
        train(study, run, phase if run == which else "grok-weak", "early", "fit", "grok", "post")
    kinds = ("early", "fit", "grok", "post")
    cells = {c.label: c for c in plan(config.model_copy(update={"checkpoints": kinds}))}
    ended = {kind: run_cell(study, cells[f"seed0 {kind} npo"]) for kind in kinds}
    assert ended == {"early": "ok", "fit": "ok", "grok": "censored", "post": "censored"}
    record = Store(study).read(cells["seed0 post npo"])
    assert f"{which} did not grok ({phase})" in record["error"]


ORPHAN = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from llm_unlearn.study.runner import _prepare

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    sys.stdin.read()
"""


def test_a_killed_runner_leaves_no_process_training_on(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    env = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "orphan.py")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


def test_what_would_fail_in_every_cell_is_refused_before_any_starts(study, cells, traced):
    trace = traced()
    (study / "runs/seed0").mkdir(parents=True)
    (study / "runs/seed0/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="seed0: is not empty and holds no run of ours"):
        run_missing(study, list(cells.values()), 1)
    assert not trace.started()
    assert not (study / "cells").exists()


@pytest.mark.parametrize(
    ("grok", "said"),
    [
        ({"data": {"preset": "world12"}, "scenario": {"size": 7}}, "scenario.size=7 authors of 12"),
        ({"data": {"kind": "custom", "path": "gone.jsonl"}}, "gone.jsonl: no such file"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_before_any_starts(grok, said, tmp_path, traced):
    values = {"out": str(tmp_path / "s"), "seeds": [0], "checkpoints": ["early"], "methods": {"npo": {}}, "grok": grok}
    with pytest.raises(UserError, match=said):
        run_missing(tmp_path / "s", plan(build_config(StudyConfig, values)), 1)
    assert not (tmp_path / "s").exists()


@pytest.fixture
def arms(tmp_path):
    control = {"take": "grok", "changes": {"optim": {"weight_decay": 2.0}}}
    values = {
        "out": str(tmp_path / "study"), "seeds": [0], "checkpoints": ["fit_scaled", "easy"], "methods": {"npo": {}},
        "controls": {"easy": control}, "grok": {"data": {"preset": "world12"}},
    }  # fmt: skip
    return {c.label: c for c in plan(build_config(StudyConfig, values))}


def test_a_control_need_not_have_grokked_and_a_scaled_fit_must(study, arms, monkeypatch):
    monkeypatch.setattr(cells_module, "_unlearn_and_evaluate", lambda cell: {"label": cell.label})
    for run in ("../controls/easy/seed0", "../controls/easy/seed0-gold", "seed0", "seed0-gold"):
        train(study, run, "comprehension", "fit", "grok", "fit_scaled")
    store = Store(study)
    assert run_cell(study, arms["seed0 easy npo"]) == "ok"
    assert run_cell(study, arms["seed0 fit_scaled npo"]) == "censored"
    assert "did not grok (comprehension): its 'fit_scaled'" in store.read(arms["seed0 fit_scaled npo"])["error"]


def test_a_control_that_never_got_to_what_it_takes_censors(study, arms):
    train(study, "../controls/easy/seed0", "comprehension", "fit", "grok")
    train(study, "../controls/easy/seed0-gold", "confusion", "early")
    cell = arms["seed0 easy npo"]
    assert run_cell(study, cell) == "censored"
    assert Store(study).read(cell)["error"].endswith("controls/easy/seed0-gold never reached 'grok'")


def test_a_run_evaluated_again_keeps_the_names_its_study_gave_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "config.json").write_text("{}")
    made = {"method": "npo", "steps": 1, "kept_step": 1, "stop": "max_steps", "target": None, "cost": {}}
    origin = {"config": {"seed": 0}, "start_kind": "grok", "request": "r", "start": "runs/gone@grok"}
    (run / "run.json").write_text(json.dumps({**made, "origin": origin}))
    monkeypatch.setattr("llm_unlearn.models.pretrained.read_origin", lambda _: {})
    told = {"kind": "unlearned", "start": "runs/gone@grok"}
    plain = cli_evaluate._facts(str(run), told)
    assert (plain["method"], plain["checkpoint"]) == ("npo", "grok")
    write_study_facts(run, {"method": "mine", "checkpoint": "easy", "control": True})
    again = cli_evaluate._facts(str(run), told)
    assert again == {**plain, "method": "mine", "checkpoint": "easy", "control": True}


def test_the_results_of_a_cell_bear_its_names(study, arms, monkeypatch):
    cell = arms["seed0 easy npo"]
    made = {"method": "npo+sam", "steps": 1, "kept_step": 1, "stop": "max_steps", "target": None, "cost": {}}
    origin = {"config": {"seed": 0}, "start_kind": "grok", "request": "r", "start": cell.spec["config"]["model"]}
    start = SimpleNamespace(
        origin={"config": {"seed": 0}, "step": 50}, corpus=None, request=None, data=SimpleNamespace(format="auto")
    )
    curve = study / "controls/easy/seed0/curve.jsonl"
    curve.parent.mkdir(parents=True)
    curve.write_text('{"step": 50, "train_acc": 1.0, "held_out_acc": 0.97}\n')
    monkeypatch.setattr(cells_module, "_missing_checkpoint", lambda cell: "")
    monkeypatch.setattr(cells_module, "run_unlearn", lambda config: {**made, "origin": origin})
    monkeypatch.setattr(cells_module, "open_start", lambda *_: start)
    monkeypatch.setattr(cells_module, "evaluate", lambda *_, run, **__: {"metrics": {}, "cost": {}, "told": run})
    assert run_cell(study, cell) == "ok"
    facts = Store(study).read(cell)["result"]["run"]
    assert (facts["method"], facts["checkpoint"], facts["control"], facts["match"]) == ("npo", "easy", True, None)
    assert (facts["start_step"], facts["start_train_acc"], facts["start_held_out_acc"]) == (50, 1.0, 0.97)
    assert study_facts(Path(cell.spec["config"]["out"])) == dict(cell.facts), "for whoever evaluates it again"
