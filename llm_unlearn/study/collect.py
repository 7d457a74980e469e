"""What of a finished study goes into one small file, from which its tables can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.eval.outcome import Outcome, find_outcomes
from llm_unlearn.files import write_atomic
from llm_unlearn.study.matrix import Cell
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import Choice

MARKS = ("early", "t_fit", "t_gen", "stable_at", "post", "ratio", "phase")


def outcomes_of(cells: Sequence[Cell], store: Store) -> list[Outcome]:
    """Read the study's own finished cells; whatever else lies in its folders is of another study."""
    records = [store.read(cell) for cell in cells if cell.kind == "unlearn"]
    return find_outcomes([Path(r["result"]["folder"]) for r in records if r and r["status"] == "ok"])


def training_row(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """When a model memorised and generalised, if the record is of a training that ended."""
    if record["kind"] != "train" or record["status"] != "ok":
        return None
    report, result = record["result"]["report"], record["result"]
    marks = {key: report[key] for key in MARKS}
    return {"run": record["label"], **marks, "steps": result["step"], "cpu_seconds": result["cost"]["cpu_seconds"]}


def tuned_row(choice: Choice) -> dict[str, Any]:
    """What tuning chose for a method at a checkpoint, and how good it was."""
    score = None if choice.score is None else vars(choice.score)
    return {**vars(choice), "score": score}


def costs(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds by kind of cell; besides, the CPU-seconds of training in them, without evaluation and loading."""
    out: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(r["kind"] for r in records):
        done = [r for r in records if r["kind"] == kind and r["status"] == "ok"]
        run = [r["result"].get("run", r["result"]) for r in done]
        cpu = sum(r["cost"]["cpu_seconds"] for r in run if "cost" in r)
        out[kind] = {
            "cells": len(done),
            "seconds": round(sum(r["seconds"] for r in done), 1),
            "train_cpu_s": round(cpu),
        }
    return out


def failures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was never reached, and the last line of every error by cell."""
    return {
        "censored": sorted({r["error"] for r in records if r["status"] == "censored"}),
        "errors": {r["label"]: r["error"].strip().splitlines()[-1] for r in records if r["status"] == "failed"},
    }


def write_rows(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with one line per row of every table, so that a file of thousands of runs stays small and readable."""

    def dumped(value: Any, depth: int) -> str:
        inside, pad = depth < 3 and isinstance(value, (dict, list)) and value, " " * (depth + 1)
        if inside and isinstance(value, dict):
            rows = [f"{pad}{json.dumps(key)}: {dumped(part, depth + 1)}" for key, part in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{' ' * depth}}}"
        if inside and isinstance(value[0], dict):
            return "[\n" + ",\n".join(pad + dumped(part, 9) for part in value) + f"\n{' ' * depth}]"
        return json.dumps(value, separators=(",", ":"))

    write_atomic(path, (dumped(content, 0) + "\n").encode())
