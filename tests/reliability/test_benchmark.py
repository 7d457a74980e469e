"""The table of docs/reliability.md: a few trials of every row that strikes runs, and what the page says of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.reliability


def run(tmp_path: Path, *argv: str) -> dict:
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- table -->\n<!-- end of table -->\nThe end.\n")
    command = [sys.executable, "benchmarks/reliability.py", "--out", str(tmp_path / "found.json"), "--page", str(page)]
    done = subprocess.run([*command, "--runs", str(tmp_path / "runs"), *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "found.json").read_text())


def test_struck_runs_come_back(tmp_path):
    """One trial each of a kill in a step, in a save and in an evaluation, a signal, numbers that are not finite, a full
    disk and a damaged state.
    """
    rows = ["T1", "T2", "T3", "T4", "T6", "T9", "T17", *(["T5"] if os.geteuid() == 0 else [])]
    found = run(tmp_path, "--rows", ",".join([*rows, "T14"]), "--trials", "1")
    statistics = found.pop("T14")
    assert {name: row["passed"] for name, row in found.items()} == dict.fromkeys(rows, 1), found
    text = (tmp_path / "page.md").read_text()
    assert "| T2 |" in text
    assert text.count("**1/1**") == len(rows)
    committed = json.loads((ROOT / "benchmarks/results/stats_simulation.json").read_text())["checks"]
    kept = [check["kept"] for group in committed.values() for check in group.values() if isinstance(check, dict)]
    assert (statistics["passed"], statistics["of"]) == (sum(kept), len(kept))
    assert f"**{sum(kept)}/{len(kept)}** checks; missed: bootstrap_forget," in text, "what missed its bar is named"
    assert text.count("| not run |") > 5, "what was not run is not given a number"
    assert text.endswith("The end.\n")


def test_every_number_of_rows_processes_and_batches_gives_the_same_scores(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cases = importlib.import_module("reliability_stress").gather_cases

    class Bench:
        folder = tmp_path

    bench = Bench()
    results = [cases(bench, k) for k in range(340)]
    assert len({(r["rows"], r["processes"], r["batch"]) for r in results}) == 340
    assert [r for r in results if not r["passed"]] == []
