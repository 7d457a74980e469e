"""What goes into the committed file of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.study.collect import declared, failures
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
