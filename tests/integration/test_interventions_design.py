"""The interventions' design: that one thing is changed, and once through at toy size to the page of findings."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter

import pytest

from llm_unlearn.report.findings import findings
from llm_unlearn.report.results import read_results
from llm_unlearn.study.arms import training_of, wanted
from llm_unlearn.study.config import load_study

METHODS = ("ga", "graddiff", "npo", "ga_fast", "graddiff_fast", "npo_fast")


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("interventions")


@pytest.fixture(scope="module")
def study(program):
    return load_study(program.CONFIG, [])


def test_a_pair_differs_in_the_weight_of_the_penalty_and_in_nothing_else(study):
    for (group, sham), weight, kind in zip(study.primary.contrasts, (1.0, -0.1), ("fit", "grok"), strict=True):
        for arm, dose in ((group, weight), (sham, 0.0)):
            acting = {"of": "margin", "weight": dose, "after": kind, "steps": 300}
            trained = training_of(study, arm)
            assert trained.pop("orthogonality") == acting
            plain = training_of(study, "")
            assert plain.pop("orthogonality") is None
            assert {**trained, "watch": plain["watch"]} == plain
            assert trained["watch"] == {**plain["watch"], "until": "max_steps"}
        assert study.controls[group].match == sham


def test_a_projected_or_fast_method_differs_from_the_plain_one_in_that_alone(study):
    for name in ("ga", "graddiff", "npo"):
        plain = {"name": name, **study.methods[name].get("method", {})}
        assert study.methods[f"{name}_fast"] == {"method": plain, "optim": {"lr": 3e-4}}
        if name != "ga":
            assert study.methods[f"{name}_gru"] == {"method": {**plain, "gradient": "gru"}}


def test_the_plan_is_as_declared_and_on_the_language_studys_worlds(program, study):
    cells = Counter((w.checkpoint, w.method) for w in wanted(study))
    arms = {(k, m) for pair in study.primary.contrasts for k in pair for m in METHODS}
    assert set(cells) == {(k, m) for k in ("fit", "grok") for m in study.methods} | arms
    assert set(cells.values()) == {5}
    language = load_study(program.CONFIG.with_name("language.yaml"), [])
    for part in ("data", "scenario", "model", "optim", "loop"):
        assert getattr(study.grok, part) == getattr(language.grok, part)
    assert study.scenarios["author"] == language.scenarios["author"]
    assert study.tuned is None, "one setting for all arms"


def test_the_second_design_is_the_first_on_other_seeds_with_fewer_arms(program, study):
    again = load_study(program.CONFIG.with_stem("interventions_apart"), [])
    assert not set(again.seeds) & {*study.seeds, 100, 101, 102}
    assert again.controls == {name: study.controls[name] for name in ("apart", "apart_sham")}
    assert again.methods == {name: study.methods[name] for name in METHODS}
    for part in ("grok", "unlearn", "scenarios", "suite"):
        assert getattr(again, part) == getattr(study, part)
    assert again.primary == study.primary.model_copy(update={"contrasts": study.primary.contrasts[:1]})
    assert {w.checkpoint for w in wanted(again)} == {"apart", "apart_sham"}


def test_once_through_at_toy_size(program, tmp_path, monkeypatch, capsys):
    argv = ["--quick", "--study", str(tmp_path / "s"), "--results", str(tmp_path), "--jobs", "1", "--probe-seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["interventions.py", *argv])
    program.main()
    assert "interventions_quick.json: " in capsys.readouterr().out
    content = json.loads((tmp_path / "interventions_quick.json").read_text())
    assert content["cells"] == {"measured": {"ok": 24}}, "12 trainings, 12 runs"
    assert content["command"] == "python benchmarks/interventions.py --quick"
    assert {row["checkpoint"] for row in content["probes"]} == {"apart", "sham"}
    doses = {row["checkpoint"]: row["lines"]["alignment, margin: cos(forget, retain)"][0] for row in content["probes"]}
    assert doses["apart"] < doses["sham"] - 0.03, "the push is seen in the model it left"
    shown = tmp_path / "results"
    shown.mkdir()
    shutil.copy(tmp_path / "interventions_quick.json", shown / "interventions.json")
    (part,) = [p for p in findings(read_results(shown)).sections if p.title == "Interventions on gradients"]
    assert any(text.startswith("`apart` keeps, beside `sham`: ") for text in part.text)
    starts = next(grid for grid in part.grids if grid.title == "Start models")
    assert starts.columns[-1] == "held-out acc less that of its match"
