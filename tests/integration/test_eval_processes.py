"""One model scored by several processes: the records of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.config import build_config
from llm_unlearn.eval.records import read_records
from llm_unlearn.train.finetune import FinetuneConfig, finetune

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model of the smallest world and its gold, fitted far enough for answers to differ in length and rightness."""
    folder = tmp_path_factory.mktemp("runs")
    for name, exclude in (("model", "none"), ("gold", "forget")):
        loop = {"batch_size": 32, "max_steps": 60, "threads": 1}
        data = {"kind": "world", "preset": "world12"}
        values = {"out": str(folder / name), "data": data, "scenario": {"size": 2}, "loop": loop, "exclude": exclude}
        finetune(build_config(FinetuneConfig, {**values, "model": {"size": "nano"}, "optim": {"lr": 1e-2}}))
    return folder


def evaluate(runs: Path, out: Path, processes: int) -> dict:
    command = [sys.executable, "eval/run_eval.py"]
    if processes > 1:
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--main_process_port", "0"]
        command = [sys.executable, *launch, "--num_processes", str(processes), "eval/run_eval.py"]
    told = [str(runs / "model"), "--reference", str(runs / "gold"), "--out", str(out), "--json"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *told], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.integration
def test_the_number_of_processes_changes_nothing(runs, tmp_path):
    told = {}
    for n in (1, 2, 3):
        told[n] = evaluate(runs, tmp_path / f"{n}", n)
        for folder in runs.rglob("eval-*"):  # gold is scored anew by as many
            for file in folder.iterdir():
                file.unlink()
    one = read_records(tmp_path / "1/records.parquet")
    assert len({len(r.generation or "") for r in one["forget"]}) > 2
    for n in (2, 3):
        several = read_records(tmp_path / f"{n}/records.parquet")
        assert several.keys() == one.keys()
        for split, records in one.items():
            assert [r.question for r in several[split]] == [r.question for r in records]
            for a, b in zip(records, several[split], strict=True):
                assert (a.index, a.generation, a.correct) == (b.index, b.generation, b.correct)
                np.testing.assert_allclose(b.scored.logp, a.scored.logp, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(np.exp(b.scored.logp), np.exp(a.scored.logp), rtol=0, atol=1e-6)
        for name, line in told[1]["metrics"].items():
            assert told[n]["metrics"][name]["n"] == line["n"]
            assert told[n]["metrics"][name]["value"] == pytest.approx(line["value"], rel=1e-5, abs=1e-6), name
        assert told[n]["cost"]["generated_tokens"] == pytest.approx(told[1]["cost"]["generated_tokens"], rel=0.5)


PROGRAM = """
from llm_unlearn.errors import UserError, run_main
from llm_unlearn.eval.shards import join_shard

def main():
    shard = join_shard()
    shard.gather(shard.rank)
    if {fails}:
        raise UserError("no such thing")

run_main(main)
"""


@pytest.mark.integration
@pytest.mark.parametrize("fails", [False, True])
def test_programs_part_before_they_exit(fails, tmp_path):
    """Without leaving the process group most such exits abort (signal 6): a flake, or a 2 that scripts never see."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(fails=fails))
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--main_process_port", "0", "--num_processes", "3", str(program)]
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=120)
    assert "Signal 6" not in done.stderr, done.stderr[-3000:]
    assert "terminate called" not in done.stderr
    assert (done.returncode == 0) is not fails
