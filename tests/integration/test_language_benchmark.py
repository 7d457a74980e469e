"""The language study's program: what the declared design plans, and once through at toy size."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.packed import unpack
from llm_unlearn.study.arms import wanted
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.tune import Choice, plan_tuning

ROOT = Path(__file__).resolve().parents[2]
PROGRAM, DESIGN = ROOT / "benchmarks" / "language.py", ROOT / "recipes/configs/study/language.yaml"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("language_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(program):
    return program.study_config(Namespace(study=None, quick=False, overrides=[]))


def test_the_design_is_as_declared(study):
    cells, primary = wanted(study), study.primary
    core = {(w.checkpoint, w.method) for w in cells if w.scenario == "author" and w.seed < 5}
    assert {(k, m) for k in ("fit", "grok", "easy") for m in study.methods} < core
    assert len(study.methods) >= 10
    for kind in {kind for pair in primary.contrasts for kind in pair}:
        for method in primary.methods:
            seeds = {w.seed for w in cells if (w.scenario, w.checkpoint, w.method) == ("author", kind, method)}
            assert len(seeds) == 10
    three = set(primary.methods)
    for scenario in ("fact", "relation", "random", "author2", "author8"):
        assert {(w.checkpoint, w.method) for w in cells if w.scenario == scenario} == {
            (k, m) for k in ("fit", "grok", "easy") for m in three
        }
    assert {k for k, _ in core} == {"early", "fit", "fit_scaled", "fit_normed", "grok", "post", "easy", "twin", "sam"}
    sha = hashlib.sha256(DESIGN.read_bytes()).hexdigest()
    assert {c.facts["design"] for c in plan(study)} == {sha}


def test_every_place_is_tuned_with_the_same_budget_on_a_seed_of_its_own(study):
    trials = [c.spec for c in plan_tuning(study) if c.kind == "tune"]
    tried = Counter((t["scenario"], t["checkpoint"], t["method"]) for t in trials)
    assert set(tried) == {(w.scenario, w.checkpoint, w.method) for w in wanted(study)}
    assert set(tried.values()) == {study.tune.trials}
    assert {t["seed"] for t in trials} == {100}


def test_what_tuning_never_reached_is_left_out(program, study):
    def found(*lacking: tuple[str, str]) -> list[Choice]:
        pairs = {(w.checkpoint, w.method) for w in wanted(study)}
        return [Choice("", k, m, None if (k, m) in lacking else {"optim.lr": 1e-3}, None, 1, 1) for k, m in pairs]

    measured, left_out = program.with_settings(study, found(), Path("t.yaml"))
    assert (left_out, measured.tuned, measured.extra) == ([], "t.yaml", study.extra)
    post = [("post", m) for m in study.primary.methods]
    measured, left_out = program.with_settings(study, found(*post, ("easy", "ga")), Path("t.yaml"))
    assert left_out == ["ga", "post"]
    assert measured.primary == study.primary
    assert not {w.checkpoint for w in wanted(measured)} & {"post"}
    assert {w.checkpoint for w in wanted(measured)} >= {"early", "twin"}
    assert program.with_settings(study, found(("grok", "npo")), Path("t.yaml"))[0].primary is None
    with pytest.raises(UserError, match="no trial of tuning has a result"):
        program.with_settings(study, found(*{(w.checkpoint, w.method) for w in wanted(study)}), Path("t.yaml"))


def test_once_through_and_again(program, tmp_path):
    folder, results = tmp_path / "study", tmp_path / "results"
    argv = ["--quick", "--study", str(folder), "--results", str(results), "--jobs", "2"]
    done = subprocess.run([sys.executable, str(PROGRAM), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "primary: graddiff, easy minus twin: " in done.stdout
    content = json.loads((results / "language_quick.json").read_text())
    assert content["cells"]["measured"] == {"ok": 24}
    assert content["left_out"] == ["fit"], "60 steps memorise nothing"
    assert [c.split("/")[-1] for c in content["censored"]] == ["seed100 never reached 'fit'"]
    (design,) = content["designs"]
    assert design.startswith(hashlib.sha256(DESIGN.read_bytes()).hexdigest() + " with seeds=[0, 1, 2] ")
    outcomes = unpack(content["outcomes"])
    assert len(outcomes) == 12
    assert all(o.number("kept_at_level") is not None for o in outcomes)
    assert all({"relearn_acc", "neighbour_acc"} <= o.metrics.keys() for o in outcomes)
    assert any("forget_through_acc" in o.metrics for o in outcomes), "a small world may hold out no such question"

    records = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    again, _ = program.measure(program.study_config(Namespace(study=str(folder), quick=True, overrides=[])), 1)
    assert {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()} == records, "nothing ran twice"
    assert {**again, "command": content["command"]} == content
