"""The interventions' design: that one thing is changed, and once through at toy size to the page of findings."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from argparse import Namespace
from collections import Counter

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.report.findings import findings
from llm_unlearn.report.results import read_results
from llm_unlearn.study.arms import training_of, wanted
from llm_unlearn.study.tune import plan_tuning


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("language")


def of(program, design: str):
    return program.study_config(Namespace(design=design, study=None, quick=False, overrides=[]))


def test_a_pair_differs_in_the_weight_of_the_penalty_and_in_nothing_else(program):
    study = of(program, "interventions")
    for (group, sham), sign in zip(study.primary.contrasts, (1, -1), strict=True):
        a, b = (copy.deepcopy(training_of(study, kind)) for kind in (group, sham))
        assert b["orthogonality"].pop("weight") == 0.0
        assert a["orthogonality"].pop("weight") * sign > 0
        assert a == b
        assert a["orthogonality"]["after"] == ("fit" if group == "apart" else "grok")
    plain, gru = study.methods["npo"]["method"], study.methods["npo_gru"]["method"]
    assert {**plain, "name": "npo", "gradient": "gru"} == gru
    graddiff, gru = study.methods["graddiff"]["method"], study.methods["graddiff_gru"]["method"]
    assert {**graddiff, "name": "graddiff", "gradient": "gru"} == gru


def test_the_plan_is_as_declared_and_on_the_language_studys_worlds(program):
    study, language = of(program, "interventions"), of(program, "language")
    cells = Counter((w.checkpoint, w.method) for w in wanted(study))
    shams = {(k, m) for pair in study.primary.contrasts for k in pair for m in ("graddiff", "npo")}
    assert set(cells) == {(k, m) for k in ("fit", "grok") for m in study.methods} | shams
    assert set(cells.values()) == {5}
    assert len([c for c in plan_tuning(study) if c.kind == "tune"]) == 16 * study.tune.trials * 2
    for part in ("data", "scenario", "model", "optim", "loop"):
        assert getattr(study.grok, part) == getattr(language.grok, part)
    assert study.unlearn == language.unlearn
    with pytest.raises(UserError, match="unknown part 'fact'"):
        program.cells_of(study, ["fact"])


def test_once_through_at_toy_size(program, tmp_path, monkeypatch, capsys):
    argv = ["--design", "interventions", "--quick", "--study", str(tmp_path / "s"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["language.py", *argv, "--jobs", "1", "--probe-seeds", "1"])
    program.main()
    assert "primary: npo, apart minus sham: " in capsys.readouterr().out
    content = json.loads((tmp_path / "interventions_quick.json").read_text())
    assert content["cells"] == {"tuning": {"ok": 8}, "measured": {"ok": 12}}
    assert "pushed apart" in content["what"]
    assert content["command"] == "python benchmarks/language.py --design interventions --quick --probe-seeds 1"
    config = json.loads(json.dumps(content["study"]["controls"]))
    assert config["apart"]["changes"]["orthogonality"]["weight"] == 1
    shown = tmp_path / "results"
    shown.mkdir()
    shutil.copy(tmp_path / "interventions_quick.json", shown / "interventions.json")
    (part,) = [p for p in findings(read_results(shown)).sections if p.title == "Interventions on gradients"]
    assert any(text.startswith("`apart` keeps, beside `sham`: ") for text in part.text)
    titles = {grid.title for grid in part.grids}
    assert {"Primary contrast: kept_at_level", "Start models", "Projecting the gradients while forgetting"} <= titles
