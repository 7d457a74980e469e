"""Asked to end by a signal: the state of the last step is saved, the exit code says why, and the resumed run is the
uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llm_unlearn import interrupt
from llm_unlearn.cli import main
from llm_unlearn.config import load_config
from llm_unlearn.errors import Interrupted, run_main
from llm_unlearn.eval import scoring
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.run import train_grok
from llm_unlearn.train import loop, resume
from llm_unlearn.train.checkpoint import newest_valid, verify
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.train.lock import locked
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.run import run_unlearn

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[2]
TOY = [
    "data.preset=world12", "scenario.size=2", "model.size=nano", "loop.batch_size=16", "loop.threads=1",
    "loop.save_every=7", "loop.log_every=1", "optim.lr=3e-3", "optim.warmup=0",
]  # fmt: skip
GROK = [*TOY, "loop.max_steps=24", "watch.items=40", "watch.first=5", "watch.until=max_steps"]
FINETUNE = [*TOY, "data.kind=world", "loop.max_steps=24", "epochs=100"]
UNLEARN = [
    "loop.max_steps=24", "loop.batch_size=8", "loop.threads=1", "loop.save_every=7", "loop.log_every=1",
    "optim.lr=1e-3", "optim.warmup=0", "stop.every=5", "stop.items=20", "stop.floor=null", "stop.collapse=null",
    "stop.until=max_steps",
]  # fmt: skip
# pdu's dual and salun's mask are callbacks with a memory of their own, which must see no step twice
JOBS = {
    "grok": (train_grok, GrokConfig, [*GROK, "grokfast={alpha: 0.9, lamb: 0.5}"]),
    "finetune": (finetune, FinetuneConfig, FINETUNE),
    "npo": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=npo"]),
    "pdu": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=pdu", "method.params.warmup=0"]),
    "salun": (run_unlearn, UnlearnConfig, [*UNLEARN, "method.name=salun"]),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A function (job, folder) that runs it there, and what each job leaves when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(load_config(FinetuneConfig, None, [*FINETUNE, f"out={folder / 'start'}"]))

    def go(job: str, out: Path) -> None:
        function, config, given = JOBS[job]
        start = [f"model={folder / 'start'}"] if config is UnlearnConfig else []
        function(load_config(config, None, [*given, *start, f"out={out}"]))

    whole = {}
    for job in JOBS:
        go(job, folder / job)
        whole[job] = left_by(folder / job)
    return go, whole


def left_by(out: Path) -> dict[str, object]:
    """The weights and journals of a finished run; what took how long is left out."""
    found: dict[str, object] = {p.parent.name: p.read_bytes() for p in sorted(out.glob("*/model.safetensors"))}
    for path in out.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    cost = json.loads((out / "run.json").read_text())["cost"]
    return {**found, "tokens": {key: value for key, value in cost.items() if key.endswith("tokens")}}


def send_at(patch, place, number: int, signum=signal.SIGTERM):
    """Send this process a signal in the middle of call `number` of a function; return what was called since."""
    module, name = place
    real, calls, steps = getattr(module, name), [], []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    patch.setattr(module, name, call)
    one_step = loop._one_step

    def count(*args):
        if len(calls) >= number:
            steps.append(1)
        return one_step(*args)

    patch.setattr(loop, "_one_step", count)
    return steps


STEP, EVALUATION, SAVE = (loop, "_before_update"), (scoring, "collate"), (resume, "save_state")


@pytest.mark.parametrize(
    ("job", "place", "number", "saved_at"),
    [
        ("grok", STEP, 9, 9),
        ("grok", EVALUATION, None, 10),
        ("grok", SAVE, 2, 14),
        ("finetune", STEP, 1, 1),
        ("finetune", SAVE, 4, 24),
        ("npo", STEP, 24, 24),
        ("npo", EVALUATION, None, 10),
        ("pdu", EVALUATION, None, 10),
        ("salun", EVALUATION, None, 10),
        ("pdu", SAVE, 1, 7),
    ],
)
def test_a_signal_saves_the_step_and_the_resumed_run_is_identical(job, place, number, saved_at, jobs, tmp_path):
    signum = signal.SIGTERM if saved_at % 2 else signal.SIGUSR1
    go, whole = jobs
    if number is None:
        number = 1 + evaluations_before(job, saved_at, jobs, tmp_path / "dry")
    with pytest.MonkeyPatch.context() as patch:
        steps = send_at(patch, place, number, signum)
        with pytest.raises(Interrupted) as ended:
            go(job, tmp_path / "run")
    assert ended.value.code == 128 + signum
    assert len(steps) == 0, "no step is begun after the signal"
    folder = newest_valid(tmp_path / "run/checkpoints")
    assert folder is not None
    assert verify(folder)["step"] == saved_at
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    go(job, tmp_path / "run")
    assert left_by(tmp_path / "run") == whole[job]


def evaluations_before(job, step, jobs, out) -> int:
    """How many batches are scored before the evaluation of a step."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = scoring.collate

        def call(*args):
            calls.append(1)
            return real(*args)

        patch.setattr(scoring, "collate", call)
        watched = loop.notify

        def watch(callbacks, run):
            if run.step == step:
                raise Interrupted(signal.SIGTERM)
            watched(callbacks, run)

        patch.setattr(loop, "notify", watch)
        with pytest.raises(Interrupted):
            jobs[0](job, out)
    return len(calls)


def test_further_signals_while_saving_change_nothing(jobs, tmp_path, monkeypatch):
    go, whole = jobs
    real = resume.save_state

    def save(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*args)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(resume, "save_state", save)
    with pytest.raises(Interrupted) as ended:
        go("npo", tmp_path / "run")
    assert ended.value.code == 143
    monkeypatch.undo()
    go("npo", tmp_path / "run")
    assert left_by(tmp_path / "run") == whole["npo"]


def test_interrupted_again_and_again(jobs, tmp_path):
    """Every start ends in its first evaluation or its third step: the run comes through all the same."""
    go, whole = jobs
    first = 1 + evaluations_before("npo", 0, jobs, tmp_path / "dry")
    for place, number in ((EVALUATION, first), *[(STEP, 3)] * 40):
        with pytest.MonkeyPatch.context() as patch:
            send_at(patch, place, number)
            try:
                go("npo", tmp_path / "run")
            except Interrupted:
                continue
        break
    assert left_by(tmp_path / "run") == whole["npo"]


def test_before_the_first_step_nothing_is_saved_and_nothing_lost(jobs, tmp_path):
    go, whole = jobs
    first = 1 + evaluations_before("npo", 0, jobs, tmp_path / "dry")
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, EVALUATION, first)
        with pytest.raises(Interrupted):
            go("npo", tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()
    go("npo", tmp_path / "run")
    assert left_by(tmp_path / "run") == whole["npo"]


def asked_and_acted_on():
    with interrupt.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted(interrupt.seen())


def test_handlers_are_put_back_and_what_came_too_late_is_delivered(monkeypatch):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("mine"))
    try:
        with interrupt.noted():
            os.kill(os.getpid(), signal.SIGTERM)
            assert (came, interrupt.seen()) == ([], signal.SIGTERM)
        assert came == ["mine"]
        with pytest.raises(Interrupted):
            asked_and_acted_on()
        assert came == ["mine"]
        thread = threading.Thread(target=lambda: interrupt.noted().__enter__())  # signals are the main thread's
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == ["mine", "mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_programs_exit_with_128_and_the_signals_number(signum, code, capsys):
    def main():
        raise Interrupted(signum)

    before = signal.getsignal(signum)
    try:
        with pytest.raises(SystemExit) as end:
            run_main(main)
    finally:
        signal.signal(signum, before)
    assert end.value.code == code
    assert capsys.readouterr().err.splitlines() == [f"ended by {signum.name}; run the same command again to go on"]


def started(recipe: str, given: list[str], n: int = 1) -> subprocess.Popen:
    launch = [sys.executable]
    if n > 1:
        launch += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(n)]
        launch += ["--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    env.pop("LLM_UNLEARN_QUIET")
    return subprocess.Popen(
        [*launch, f"recipes/{recipe}.py", *given], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen, lines: int) -> None:
    while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < lines):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"recipes" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.integration
def test_a_signal_to_one_of_two_processes_ends_both_with_one_state(jobs, tmp_path):
    """And a run that was interrupted on two processes goes on on one."""
    out = tmp_path / "run"
    given = [*GROK[:-4], "loop.max_steps=4000", "loop.save_every=100000", *GROK[-3:], f"out={out}"]
    process = started("train_grok", given, 2)
    wait_for(out / "train_log.jsonl", process, 10)
    ranks = workers_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    sent = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    folder = newest_valid(out / "checkpoints")
    assert folder is not None, said
    step, seconds = verify(folder)["step"], time.monotonic() - sent
    logged = [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step + 1)), "every step that was made is saved"
    assert f"asked to end: saved at step {step}" in said
    assert "exitcode  : 143" in said
    assert said.count("ended by SIGTERM") == 2
    assert seconds < 60


STUDY = """
out: {out}
seeds: [0]
checkpoints: [early]
methods: {{npo: {{}}}}
grok:
  data: {{preset: world12}}
  scenario: {{size: 2}}
  model: {{size: nano}}
  watch: {{items: 20}}
  loop: {{batch_size: 4, log_every: 1, max_steps: 100000}}
"""


def the_program(words: list[str], said_in: Path) -> None:
    """Be the command line, in a process of its own."""
    said = os.open(said_in, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["llm-unlearn", *words]
    main()


@pytest.mark.integration
def test_a_study_passes_the_signal_on_and_ends(tmp_path):
    (tmp_path / "s.yaml").write_text(STUDY.format(out=tmp_path / "study"))
    said_in = tmp_path / "said"
    process = multiprocessing.get_context("fork").Process(  # forked, it needs not import torch once more
        target=the_program, args=(["study", "run", str(tmp_path / "s.yaml"), "--jobs", "2"], said_in)
    )
    process.start()
    runs = [tmp_path / "study/runs" / name for name in ("seed0", "seed0-gold")]
    for run in runs:
        while process.is_alive() and not (run / "train_log.jsonl").exists():
            time.sleep(0.1)
    process.terminate()
    process.join(timeout=120)
    said = said_in.read_text()
    assert process.exitcode == 143, said
    assert said.splitlines()[-1] == "ended by SIGTERM; run the same command again to go on"
    for run in runs:
        folder = newest_valid(run / "checkpoints")
        assert folder is not None, said
        with locked(run):  # nobody trains on
            assert verify(folder)["step"] >= 1
