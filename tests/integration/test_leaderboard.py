"""The leaderboard's program: its study takes every method of the table, with one budget for all."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from llm_unlearn.config import load_config
from llm_unlearn.errors import UserError
from llm_unlearn.methods.table import METHODS
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import plan_tuning, trials_of


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("leaderboard")


@pytest.fixture
def outcome_folder():
    """Writer of what an evaluated run leaves."""

    def write(folder: Path, method: str, seed: int) -> None:
        run = {"method": method, "checkpoint": "fit", "seed": seed}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trajectory.jsonl").write_text("")
        (folder / "results.json").write_text(
            json.dumps({"run": run, "metrics": {}, "answers": {}, "model": str(folder)})
        )

    return write


def arguments(**changes) -> Namespace:
    values = {"preset": "short40", "study": "s", "methods": "", "updates": 200, "seeds": "0,1,2", "tune_seeds": "100"}
    return Namespace(**{**values, "trials": 4, "overrides": [], **changes})


def test_every_method_is_tuned_with_one_budget_and_measured(program):
    study = program.study_config(arguments())
    trials: dict[tuple, int] = {}
    for cell in (c for c in plan_tuning(study) if c.kind == "tune"):
        place = tuple(cell.spec[key] for key in ("method", "checkpoint", "scenario"))
        trials[place] = trials.get(place, 0) + 1
        assert cell.spec["config"]["loop"]["max_steps"] == 200
    again = {"undial_nll", "ceu_nll", "flat_nll", "flat_kl_nll", "whp_nll"}
    assert {study.methods[name]["method"]["retain"] for name in again} == {"nll"}
    places = {
        (name, kind, scenario)
        for name in {*METHODS, *again}
        for kind in ("fit", "grok")
        for scenario in ("author", "fact")
    }
    assert set(trials) == places
    whole = {name: len(trials_of(study, name)) for name in ("fisher", "ssd")}
    assert {place: n for place, n in trials.items() if n != 4} == {p: whole[p[0]] for p in places if p[0] in whole}
    measured = [c.spec for c in plan(study) if c.kind == "unlearn"]
    assert {tuple(s[key] for key in ("method", "checkpoint", "scenario")) for s in measured} == places
    assert {s["seed"] for s in measured} == {0, 1, 2}


def test_a_world_of_one_word_answers_has_no_trial_that_skips_the_word(program):
    def skips(study) -> set:
        cells = [c for c in plan_tuning(study) if c.kind == "tune" and c.spec["method"] == "ceu"]
        return {c.spec["config"]["method"]["params"].get("skip", 1.0) for c in cells}

    assert skips(program.study_config(arguments())) == {0.0}
    assert skips(program.study_config(arguments(preset="world40", trials=8))) == {0.0, 1.0}
    shipped = load_config(StudyConfig, program.CONFIGS / "study/leaderboard.yaml")
    assert skips(shipped) == {0.0}


def test_it_takes_a_subset_and_refuses_what_is_no_method(program):
    study = program.study_config(arguments(methods="npo, ga", updates=20, overrides=["checkpoints=[fit]"]))
    assert (list(study.methods), study.checkpoints, study.unlearn.loop.max_steps) == (["npo", "ga"], ("fit",), 20)
    with pytest.raises(UserError, match="did you mean 'npo'"):
        plan_tuning(program.study_config(arguments(methods="nop")))
    with pytest.raises(UserError, match="seed 0 of the study itself"):
        plan_tuning(program.study_config(arguments(tune_seeds="0")))


def test_only_finished_cells_of_the_plan_are_ranked(program, tmp_path, outcome_folder):
    study = program.study_config(arguments(study=str(tmp_path), methods="npo,ga", overrides=["checkpoints=[fit]"]))
    cells = [c for c in plan(study) if c.kind == "unlearn" and c.spec["scenario"] == "fact"]
    store = Store(tmp_path)
    for cell in cells:
        folder = Path(cell.spec["config"]["out"])
        for place in (folder, folder.parent / "stale"):  # of the plan, and beside it
            outcome_folder(place, cell.spec["method"], cell.spec["seed"])
        if cell.spec["method"] == "npo" and cell.spec["seed"] != 2:
            store.write(cell, "ok", {"folder": str(folder)})
    failed = next(c for c in cells if c.spec["method"] == "ga")
    store.write(failed, "failed", error="of now; its results.json is of a run before")
    found = program.outcomes_of(cells, store, "fact")
    assert [(o.method, o.seed, o.folder.name) for o in found] == [("npo", 0, "npo"), ("npo", 1, "npo")]
    assert program.outcomes_of(cells, store, "author") == []


def test_it_tells_trials_and_updates_beside_the_budget(program, tmp_path):
    fixed = {"method": {"params": {"lam": 1.0, "alpha": 5.0}}}
    methods = {"whp": {}, "task_vector": {}, "ssd": fixed, "longer": {"method": {"name": "whp"}}}
    study = program.study_config(arguments(study=str(tmp_path), overrides=[f"methods={json.dumps(methods)}"]))
    assert program.trials_per_method(study) == {"whp": 4, "task_vector": 4, "ssd": 1, "longer": 4}
    cells = plan(study)
    for cell in cells:  # as tuning may have chosen at a checkpoint
        if (cell.spec.get("method"), cell.spec.get("checkpoint")) == ("longer", "grok"):
            cell.spec["config"]["method"]["params"] = {"reinforce_updates": 200.0}
    told = program.extra_updates(cells)
    assert told == {("fit", "whp"): 60, ("grok", "whp"): 60, ("fit", "longer"): 60, ("grok", "longer"): 200}
    head = program.head_of(arguments(), program.trials_per_method(study), told)
    assert "4 trials" in head
    assert "ssd 1" in head
    assert "whp 60 (fit), longer 60 (fit), whp 60 (grok), longer 200 (grok)" in head
    assert "Other numbers" not in program.head_of(arguments(), {"npo": 4}, {})
    assert "Other numbers of trials, all that the method's grid has: ssd 18" in program.head_of(
        arguments(), {"npo": 4, "ssd": 18}, {}
    )
    assert "besides" not in program.head_of(arguments(), {"npo": 4}, {})


def test_seconds_are_added_up_by_kind_of_cell(program):
    records = [{"kind": "tune", "seconds": s, "status": "ok"} for s in (1.0, 3.0)]
    records += [{"kind": "tune", "seconds": 9.0, "status": "failed"}, {"kind": "train", "seconds": 5.0, "status": "ok"}]
    assert program.seconds_by_kind(records) == {
        "tune": {"cells": 2, "sum": 4.0, "mean": 2.0},
        "train": {"cells": 1, "sum": 5.0, "mean": 5.0},
    }
