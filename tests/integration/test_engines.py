"""Two processes under DeepSpeed ZeRO or FSDP2 train what one does, save what one saves, and resume each other's runs.

The bounds are those of benchmarks/engines.py, which makes the runs; here they are few and short, and ZeRO-1 is left to
it. 1e-5 of a loss is the project's bar. The first launch on a machine builds DeepSpeed's extension for CPUs, a minute.
"""

from __future__ import annotations

import json
import shutil
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
CASES = ["finetune", "grok", "npo_lora", "rmu"]
STEPS = 7
GPP = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its extension for CPUs with g++")
pytestmark = pytest.mark.integration


def under(*names: str) -> list[Any]:
    """What is looked at, left out where DeepSpeed cannot be had."""
    return [pytest.param(name, marks=() if "fsdp2" in name else GPP) for name in names]


@pytest.fixture(scope="module")
def ran(load_benchmark, tmp_path_factory):
    """The folder of the benchmark's runs, and what it found: one launch for DeepSpeed's engines and one for FSDP2."""
    folder = tmp_path_factory.mktemp("engines")
    module = load_benchmark("engines")
    engines = {"fsdp2": [*CASES, "npo"]} | ({"zero2": ["finetune"], "zero3": CASES} if shutil.which("g++") else {})
    return folder, module.measure(folder, engines, STEPS)["runs"]


@pytest.mark.parametrize(
    "name",
    under(
        *(f"{engine}/{case}" for engine in ("zero3", "fsdp2") for case in CASES),
        *("zero2/finetune", "fsdp2/npo", "one_to_zero3", "zero3_to_one", "one_to_fsdp2", "fsdp2_to_one"),
    ),
)
def test_it_is_one_process(ran, name):
    found = ran[1][name]
    assert found["steps"] == STEPS
    assert found["loss_relative"] <= 1e-5
    assert found["weight_absolute"] <= 1e-4


@pytest.mark.parametrize("engine", under("zero2", "zero3", "fsdp2"))
@pytest.mark.parametrize("how", ["killed", "asked"])
def test_a_run_gone_on_with_under_the_same_engine_has_the_same_bits(ran, engine, how):
    assert ran[1][f"{engine}_{how}"]["bit_identical"]


@pytest.mark.parametrize("name", under("zero2_asked", "zero3_asked", "zero3_to_one", "fsdp2_asked", "fsdp2_to_one"))
def test_a_signal_to_one_process_ends_both_with_the_last_step_saved(ran, name):
    """The signal comes after step 4; states are due after steps 3, 6 and 7. The last run of a launch ends its processes
    with this code, or the launch would have been refused.
    """
    assert ran[1][name]["ended"] == [{"code": 143, "saved_step": 5}] * 2


def test_fsdp2_divides(ran):
    """Plain data parallel would be equal to one process, too: here each holds about half of the weights."""
    held = ran[1]["fsdp2/finetune"]["held"]
    assert len(held) == 2
    assert sum(held) == pytest.approx(1)
    assert max(held) < 0.6


@pytest.mark.parametrize("engine", under("zero3", "fsdp2"))
@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_moved(ran, engine, case):
    """Equal to one process is not enough: both could have stood still."""
    folder = ran[0] / engine / case
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert len({line["loss"] for line in log}) == STEPS
    if (start := ran[0] / "start" / "final" / "model.safetensors").exists() and case in ("npo_lora", "rmu"):
        before, after = load_file(start), load_file(folder / "final" / "model.safetensors")
        assert any(not before[name].equal(after[name]) for name in before)
    if case == "npo_lora":
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(bool(weight.any()) for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("engine", under("zero3", "fsdp2"))
def test_a_state_is_the_same_from_either_engine(ran, engine):
    one, other = (
        load_state(newest_valid(ran[0] / name / "finetune" / "checkpoints") / "state.safetensors")
        for name in ("one", engine)
    )
    assert one["model"].keys() == other["model"].keys()
    assert one["optimizer"]["param_groups"][0].keys() == other["optimizer"]["param_groups"][0].keys()
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for number, moments in one["optimizer"]["state"].items():
        theirs = other["optimizer"]["state"][number]
        assert moments.keys() == theirs.keys()
        assert moments["step"] == theirs["step"] == STEPS
        assert moments["exp_avg"].shape == theirs["exp_avg"].shape
        assert (moments["exp_avg"] - theirs["exp_avg"]).abs().max() <= 1e-5 * moments["exp_avg"].abs().max()


@pytest.mark.parametrize("engine", under("zero3", "fsdp2"))
def test_what_is_saved_is_evaluated_as_one_process_model(ran, engine, tmp_path):
    """The command line reads the folder, and every number of the benchmark's format is that of one process."""
    found = []
    for name in ("one", engine):
        done = CliRunner().invoke(app, ["eval", str(ran[0] / name / "finetune"), "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        found.append(dict(numbers(json.loads((tmp_path / name / "TOFU_EVAL.json").read_text()))))
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
