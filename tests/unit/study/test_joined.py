"""A study gone on with from its file of results: what joins, what is told of it, how much is left to do."""

from __future__ import annotations

from typing import Any

import pytest

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.eval.packed import pack
from llm_unlearn.study.arms import Wanted
from llm_unlearn.study.collect import declared
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.joined import Held, held_in, join, progress_of
from llm_unlearn.study.tune import Choice

MARKS = {"early": 1, "t_fit": 2, "t_gen": 3, "stable_at": 4, "post": None, "ratio": 1.5, "phase": "grok-weak"}


def training(run: str, steps: int = 9, cpu: float = 1.0) -> dict[str, Any]:
    return {"run": run, **MARKS, "steps": steps, "cpu_seconds": cpu, "flops": None}


def choice(method: str, checkpoint: str = "fit", lr: float | None = 1e-3) -> dict[str, Any]:
    setting = None if lr is None else {"optim.lr": lr}
    return {"scenario": "", "checkpoint": checkpoint, "method": method, "setting": setting, "score": None,
            "trials": 1, "feasible_trials": 1}  # fmt: skip


def trial(method: str, lr: float, checkpoint: str = "fit") -> dict[str, Any]:
    return {"scenario": "", "checkpoint": checkpoint, "method": method, "setting": {"optim.lr": lr}, "seeds": [100]}


def content(**values: Any) -> dict[str, Any]:
    empty = {"designs": ["a"], "left_out": [], "cost": {}, "trainings": [], "censored": [], "unreached": [],
             "errors": {}, "tuned": [], "trials": [], "digests": {}, "outcomes": pack([]), "probes": [],
             "environment": {"machine": "one"}}  # fmt: skip
    return {**empty, **values}


def study(**values: Any) -> StudyConfig:
    given = {"out": "studies/x", "seeds": [0, 1, 2], "checkpoints": ["fit", "grok"], "methods": {"ga": {}, "npo": {}}}
    grok = {"data": {"kind": "world", "preset": "world12"}, "model": {"size": "nano"}, "out": "runs/x"}
    tune = {"seeds": [100], "trials": 2, "lrs": [1e-4, 1e-3]}
    return build_config(StudyConfig, {**given, "grok": grok, "tune": tune, **values})


def test_what_was_trained_again_is_told_once_and_where_it_differs():
    cost = {"train": {"cells": 2, "seconds": 3.0, "train_cpu_s": 2}}
    first = content(trainings=[training("seed0"), training("seed1")], cost=cost)
    second = content(
        trainings=[training("seed0", cpu=7.0), training("seed1", steps=10), training("seed2")],
        cost={**cost, "unlearn": {"cells": 1, "seconds": 0.5, "train_cpu_s": 0}},
        environment={"machine": "two"},
    )
    joined = join(first, second, [])
    assert joined["trainings"] == [training("seed0"), training("seed1"), training("seed2")]
    assert joined["retrained_otherwise"] == ["seed1"], "seconds may differ, steps may not"
    assert joined["cost"]["train"] == {"cells": 4, "seconds": 6.0, "train_cpu_s": 4}, "all that was done"
    assert joined["cost"]["unlearn"]["cells"] == 1
    assert (joined["environment"], joined["environments_before"]) == ({"machine": "two"}, [{"machine": "one"}])
    again = join(joined, content(environment={"machine": "one"}), [])
    assert again["environments_before"] == [{"machine": "two"}]
    assert again["retrained_otherwise"] == ["seed1"]
    assert "environments_before" not in join(first, content(), [])


def test_an_error_is_forgotten_once_its_cell_ran_again():
    failed = {"seed0 fit ga": "killed", "tune seed100 fit npo lr=0.001": "killed", "seed100": "no room", "x": "left"}
    first = content(errors=failed, digests={"seed1 fit ga": "00"})
    second = content(errors={"x2": "new"}, digests={"seed0 fit ga": "11"})
    joined = join(first, second, ["seed0 fit ga", "tune seed100 fit npo lr=0.001", "seed100", "x2"])
    assert joined["errors"] == {"x": "left", "x2": "new"}
    assert joined["digests"] == {"seed1 fit ga": "00", "seed0 fit ga": "11"}


def test_what_is_tuned_again_replaces_what_was_tuned():
    first = content(tuned=[choice("ga", lr=None), choice("npo")], trials=[trial("ga", 1e-4), trial("npo", 1e-3)])
    second = content(tuned=[choice("ga")], trials=[trial("ga", 1e-3)])
    joined = join(first, second, [])
    assert joined["tuned"] == [choice("npo"), choice("ga")]
    assert joined["trials"] == [trial("npo", 1e-3), trial("ga", 1e-3)]


def test_where_it_was_tuned():
    one = Held(choices=[Choice("", "fit", "ga", {}, None, 1, 1)])
    assert one.tuned(Wanted(0, "author", "fit", "ga")), "a study of one scenario names none"
    several = Held(choices=[*one.choices, Choice("author", "fit", "npo", {}, None, 1, 1)])
    assert several.tuned(Wanted(0, "author", "fit", "npo"))
    assert not several.tuned(Wanted(0, "fact", "fit", "npo"))
    assert not several.tuned(Wanted(0, "author", "fit", "ga"))


def test_progress_counts_every_cell_once():
    found = content(
        digests={"seed0 fit ga": "00"},
        unreached=["seed0 grok ga"],
        errors={"seed1 fit ga": "killed", "seed100": "x"},
        tuned=[choice("ga"), choice("ga", "grok"), choice("npo", lr=None)],
        trials=[trial("ga", 1e-4), trial("ga", 1e-3), trial("ga", 1e-3, "grok")],
    )
    assert progress_of(study(), found) == {
        "tuning": {"ok": 3, "without result": 3, "not run yet": 2},
        "measured": {"ok": 1, "censored": 1, "failed": 1, "not run yet": 6},  # three of npo at fit cannot be
    }
    nothing = progress_of(study(), content())
    assert nothing == {"tuning": {"ok": 0, "not run yet": 8}, "measured": {"ok": 0, "not run yet": 12}}


def test_only_the_same_study_is_gone_on_with():
    asked = study()
    file = content(study=declared(asked), digests={"seed0 fit ga": "00"}, unreached=["seed0 grok ga"])
    assert held_in(file, study(out="elsewhere"), "f.json").ended == {"seed0 fit ga", "seed0 grok ga"}
    with pytest.raises(UserError, match=r"f.json: is of another study \(methods, seeds differ\)"):
        held_in(file, study(seeds=[0, 1], methods={"ga": {}}), "f.json")
    with pytest.raises(UserError, match="holds no results that can be gone on from"):
        held_in({"a": 1}, asked, "f.json")
