"""The vision study's program: what it plans, and once through at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.report.probe_table import probe_grids
from llm_unlearn.report.results import ProbeRow
from llm_unlearn.report.vision_tables import vision_tables
from llm_unlearn.study import probing
from llm_unlearn.study.arms import training_of, wanted
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.tune import plan_tuning, trials_of

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "vision.py"
TOY = ["grok.data.image.train=120", "grok.watch.until=fit", "unlearn.loop.max_steps=10", "tune.lrs=[1e-3, 1e-2]",
       "checkpoints=[fit, easy]", "scenarios={half: {kind: class, size: 2, share: 0.5}}", "levels={half: 0.5}",
       "grid_scenarios=[half]",        "controls.easy.changes.loop.max_steps=60"]  # fmt: skip


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("vision")


def arguments(**changes) -> Namespace:
    values = {"data": "digits", "data_path": None, "arm": "main", "seeds": "0,1,2,3,4", "extra_seeds": None,
              "tune_seeds": None, "trials": 5, "methods": "", "probe_seeds": 0, "study": "s/{data}-{arch}", "jobs": 1,
              "overrides": []}  # fmt: skip
    return Namespace(**{**values, **changes})


def test_the_whole_study_is_as_the_figures_ask(program):
    cnn, resnet = (program.study_config(arguments(), arch) for arch in ("cnn", "resnet8"))
    cells = wanted(cnn)
    grid = [w for w in cells if w.seed < 5]
    assert len(grid) == len({(w.seed, w.scenario, w.checkpoint, w.method) for w in grid}) == 5 * 4 * 8 * 8
    more = {(w.checkpoint, w.method) for w in cells if w.seed >= 5}
    assert more == {(kind, name) for kind in ("fit", "grok", "easy") for name in ("ga", "neggrad_plus", "scrub")}
    trials = [c.spec for c in plan_tuning(cnn) if c.kind == "tune"]
    whole = sum(len(trials_of(cnn, name)) for name in ("fisher", "ssd"))
    assert len(trials) == 4 * 8 * (6 * 5 + whole)
    assert {t["seed"] for t in trials} == {100}
    assert (resnet.grok.model.net.arch, resnet.grok.model.net.alpha, resnet.grok.optim.clip) == ("resnet8", 8, 0)
    assert training_of(resnet, "easy")["model"]["net"]["alpha"] == 1
    assert cnn.primary is not None
    assert {(s.grok.data.image.train, s.grok.data.image.val) for s in (cnn, resnet)} == {(400, 400)}


def test_fewer_seeds_have_no_extra_cells_and_two_no_primary(program):
    three = program.study_config(arguments(seeds="0,1,2", data="fashion_mnist"), "cnn")
    assert (three.extra, three.primary is not None, three.grok.data.kind) == ((), True, "fashion_mnist")
    assert {w.seed for w in wanted(program.study_config(arguments(extra_seeds="7,8"), "cnn"))} == {0, 1, 2, 3, 4, 7, 8}
    assert program.study_config(arguments(seeds="0,1"), "cnn").primary is None
    assert program.study_config(arguments(methods="ga,fisher"), "cnn").primary is None
    with pytest.raises(UserError, match="did you mean 'resnet8'"):
        program.study_config(arguments(), "resnet9")


def test_the_published_optimiser_has_early_and_annealed_checkpoints(program):
    study = program.study_config(arguments(arm="published", seeds="0,1,2"), "cnn")
    cells = plan(study)
    optim = cells[0].spec["config"]["optim"]
    assert [optim[key] for key in ("optimizer", "lr", "momentum", "weight_decay", "schedule")] == [
        "sgd", 0.1, 0.9, 5e-4, "cosine"]  # fmt: skip
    late = next(c for c in cells if c.spec.get("checkpoint") == "annealed")
    assert late.spec["config"]["model"].endswith("controls/annealed/seed0@last")
    assert {w.scenario for w in wanted(study)} == {"half"}


def test_the_retuned_arm_is_the_primary_with_three_seeds_of_tuning(program):
    study, main = (program.study_config(arguments(arm=arm), "cnn") for arm in ("retuned", "main"))
    assert study.primary == main.primary
    assert {name: study.methods[name] for name in study.primary.methods} == dict(study.methods)
    cells = wanted(study)
    assert {w.seed for w in cells} == set(range(10))
    assert {w.scenario for w in cells} == {"half"}
    trials = [c.spec for c in plan_tuning(study) if c.kind == "tune"]
    assert {(t["seed"], t["scenario"]) for t in trials} == {(seed, "half") for seed in (100, 101, 102)}
    assert {c.spec["seed"] for c in plan_tuning(main) if c.kind == "tune"} == {100}


def test_probes_are_set_as_what_they_stand_beside(program):
    cnn, resnet = (program.look_of(arch).settings for arch in ("cnn", "resnet8"))
    assert (cnn.directions, resnet.directions) == (25, 20), "the published ResNet code takes 20"
    assert cnn.loss == resnet.loss == 0.5, "curvature at one loss"


def test_a_model_that_never_has_that_loss_keeps_its_other_probes(program, tmp_path, monkeypatch):
    def probe_model(*_given, which, **_settings):
        if "hessian" in which:
            raise UserError("no temperature gives a mean loss of 0.5")
        line = {"name": "x", "value": 1.0, "null": None}
        return {"probes": {name: {"lines": [line], "cost": {"cpu_seconds": 1.0}} for name in which}}

    monkeypatch.setattr(probing, "probe_model", probe_model)
    monkeypatch.setattr(probing, "fingerprint", lambda _reference: "f")
    monkeypatch.setattr(probing, "open_start", lambda *_given: Namespace(corpus=None, request=None))
    look, asked = program.look_of("cnn"), {"kind": "class", "size": 1}
    assert look.optional == ("hessian",)
    row = probing.probe_one(("m", asked, str(tmp_path / "p"), 0, "early", look))
    assert set(row["lines"]) == {f"{name}, x" for name in program.PROBES}


def test_what_the_published_probes_leave_open_is_told():
    row = ProbeRow(seed=0, checkpoint="fit", lines={"alignment, ce: cos(all forget, all retain)": [0.5]})
    (grid,) = probe_grids([row], "resnet8", "grok")
    assert [row.cells[-1] for row in grid.rows] == ["0.999 -> 0.426"]
    assert "one net that is not named" in " ".join(grid.notes)


def test_once_through_and_again(program, tmp_path):
    study, results = tmp_path / "study", tmp_path / "results"
    argv = ["--arch", "cnn", "--seeds", "0", "--trials", "2", "--methods", "ga", "--study", str(study), "--results",
            str(results), "--jobs", "1", *TOY]  # fmt: skip
    done = subprocess.run([sys.executable, str(PROGRAM), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((results / "vision_digits_cnn.json").read_text())
    assert content["cells"] == {"tuning": {"ok": 8}, "measured": {"ok": 6}}
    assert {(row["seed"], row["checkpoint"]) for row in content["probes"]} == {(0, "fit"), (0, "easy")}
    page = (results / "vision_table1.md").read_text()
    assert "| cnn | ga | fit | 1 |" in page
    assert "0.990 -> 0.521" in page

    args = arguments(seeds="0", trials=2, methods="ga", study=str(study), overrides=TOY)
    records = {p: p.stat().st_mtime_ns for p in (study / "cells").iterdir()}
    again = program.measure(args, program.study_config(args, "cnn"), "cnn")
    assert {p: p.stat().st_mtime_ns for p in (study / "cells").iterdir()} == records, "nothing ran twice"
    assert again["outcomes"] == content["outcomes"]
    program.write_rows(results / "vision_digits_cnn.json", {**content, **again, "probes": content["probes"]})
    assert vision_tables(results) == page, "tables come from the file alone"
