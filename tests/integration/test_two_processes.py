"""Two processes train what one does: same losses, one voice, one folder."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_unlearn.config import build_config, load_config
from llm_unlearn.errors import Interrupted
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.run import train_grok
from llm_unlearn.train import loop
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.run import run_unlearn

ROOT = Path(__file__).resolve().parents[2]

# rmu leaves the layers above the one it reads without a gradient, npo reaches all, with embed in one term of two;
# wrappers add gradients up over processes themselves, scrub takes turns, pdu's dual follows the loss of all processes,
# nabla_tau compares the mean of the whole batch, l1_sparse has a term without one
METHODS = {
    "rmu": ["method.name=rmu"],
    "npo_embed": ["method.name=npo", "method.retain=embed"],
    "rmu_lora": ["method.name=rmu", "lora.rank=2", "loop.gradient_checkpointing=true"],
    "npo_sam_lora": ["method.name=npo_sam", "lora.rank=2", "loop.gradient_checkpointing=true"],
    "gru": ["method.name=npo", "method.gradient=gru", "loop.micro_batch=2"],
    "orthograd": ["method.name=npo", "method.gradient=orthograd", "loop.micro_batch=2"],
    "orthopenalty": ["method.name=npo", "method.gradient=orthopenalty"],
    "scrub": ["method.name=scrub"],
    "pdu": ["method.name=pdu", "method.params.warmup=0"],
    "salun": ["method.name=salun"],
    "nabla_tau": ["method.name=nabla_tau", "method.params.target=9", "loop.micro_batch=2"],
    "l1_sparse": ["method.name=l1_sparse", "loop.micro_batch=2"],
    # its own retain term is a divergence from the start model: so near to 0 here that its last digits are rounding
    "bad_teacher": ["method.name=bad_teacher", "method.retain=nll"],
    "whp": ["method.name=whp", "method.params.reinforce_updates=3"],
}
EDITS = {
    "ssd": ["method.name=ssd", "method.params.alpha=1"],
    "task_vector": ["method.name=task_vector"],
}
UNLEARN = [
    "loop.batch_size=8", "loop.max_steps=3", "loop.log_every=1", "loop.threads=1", "stop.items=4", "stop.every=10",
    "optim.lr=1e-3", "optim.warmup=0",
]  # fmt: skip

TEXTS = ["data.preset=world12", "scenario.size=2", "model.size=nano"]
IMAGES = ["data.kind=digits", "scenario.kind=class", "scenario.size=1", "watch.thresholds=vision"]
LEVERS = {
    "sam": [*TEXTS, "sam.rho=0.5", "loop.micro_batch=4"],
    "sam_spline": [*TEXTS, "sam.rho=0.5", "spline.weight=2"],
    "apart": [*TEXTS, "orthogonality={weight: 1, after: start}", "loop.micro_batch=4"],
    "together_margin": [*TEXTS, "orthogonality={weight: -0.5, after: start, of: margin}", "loop.micro_batch=4"],
    "spline_images": [*IMAGES, "spline.weight=2", "loss=mse"],
}
BATCH_NORM = [*IMAGES, "model.net.arch=cnn", "model.net.norm=batch", "sam.rho=0.5"]
GROK = [
    "loop.batch_size=16", "loop.max_steps=3", "loop.log_every=1", "loop.threads=1", "watch.items=10",
    "watch.until=max_steps", "optim.lr=1e-3", "optim.warmup=0",
]  # fmt: skip

# A launcher's processes take seconds to start, a run here a tenth of that: so they do one run after another, each told
# in files of its own. Only the group's end is put off; what a recipe does after it is another test's.
PROGRAM = """
import importlib.util, json, os, signal, sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

from llm_unlearn.errors import Interrupted
from llm_unlearn.train import loop

{asked}
PartialState.destroy_process_group = lambda self, group=None: None
folder = Path(sys.argv[1])
for name, recipe, given in json.loads((folder / "jobs.json").read_text()):
    spec = importlib.util.spec_from_file_location(recipe, f"recipes/{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [recipe, *given, f"out={folder / name}"]
    told, warned = (folder / f"{name}.{os.environ['RANK']}.{stream}" for stream in ("out", "err"))
    ends = asked_to_end_in_step_two("1") if name == "broken_off" else nullcontext()
    with ends, told.open("w") as out, warned.open("w") as err, redirect_stdout(out), redirect_stderr(err):
        module.main()
    (folder / f"{name}.{os.environ['RANK']}.left").write_text(str((folder / name / "run.json").exists()))
torch.distributed.destroy_process_group()
"""


@contextmanager
def asked_to_end_in_step_two(rank: str) -> Iterator[None]:
    """Run what is inside until its state after two steps is saved: a process sends itself SIGTERM in the second."""
    steps, real = [], loop._before_update

    def update(*args: Any) -> None:
        steps.append(1)
        if len(steps) == 2 and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    loop._before_update = update
    try:
        yield
    except Interrupted:
        return
    finally:
        loop._before_update = real
    raise AssertionError("nobody was asked to end")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A barely trained model of the smallest world."""
    out = tmp_path_factory.mktemp("start") / "run"
    loop = {"batch_size": 32, "max_steps": 5, "threads": 1}
    values = {"out": str(out), "data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2}, "loop": loop}
    finetune(build_config(FinetuneConfig, {**values, "model": {"size": "nano"}}))
    return out


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """Folder with a run of every case on two processes, and what each process said: NAME, NAME.0.out, NAME.1.err ..."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [(name, "run_unlearn", [f"model={start}", *UNLEARN, *more]) for name, more in (METHODS | EDITS).items()]
    jobs += [(name, "train_grok", [*GROK, *more]) for name, more in LEVERS.items()]
    jobs += [("batch_norm", "train_grok", [*GROK, *BATCH_NORM])]
    with asked_to_end_in_step_two("0"):
        train_grok(load_config(GrokConfig, None, [*GROK, *TEXTS, f"out={folder / 'begun_by_one'}"]))
    jobs += [(name, "train_grok", [*GROK, *TEXTS]) for name in ("broken_off", "begun_by_one")]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "program.py").write_text(PROGRAM.replace("{asked}", inspect.getsource(asked_to_end_in_step_two)))
    done = launched(str(folder / "program.py"), str(folder))
    assert done.returncode == 0, (done.stderr + "".join(p.read_text() for p in folder.glob("*.err")))[-3000:]
    return folder


def launched(program: str, *given: str) -> subprocess.CompletedProcess[str]:
    """The program, on two processes."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"]
    launch += ["2", "--main_process_port", "0", program]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, *given], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def steps_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def check_same_losses(a: Path, b: Path) -> None:
    one, two = steps_of(a), steps_of(b)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert len(one) == 3
    for x, y in zip(one, two, strict=True):
        assert y == pytest.approx(x, rel=1e-5), (one, two)


def check_one_voice(two: Path, name: str, warnings: int) -> None:
    """The first process alone prints the result; `warnings` is how often all of them say which step was kept."""
    said = {stream: [(two / f"{name}.{rank}.{stream}").read_text() for rank in (0, 1)] for stream in ("out", "err")}
    assert [len([x for x in text.splitlines() if x.startswith("{")]) for text in said["out"]] == [1, 0], said["out"]
    assert "".join(said["err"]).count("kept step") == warnings


@pytest.mark.integration
def test_no_process_leaves_before_the_main_one_has_written(two):
    left = {file.name: file.read_text() for file in two.glob("*.left")}
    assert len(left) == 2 * len(json.loads((two / "jobs.json").read_text()))
    assert {name.split(".")[0] for name, written in left.items() if written == "False"} == {"broken_off"}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_one_process(name, start, two, tmp_path):
    given = [f"model={start}", *UNLEARN, *METHODS[name], f"out={tmp_path / 'one'}"]
    run_unlearn(load_config(UnlearnConfig, None, given))
    check_same_losses(tmp_path / "one", two / name)
    check_one_voice(two, name, 1)


@pytest.mark.integration
@pytest.mark.parametrize("name", LEVERS)
def test_levers_of_grokking_pull_as_in_one_process(name, two, tmp_path):
    train_grok(load_config(GrokConfig, None, [*GROK, *LEVERS[name], f"out={tmp_path / 'one'}"]))
    check_same_losses(tmp_path / "one", two / name)
    check_one_voice(two, name, 0)
    a, b = (load_file(out / "last" / "model.safetensors") for out in (tmp_path / "one", two / name))
    for tensor, values in a.items():
        torch.testing.assert_close(b[tensor], values, rtol=1e-3, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["broken_off", "begun_by_one"])
def test_a_run_goes_on_with_another_number_of_processes(name, two, tmp_path):
    """Broken off by two after two steps of three and ended here by one, and the other way round."""
    out = two / name
    if name == "broken_off":
        assert [line["step"] for line in steps_of(out)] == [1, 2]
        assert not (out / "run.json").exists()
        train_grok(load_config(GrokConfig, None, [*GROK, *TEXTS, f"out={out}"]))
    assert json.loads((out / "run.json").read_text())["cost"]["updates"] == 3
    train_grok(load_config(GrokConfig, None, [*GROK, *TEXTS, f"out={tmp_path / 'one'}"]))
    check_same_losses(tmp_path / "one", out)
    a, b = (load_file(run / "last" / "model.safetensors") for run in (tmp_path / "one", out))
    for tensor, values in a.items():
        torch.testing.assert_close(b[tensor], values, rtol=1e-3, atol=1e-5)


@pytest.mark.integration
def test_batch_norm_has_the_first_processes_statistics_under_sam(two):
    """Statistics are those of a process' own images, so two processes do not give what one does."""
    values = load_file(two / "batch_norm" / "last" / "model.safetensors")
    counts = {name: int(value) for name, value in values.items() if name.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {3}, "the second look of a step is not counted"


@pytest.mark.integration
@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_one_process(name, start, two, tmp_path):
    given = [f"model={start}", *UNLEARN, *EDITS[name], f"out={tmp_path / 'one'}"]
    one = run_unlearn(load_config(UnlearnConfig, None, given))
    assert json.loads((two / name / "run.json").read_text())["changed"] == pytest.approx(one["changed"], rel=1e-3)
    assert one["changed"] > 0
    a, b = (load_file(out / "final" / "model.safetensors") for out in (tmp_path / "one", two / name))
    for tensor, values in a.items():
        close = torch.isclose(b[tensor], values, rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.999, tensor  # a weight at the brink of ssd's selection may fall on either side
    lines = [(out / "trajectory.jsonl").read_text().splitlines() for out in (tmp_path / "one", two / name)]
    assert [len(part) for part in lines] == [2, 2]


@pytest.mark.integration
def test_a_recipe_started_by_the_launcher_ends_with_one_voice(start, tmp_path):
    """Nothing between the launcher and the recipe, its parting from the group included."""
    done = launched("recipes/run_unlearn.py", f"model={start}", *UNLEARN, f"out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    assert done.stderr.count("kept step") == 1
    assert len(steps_of(tmp_path / "two")) == 3
