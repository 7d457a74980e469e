"""What a comparison has to know of an unlearning run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_unlearn.data.source import IMAGE_KINDS
from llm_unlearn.files import read_json, read_jsonl, write_atomic
from llm_unlearn.models.image_nets import NetConfig
from llm_unlearn.models.pretrained import split_reference

STUDY_FILE = "study.json"
"""In the folder of an unlearning run that a study made: what the study calls it."""


def comparison_facts(outcome: Mapping[str, Any], start_origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return method, checkpoint, seeds, request, end and cost of a finished run, the net if it is one of images, and
    how well its start model had learned: `start_train_acc` and `start_held_out_acc` (None where its run has no curve).

    `seed` is the one the start model was trained with: models are the unit of every statistic, and unlearning one model
    with three seeds is one unit, not three.

    Args:
        outcome: content of the run's `run.json`.
        start_origin: origin of the start model; {} for a model that is not ours, which then counts by unlearning seed.
    """
    config, step = outcome["origin"]["config"], start_origin.get("step")
    return {
        "method": outcome["method"],
        "checkpoint": outcome["origin"].get("start_kind") or "start",
        "seed": start_origin.get("config", {}).get("seed", config["seed"]),
        "start_step": step,
        **_architecture(start_origin.get("config", {})),
        **_start_accuracies(outcome["origin"].get("start"), step),
        "unlearn_seed": config["seed"],
        "request": outcome["origin"]["request"],
        **{key: outcome[key] for key in ("steps", "kept_step", "stop", "target", "cost")},
        **{key: outcome.get(key, []) for key in ("alarms", "kept_faults")},
    }


def write_study_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a study calls a run into its folder, so that whoever evaluates it again calls it the same."""
    write_atomic(folder / STUDY_FILE, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())


def study_facts(folder: Path) -> dict[str, Any]:
    """Return what a study calls the run of a folder; {} for a run of no study."""
    return read_json(folder / STUDY_FILE) if (folder / STUDY_FILE).exists() else {}


def _architecture(trained: Mapping[str, Any]) -> dict[str, str]:
    """Nets are told apart in a comparison; {} for a language model, and for a model that was made from another."""
    model = trained.get("model")
    if (
        (trained.get("data") or {}).get("kind") not in IMAGE_KINDS
        or not isinstance(model, Mapping)
        or model.get("name")
    ):
        return {}
    return {"architecture": (model.get("net") or {}).get("arch") or NetConfig().arch}


def _start_accuracies(start: str | None, step: int | None) -> dict[str, float | None]:
    lines = [] if start is None else read_jsonl(Path(split_reference(start)[0]) / "curve.jsonl")
    at = next((line for line in lines if line.get("step") == step), {})
    return {f"start_{key}": at.get(key) for key in ("train_acc", "held_out_acc")}
