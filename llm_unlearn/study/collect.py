"""What of a finished study goes into one small file, from which its tables can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.config import digest
from llm_unlearn.errors import UserError
from llm_unlearn.eval.outcome import Outcome, find_outcomes
from llm_unlearn.eval.packed import pack
from llm_unlearn.files import write_atomic
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import Cell
from llm_unlearn.study.store import Store, environment
from llm_unlearn.study.tune import DIVERGED, Choice, Score, draw_of

MARKS = ("early", "t_fit", "t_gen", "stable_at", "post", "ratio", "phase")
ELSEWHERE = "DIR"
"""Stands in a file of results for where given data lies on the machine that made it."""
TRIED = ("seeds", "reached", "kept", "fall", "damage")
"""What is told of a setting that was tried, by tuning seed."""
DECIDED = ("start_step", "steps", "kept_step", "stop", "target", "kept_faults")
"""What is in a digest of an unlearning run besides every metric: no times, no folders."""


def study_content(
    study: StudyConfig, cells: Sequence[Cell], found: Sequence[Choice], left_out: Sequence[str], store: Store
) -> dict[str, Any]:
    """Return what the file of results holds of a study that has run, of tuning too: how it was declared, what its
    cells took and came to, and every outcome.

    Args:
        study: as it was measured.
        cells: of tuning and of the study; those without a record do not count.
        found: what tuning chose.
        left_out: checkpoints and methods that the study was declared with and is without.
    """
    records = [record for cell in cells if (record := store.read(cell))]
    return {
        "designs": sorted({str(r["design"]) for r in records if r.get("design")}),
        "study": declared(study),
        "left_out": list(left_out),
        "cost": costs(records),
        "trainings": [row for r in records if (row := training_row(r))],
        **failures(records, store.folder.parent),
        "unreached": sorted(r["label"] for r in records if r["status"] == "censored" and r["kind"] == "unlearn"),
        "tuned": [tuned_row(choice) for choice in found],
        "trials": trial_rows(records),
        "digests": {r["label"]: result_digest(r) for r in records if r["status"] == "ok" and r["kind"] == "unlearn"},
        "outcomes": pack(outcomes_of(cells, store)),
        "environment": environment(),
    }


def declared(study: StudyConfig) -> dict[str, Any]:
    """Return a study as plain values, without what is of this machine: its folders, and where given data lies."""
    values = study.model_dump(mode="json", exclude={"out", "tuned", "design"})
    parts = [values["grok"], *(control["changes"] for control in values["controls"].values())]
    for data in (part.get("data") for part in parts):
        for key in {"path", "forget_path"} & (data or {}).keys():
            data[key] = data[key] and ELSEWHERE
    return values


def result_digest(record: Mapping[str, Any]) -> str:
    """Return 16 hex digits of what the record of a finished unlearning cell says but for times and places: the same
    where every metric, gold's and doing nothing's, is the same to the last bit, which rests on all of their weights.
    Intervals are left out: they follow from the same answers, and a later version may reckon them otherwise.
    """
    result = record["result"]
    run = {key: result["run"][key] for key in DECIDED if key in result["run"]}
    metrics = {name: {k: v for k, v in line.items() if k != "ci"} for name, line in result["metrics"].items()}
    return digest({"run": run, "metrics": metrics, "relearn": result.get("relearn")})[:16]


def outcomes_of(cells: Sequence[Cell], store: Store) -> list[Outcome]:
    """Read the study's own finished cells; whatever else lies in its folders is of another study."""
    records = [store.read(cell) for cell in cells if cell.kind == "unlearn"]
    return find_outcomes([Path(r["result"]["folder"]) for r in records if r and r["status"] == "ok"])


def training_row(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """When a model memorised and generalised and what it took, if the record is of a training that ended."""
    if record["kind"] != "train" or record["status"] != "ok":
        return None
    report, result = record["result"]["report"], record["result"]
    marks, cost = {key: report[key] for key in MARKS}, result["cost"]
    flops = None if cost.get("flops") is None else cost["flops"] + (cost.get("reference_flops") or 0)
    spent = {"cpu_seconds": cost["cpu_seconds"], "flops": flops}
    return {"run": record["label"], **marks, "steps": result["step"], **spent}


def tuned_row(choice: Choice) -> dict[str, Any]:
    """What tuning chose for a method at a checkpoint, and how good it was."""
    score = None if choice.score is None else vars(choice.score)
    return {**vars(choice), "score": score}


def choices_in(content: Mapping[str, Any], where: str) -> list[Choice]:
    """Return what tuning chose as a file of results tells it (`tuned_row`). Raises UserError where it does not."""
    try:
        rows = [{**row, "score": row["score"] and Score(**row["score"])} for row in content.get("tuned") or ()]
        return [Choice(**row) for row in rows]
    except (TypeError, KeyError):
        raise UserError(f"{where}: its rows of tuning cannot be read; make the file again") from None


def trial_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per setting that tuning tried for a method at a checkpoint, with what came of it by tuning seed: whether it
    `reached` the forget level with as much left as `stop.floor` asks, the step kept, the `fall` of the kept answers'
    probability there, and `damage`, by which tuning chose (the mean fall of what is kept and held out, `tune.Draw`).
    Step and fall are None of a run that broke down.
    """
    rows: dict[str, dict[str, Any]] = {}
    for r in records:
        if r["kind"] != "tune" or r["status"] != "ok":
            continue
        spec, result = r["spec"], r["result"]
        draw = draw_of(result, spec["config"]["stop"]["floor"])
        place = {key: spec[key] for key in ("scenario", "checkpoint", "method")} | {"setting": spec["trial"]}
        row = rows.setdefault(digest(place), place | {key: [] for key in TRIED})
        whole = draw != DIVERGED
        told = {
            "seeds": spec["seed"],
            "reached": whole and draw.excess <= 0 and draw.enough,
            "kept": result["kept_step"] if whole else None,
            "fall": round(result["start"]["retain_prob"] - result["kept"]["retain_prob"], 5) if whole else None,
            "damage": round(draw.damage, 5),
        }
        for key, value in told.items():
            row[key].append(value)
    return list(rows.values())


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


def failures(records: Sequence[Mapping[str, Any]], study: Path) -> dict[str, Any]:
    """What was never reached, and the last line of every error by cell; files are told from the study's folder on."""

    def told(error: str) -> str:
        return error.strip().splitlines()[-1].replace(f"{study}/", "")

    return {
        "censored": sorted({told(r["error"]) for r in records if r["status"] == "censored"}),
        "errors": {r["label"]: told(r["error"]) for r in records if r["status"] == "failed"},
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
