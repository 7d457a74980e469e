"""What goes into the committed file of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.study.collect import declared, failures, trial_rows
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.reproduce import reproduce


def test_failures_name_files_from_the_studys_folder_on():
    study = Path("/home/somebody/studies/mine")
    records = [
        {"status": "censored", "label": "seed5 grok", "error": f"{study}/runs/seed5 never reached 'grok'"},
        {"status": "failed", "label": "seed1 npo", "error": f"Traceback\nValueError: {study}/runs/seed1 is empty\n"},
        {"status": "ok", "label": "seed0 npo"},
    ]
    assert failures(records, study) == {
        "censored": ["runs/seed5 never reached 'grok'"],
        "errors": {"seed1 npo": "ValueError: runs/seed1 is empty"},
    }


def test_where_given_data_lies_is_not_told_and_is_asked_for_to_reproduce(tmp_path):
    given = StudyConfig.model_validate({"grok": {"data": {"kind": "cifar10", "path": "/home/somebody/cifar"}}})
    assert declared(given)["grok"]["data"]["path"] == "DIR"
    assert declared(StudyConfig())["grok"]["data"]["path"] is None
    elsewhere = {"easy": {"take": "fit", "changes": {"data": {"forget_path": "/home/somebody/forget.jsonl"}}}}
    told = declared(StudyConfig.model_validate({"controls": elsewhere}))
    assert told["controls"]["easy"]["changes"]["data"] == {"forget_path": "DIR"}

    def results(study: StudyConfig) -> Path:
        path = tmp_path / "results.json"
        path.write_text(json.dumps({"study": declared(study), "digests": {"seed0 fit npo": "0" * 16}}))
        return path

    with pytest.raises(UserError, match="its data was given as files; say where they lie here with --data-path"):
        reproduce(results(given), "seed0 fit npo", tmp_path)
    with pytest.raises(UserError, match="--data-path x: the data of .* was not given as files; leave it out"):
        reproduce(results(StudyConfig()), "seed0 fit npo", tmp_path, data_path="x")
    with pytest.raises(UserError, match="nowhere"):
        reproduce(results(given), "seed0 fit npo", tmp_path, data_path=str(tmp_path / "nowhere"))


def test_trials_are_told_by_setting_with_what_came_of_each_seed():
    def record(seed: int, lr: float, **result: object) -> dict:
        spec = {"scenario": "author", "checkpoint": "fit", "method": "npo", "trial": {"optim.lr": lr}, "seed": seed}
        spec["config"] = {"stop": {"floor": 0.8}}
        return {"kind": "tune", "status": "ok", "spec": spec, "result": result}

    start = {"forget_prob": 1.0, "retain_prob": 1.0, "val_prob": 0.8, "retain_acc": 1.0}
    kept = {"forget_prob": 0.1, "retain_prob": 0.9, "val_prob": 0.6, "retain_acc": 0.95}
    good = {"start": start, "kept": kept, "target": 0.15, "kept_step": 40}
    gone = good | {"kept": kept | {"retain_prob": 0.1, "retain_acc": 0.2}}
    near = good | {"kept": kept | {"forget_prob": 0.150004}}
    records = [record(100, 1e-4, **good), record(101, 1e-4, **gone), record(102, 1e-4, **near),
               record(100, 1e-3, diverged="step 3"),
               {"kind": "train", "status": "ok"}, record(102, 1e-4) | {"status": "failed"}]  # fmt: skip
    place = {"scenario": "author", "checkpoint": "fit", "method": "npo"}
    assert trial_rows(records) == [
        place | {"setting": {"optim.lr": 1e-4}, "seeds": [100, 101, 102], "reached": [True, False, False],
                 "kept": [40] * 3, "fall": [0.1, 0.9, 0.1], "damage": [0.15, 0.55, 0.15]},
        place | {"setting": {"optim.lr": 1e-3}, "seeds": [100], "reached": [False], "kept": [None], "fall": [None],
                 "damage": [1.0]},
    ]  # fmt: skip
