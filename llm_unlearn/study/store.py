"""Results of a study on disk: one atomic JSON per cell, and a lock-free way to see what is missing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from llm_unlearn.errors import UserError
from llm_unlearn.files import read_json, write_atomic
from llm_unlearn.study.matrix import Cell

SCHEMA_VERSION = 1
Status = Literal["ok", "censored", "failed"]


class Store:
    """The folder `<study>/cells`. A record's name is its cell's id, so a changed cell is another record and never a
    stale one.
    """

    def __init__(self, study: Path) -> None:
        self.folder = study / "cells"

    def write(
        self, cell: Cell, status: Status, result: Mapping[str, Any] | None = None, error: str = "", seconds: float = 0.0
    ) -> None:
        """Write a cell's record. "censored": the start checkpoint does not exist because the run never got there; that
        is a result.
        """
        record = {
            "schema_version": SCHEMA_VERSION, "id": cell.id, "kind": cell.kind, "label": cell.label, "spec": cell.spec,
            "status": status, "result": result, "error": error, "seconds": seconds, "environment": environment(),
            "design": cell.facts.get("design"),
        }  # fmt: skip
        write_atomic(self.folder / f"{cell.id}.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's record, or None. Raises UserError for a record of a newer schema."""
        path = self.folder / f"{cell.id}.json"
        if not path.exists():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or "schema_version" not in record:
            raise UserError(f"{path}: is no record of a cell; remove it, and run the study again")
        if record["schema_version"] > SCHEMA_VERSION:
            raise UserError(
                f"{path}: written by a newer version (schema {record['schema_version']}, this reads "
                f"{SCHEMA_VERSION}); update llm-unlearn"
            )
        return record

    def done(self, cell: Cell) -> bool:
        """Whether the cell has a result; failed cells run again."""
        record = self.read(cell)
        return record is not None and record["status"] != "failed"

    def ready(self, cells: Sequence[Cell]) -> list[int]:
        """Return the places of cells without a result whose trainings, if they wait for any, have one."""
        done = {cell.id for cell in cells if self.done(cell)}
        return [i for i, cell in enumerate(cells) if cell.id not in done and done.issuperset(cell.after)]

    def status(self, cells: Sequence[Cell]) -> dict[str, list[Cell]]:
        """Sort cells into ok, censored, failed and missing."""
        out: dict[str, list[Cell]] = {"ok": [], "censored": [], "failed": [], "missing": []}
        for cell in cells:
            record = self.read(cell)
            out[record["status"] if record else "missing"].append(cell)
        return out


def environment() -> dict[str, Any]:
    """Return what a result needs to be reproduced: versions, machine, threads. No names of users, hosts or folders."""
    names = ("llm-unlearn", "torch", "transformers", "accelerate", "numpy")
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "machine": machine(),
        "cores": os.cpu_count(),
    }


def machine() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
