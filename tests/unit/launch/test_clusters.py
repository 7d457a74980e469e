"""SLURM scripts run with stand-ins for SLURM's commands; TrainJob and SkyPilot files have the fields their documents
ask for, and start recipes that exist.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "recipes" / "launch"
SBATCH = sorted((FOLDER / "slurm").glob("*.sbatch"))
RECORD = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" END >> "$RECORD"
"""
SRUN = (
    RECORD
    + """
while [[ $1 == -* ]]; do shift; done
for node in ${NODES:-0}; do SLURM_NODEID=$node "$@" || exit $?; done
exit "${SRUN_CODE:-0}"
"""
)
SCONTROL = RECORD + 'if [[ $1 == show ]]; then printf "n1\\nn2\\n"; fi\n'


@pytest.fixture
def submit(tmp_path):
    """A function that runs a batch script as SLURM's first node would, and returns its exit code, its stderr and the
    stand-ins' command lines.
    """
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": RECORD, "llm-unlearn": RECORD}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *argv: str, **env: str) -> tuple[int, str, list[list[str]]]:
        record = tmp_path / "record"
        record.write_text("")
        given = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(record), "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4", **env,
        }  # fmt: skip
        words = ["bash", str(FOLDER / "slurm" / script), *argv]
        done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=30)
        calls = [part.strip("\n").split("\n") for part in record.read_text().split("END\n") if part.strip()]
        return done.returncode, done.stderr, calls

    return run


def options(call: list[str]) -> dict[str, str]:
    return {word: call[i + 1] for i, word in enumerate(call[:-1]) if word.startswith("--")}


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_it_is_bash_and_says_when_to_stop(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    head = [line.split(maxsplit=1)[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in head
    grace = next(line for line in head if line.startswith("--signal=TERM@")).rpartition("@")[2]
    assert f"\ngrace={grace} " in path.read_text(), "both places name the same seconds"
    text = path.read_text()
    assert text.index("set -euo pipefail") > text.rindex("#SBATCH"), "sbatch stops reading at the first command"


def test_every_node_starts_its_own_launcher(submit):
    argv = ["recipes/finetune.py", "--config", "a b.yaml", "out=runs/x"]
    code, _, calls = submit("nodes.sbatch", *argv, NODES="0 1")
    assert code == 0
    assert [call[0] for call in calls] == ["scontrol", "srun", "accelerate", "accelerate"]
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(calls[1])
    for rank, call in enumerate(calls[2:]):
        found = options(call)
        assert found["--machine_rank"] == str(rank)
        assert (found["--num_machines"], found["--num_processes"], found["--main_process_ip"]) == ("2", "8", "n1")
        assert found["--main_process_port"] == "32345"
        assert (ROOT / found["--config_file"]).is_file()
        assert call[-len(argv) :] == argv, "the recipe's arguments arrive whole"


def test_a_study_runs_the_arrays_cell(submit):
    code, _, calls = submit("study.sbatch", "study.yaml", "seeds=[0]", SLURM_ARRAY_TASK_ID="7", SLURM_ARRAY_JOB_ID="9")
    assert code == 0
    assert [call[0] for call in calls] == ["srun", "llm-unlearn"]
    assert calls[1][1:] == ["study", "run", "study.yaml", "seeds=[0]", "--cell", "7"]


@pytest.mark.parametrize(
    ("script", "env", "job"),
    [
        ("nodes.sbatch", {}, "12345"),
        ("study.sbatch", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "9"}, "9_7"),
    ],
)
def test_only_a_job_that_ran_out_of_time_asks_to_run_again(submit, script, env, job):
    grace = int(next(line for line in (FOLDER / "slurm" / script).read_text().splitlines() if "TERM@" in line)[-3:])
    # "the signal may be sent up to 60 seconds earlier than specified": the manual on --signal
    ends = {"soon": grace - 60, "sooner": grace + 55, "late": 9000}
    ends = {**{name: str(int(time.time()) + s) for name, s in ends.items()}, "unknown": "0"}
    asked = {}
    for when, end in ends.items():
        code, _, calls = submit(script, "x", **env, SRUN_CODE="143", SLURM_JOB_END_TIME=end)
        assert code == 143
        asked[when] = ["scontrol", "requeue", job] in calls
    assert asked == {"soon": True, "sooner": True, "late": False, "unknown": False}
    _, _, calls = submit(script, "x", **env, SLURM_JOB_END_TIME=ends["soon"])
    assert ["scontrol", "requeue", job] not in calls, "a finished job is finished"


@pytest.mark.parametrize("script", ["nodes.sbatch", "study.sbatch"])
def test_wrong_use_is_one_line(submit, script):
    code, said, calls = submit(script)
    assert code == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert calls == []


def test_the_trainjob_has_what_the_api_asks_for():
    """Fields of trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer v2: TrainJobSpec, RuntimeRef, Trainer)."""
    job: dict[str, Any] = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"]["name"] == job["metadata"]["name"].lower()
    assert set(job["spec"]) <= {"runtimeRef", "initializer", "trainer", "labels", "annotations", "suspend", "managedBy"}
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert trainer["command"] == ["torchrun"]
    limits = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert int(limits) == trainer["numProcPerNode"]
    paths = [arg.removeprefix("/app/") for arg in trainer["args"] if arg.startswith("/app/")]
    assert len(paths) == 2
    assert all((ROOT / path).is_file() for path in paths)


def test_the_sky_task_has_fields_skypilot_knows_and_starts_every_node(tmp_path):
    task: dict[str, Any] = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT"
    assert task["num_nodes"] == 2
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stand_in = tmp_path / ".venv/bin/accelerate"
    stand_in.write_text(RECORD)
    stand_in.chmod(0o755)
    env = {
        **os.environ, "RECORD": str(tmp_path / "record"), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
    }  # fmt: skip
    assert subprocess.run(["bash", "-euc", task["run"]], cwd=tmp_path, env=env).returncode == 0
    call = (tmp_path / "record").read_text().split("\n")
    found = options(call)
    assert (found["--main_process_ip"], found["--machine_rank"], found["--num_processes"]) == ("10.0.0.1", "1", "16")
    paths = [word for word in call if word.startswith("recipes/")]
    assert len(paths) == 3
    assert all((ROOT / path).is_file() for path in paths)
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0
    assert shlex.split(task["setup"])[:3] == ["python3", "-m", "venv"]
