"""Starting a run's processes: engines, trackers, ranks, and what all of them decide together."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import join_world, make_accelerator, train
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.train.world import is_main_rank, world_size

ROOT = Path(__file__).resolve().parents[3]


def test_ranks_are_read_from_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (is_main_rank(), world_size()) == (True, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (is_main_rank(), world_size()) == (False, 4)
    monkeypatch.setenv("RANK", "0")
    assert is_main_rank()


def test_a_single_process_has_the_whole_batch(tmp_path):
    _, place = join_world(LoopConfig(batch_size=8, micro_batch=2, threads=1), tmp_path)
    assert place == Place(0, 1, 4)


@pytest.mark.parametrize("unused", [True, False])
def test_unused_parameters_are_announced(unused):
    accelerator = make_accelerator(LoopConfig(threads=1), 1, unused_parameters=unused)
    assert accelerator.ddp_handler.find_unused_parameters is unused


def test_processes_wait_for_each_other_as_long_as_the_config_says():
    accelerator = make_accelerator(LoopConfig(threads=1, timeout_s=77), 1)
    assert accelerator.init_handler.timeout == timedelta(seconds=77)


PARENT = """
import os, subprocess, sys
code = "import sys; from llm_unlearn.train import world as w; w.end_with_launcher(); print(flush=1); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "ANYTHING_ELSE"])
def test_a_killed_launcher_takes_its_processes_along(mark):
    """And without a launcher the parent is a shell, which may go."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "ACCELERATE"))}
    read, write = os.pipe()  # the child's stdin stays open when its parent is gone
    program = PARENT.replace("stdin=subprocess.PIPE", f"stdin={read}")
    parent = subprocess.run(
        [sys.executable, "-c", program], env={**env, mark: "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        text=True, pass_fds=[read],
    )  # fmt: skip
    child, ended = int(parent.stdout), False
    for _ in range(100 if mark != "ANYTHING_ELSE" else 5):
        state = Path(f"/proc/{child}/stat")
        ended = not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
        if ended:
            break
        time.sleep(0.1)
    os.close(read)
    os.close(write)  # ends the one that lives
    assert ended == (mark != "ANYTHING_ELSE")


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_engines_that_cannot_be_saved_are_refused(engine, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: engine))
    with pytest.raises(UserError, match=f"{engine.value}.*one process, plain data parallel") as caught:
        make_accelerator(LoopConfig(threads=1), 1)
    assert "\n" not in str(caught.value)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=r"loop.tracker=wandb: is not installed; pip install 'llm-unlearn\[trackers\]'"):
        make_accelerator(LoopConfig(threads=1, tracker="wandb"), 1)


def test_a_tracker_gets_settings_and_losses(make_lm, tiny_items, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'llm-unlearn[trackers]'")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    loop = LoopConfig(max_steps=3, batch_size=8, log_every=2, threads=1, tracker="tensorboard")
    accelerator = make_accelerator(loop, 1, tmp_path)
    run = train(
        AnswerModel(make_lm()), FitTask(tiny_items, 8, 0, Place()), OptimConfig(), loop, accelerator=accelerator,
        out=tmp_path, settings={"optim.lr": 1e-3, "gold": None, "optim.betas": (0.9, 0.98)},
    )  # fmt: skip
    accelerator.end_training()
    found = events.EventAccumulator(str(tmp_path / "llm-unlearn"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    assert found.Scalars("loss")[0].value > 0
    assert list((tmp_path / "llm-unlearn").rglob("hparams.yml"))
    assert run.step == 3


def test_all_processes_stop_when_the_first_one_does(make_lm, tiny_items, monkeypatch):
    """Another rank's score missed the target by a bit; the first rank's did not."""
    loop = LoopConfig(max_steps=9, batch_size=8, threads=1)
    accelerator = make_accelerator(loop, 1)
    asked = []

    def first_rank_says(objects):
        asked.append(list(objects))
        return ["target" if len(asked) == 3 else None]  # before the first step, after it, after the second

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", first_rank_says)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, how: tensor)
    monkeypatch.setattr("llm_unlearn.train.ending._store", lambda: None)  # there is no other process to hear from
    run = train(
        AnswerModel(make_lm()), FitTask(tiny_items, 8, 0, Place()), OptimConfig(), loop, accelerator=accelerator,
        callbacks=[lambda run: setattr(run, "stop_reason", "mine" if run.step == 1 else None)],
    )  # fmt: skip
    assert (run.step, run.stop_reason) == (2, "target")
    assert asked == [[None], ["mine"], [None]]
