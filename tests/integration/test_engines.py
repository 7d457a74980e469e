"""Two processes under DeepSpeed ZeRO train what one does, save what one saves, and resume each other's runs.

The bounds are those of benchmarks/engines.py, which makes the runs; here they are few and short. 1e-5 of a loss is the
project's bar. The first launch on a machine builds DeepSpeed's extension for CPUs, a minute.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm_unlearn.cli import app
from llm_unlearn.train.checkpoint import newest_valid
from llm_unlearn.train.statefile import load_state

ROOT = Path(__file__).resolve().parents[2]
CASES = ("finetune", "grok", "npo_lora", "rmu")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its extension for CPUs with g++"),
]


def measured(folder: Path, engine: str, cases: tuple[str, ...]) -> dict:
    """What the benchmark finds; its runs lie in `folder`."""
    command = [sys.executable, "benchmarks/engines.py", "--steps", "5", "--engines", engine]
    command += ["--cases", ",".join(cases), "--runs", str(folder), "--out", str(folder.with_suffix(".json"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["runs"]


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3") / "runs"
    return folder, measured(folder, "zero3", CASES)


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero2") / "runs"
    return folder, measured(folder, "zero2", ("finetune",))


@pytest.mark.parametrize(
    "name", [*(f"zero3/{case}" for case in CASES), "zero3_resumed", "one_to_zero3", "zero3_to_one"]
)
def test_zero3_is_one_process(zero3, name):
    found = zero3[1][name]
    assert found["steps"] == 5
    assert found["loss_relative"] <= 1e-5
    assert found["weight_absolute"] <= 1e-4


@pytest.mark.parametrize("name", ["zero2/finetune", "zero2_resumed"])
def test_zero2_is_one_process(zero2, name):
    found = zero2[1][name]
    assert found["steps"] == 5
    assert found["loss_relative"] <= 1e-5
    assert found["weight_absolute"] <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_moved(zero3, case):
    """Equal to one process is not enough: both could have stood still."""
    folder = zero3[0] / "zero3" / case
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert len({line["loss"] for line in log}) == 5
    if (start := zero3[0] / "start" / "final" / "model.safetensors").exists() and case in ("npo_lora", "rmu"):
        before, after = load_file(start), load_file(folder / "final" / "model.safetensors")
        assert any(not before[name].equal(after[name]) for name in before)


def test_a_state_is_the_same_from_either_engine(zero3):
    one, other = (
        load_state(newest_valid(zero3[0] / engine / "finetune" / "checkpoints") / "state.safetensors")
        for engine in ("one", "zero3")
    )
    assert one["model"].keys() == other["model"].keys()
    assert one["optimizer"]["param_groups"][0].keys() == other["optimizer"]["param_groups"][0].keys()
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for number, moments in one["optimizer"]["state"].items():
        theirs = other["optimizer"]["state"][number]
        assert moments.keys() == theirs.keys()
        assert moments["step"] == theirs["step"] == 5
        assert moments["exp_avg"].shape == theirs["exp_avg"].shape
        assert (moments["exp_avg"] - theirs["exp_avg"]).abs().max() <= 1e-5 * moments["exp_avg"].abs().max()


def test_what_zero3_saves_is_evaluated_as_one_process_model(zero3, tmp_path):
    """The command line reads the folder, and every number of the benchmark's format is that of one process."""
    found = []
    for engine in ("one", "zero3"):
        done = CliRunner().invoke(app, ["eval", str(zero3[0] / engine / "finetune"), "--out", str(tmp_path / engine)])
        assert done.exit_code == 0, done.output
        found.append(dict(numbers(json.loads((tmp_path / engine / "TOFU_EVAL.json").read_text()))))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 1000
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a JSON tree, by their paths."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            yield from numbers(value, f"{name}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{name}/{key}", value
