"""The shipped array script under stand-ins for SLURM's commands (benchmarks/reliability_slurm.py)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.reliability, pytest.mark.integration]
STUDY = """
out: {out}
seeds: [0]
checkpoints: [early]
methods: {{npo: {{}}, ga: {{}}}}
suite: quick
grok:
  data: {{preset: world12}}
  scenario: {{size: 2}}
  model: {{size: nano}}
  watch: {{items: 20, first: 50, until: max_steps}}
  loop: {{batch_size: 32, log_every: 1, save_every: 1000, max_steps: 900}}
  optim: {{lr: 1.0e-2, warmup: 5, weight_decay: 0}}
unlearn: {{loop: {{max_steps: 4}}}}
"""


@pytest.fixture
def slurm(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reliability_slurm")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_study_comes_whole_out_of_one_array_in_any_order(slurm, tmp_path):
    """Four cells and two tasks too many, three at once, in an order in which cells come before their trainings. One
    training runs out of time (TERM 175 s ahead of the limit where 120 s are asked for), the other loses its node, and
    is preempted later.
    """
    study, out = tmp_path / "s.yaml", tmp_path / "study"
    study.write_text(STUDY.format(out=out))
    logs = [out / "runs" / name / "train_log.jsonl" for name in ("seed0", "seed0-gold")]
    strikes = [
        slurm.Strike(0, "time", lambda: lines(logs[0]) >= 10),
        slurm.Strike(1, "node", lambda: lines(logs[1]) >= 10),
        slurm.Strike(1, "preempted", lambda: lines(logs[1]) >= 20, start=1),
    ]
    with slurm.Cluster(tmp_path / "cluster", 3, seed=2) as cluster:
        cluster.submit("--array=0-5", slurm.SCRIPT, str(study))
        assert cluster.waiting[0].number in (2, 3), "the seed is one that starts with a cell that has to wait"
        cluster.run(strikes)
        codes = {task.number: task.codes for task in cluster.ended}
        said = (tmp_path / "cluster/said").read_text()
        assert codes[0] == [143, 0], said
        assert codes[1] == [-9, 143, 0]
        assert codes[4] == codes[5] == [2]
        assert "error: --cell 5: the study has cells 0 to 3; see llm-unlearn study plan\n" in said
        early = [n for n in (2, 3) if codes[n] == [1]]
        assert early, codes
        status = json.loads(cluster.command("llm-unlearn", "study", "status", str(study), "--json").stdout)
        assert (status["failed"], status["missing"]) == (0, len(early)), "too early is no failure"

        ready = cluster.command("llm-unlearn", "study", "status", str(study), "--ready").stdout
        assert ready == ("2-3\n" if len(early) == 2 else f"{early[0]}\n")
        before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
        cluster.submit("--array=0-3", slurm.SCRIPT, str(study))
        cluster.run()
        assert {task.number: task.codes for task in cluster.ended[-4:]} == {n: [0] for n in range(4)}
        assert {path: path.stat().st_mtime_ns for path in before} == before, "finished cells are not run again"
        records = [json.loads(path.read_text()) for path in (out / "cells").iterdir()]
        assert sorted(record["status"] for record in records) == ["ok"] * 4
        assert cluster.command("llm-unlearn", "study", "status", str(study), "--ready").stdout == "\n"

        whole = tmp_path / "whole.yaml"
        whole.write_text(STUDY.format(out=tmp_path / "whole"))
        for number in ("0", "1"):
            done = cluster.command("llm-unlearn", "study", "run", str(whole), "--cell", number)
            assert done.returncode == 0, done.stderr
    left_by = importlib.import_module("reliability_trials").left_by
    for name in ("seed0", "seed0-gold"):
        assert left_by(out / "runs" / name) == left_by(tmp_path / "whole/runs" / name), "to the bit"


def test_what_crashes_or_is_lost_is_run_again_and_nothing_else(slurm, tmp_path):
    """30 cells in place of 500: benchmarks/reliability.py, row T16b."""
    found = slurm.array_of_cells(SimpleNamespace(folder=tmp_path), 0, seeds=3)
    assert found["passed"], found
    assert found["lost"] == 2
    assert found["crashed_tries"] > 0
    assert found["at_once"] == 16
    assert found["tries"] >= 30 + found["crashed_tries"]


def test_a_dependency_is_kept_in_any_order(slurm, tmp_path):
    """The second array starts when the first has ended, well or not."""
    tried = tmp_path / "tried"
    tried.mkdir()
    study = tmp_path / "s.yaml"
    study.write_text(STUDY.format(out=tmp_path / "study"))
    with slurm.Cluster(tmp_path / "cluster", 4, seed=0, tried=tried) as cluster:
        cluster.submit("--array=0-1", slurm.SCRIPT, str(study))
        cluster.submit("--array=2-3", "--dependency=afterany:1", slurm.SCRIPT, str(study))
        cluster.run()
        assert [task.job for task in cluster.ended] == [1, 1, 2, 2]
