"""What goes into the committed file of a study."""

from __future__ import annotations

from pathlib import Path

from llm_unlearn.study.collect import failures


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
