"""Everything a report is made of, read from the folders of runs and studies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import digest, flatten
from llm_unlearn.errors import UserError
from llm_unlearn.eval.compare import Comparison, compare
from llm_unlearn.eval.outcome import Outcome, find_outcomes, of_scenario
from llm_unlearn.files import read_json, read_jsonl
from llm_unlearn.grok.detector import GROKKED, KINDS
from llm_unlearn.study.matrix import CONTROLS

ABSOLUTE = re.compile(r"(: ['\"]?)/.*/([^/\n]*)$", re.MULTILINE)
"""A value of a config that is an absolute path; its last part is kept."""


@dataclass(frozen=True)
class GrokRun:
    """One finished grokking run: `name` is its folder below the path asked for."""

    folder: Path
    name: str
    seed: int
    gold: bool
    step: int
    stop: str
    report: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]

    @property
    def marks(self) -> dict[str, int]:
        """Kinds reached -> step."""
        return {kind: self.report[mark] for kind, mark in KINDS.items() if self.report.get(mark) is not None}

    @property
    def control(self) -> str | None:
        """Name of the control it is of, by its place in a study's folder; None for a main run."""
        above = self.folder.parent
        return above.name if above.parent.name == CONTROLS else None

    @property
    def generalised_at_once(self) -> bool:
        """Whether it generalised as it memorised, so that there is no later jump to date."""
        return self.report["phase"] == "comprehension"

    @property
    def asked(self) -> frozenset[str]:
        """Kinds it was to be trained up to."""
        until = (self.config.get("watch") or {}).get("until", "max_steps")
        return frozenset(list(KINDS)[: list(KINDS).index(until) + 1] if until in KINDS else KINDS)

    @property
    def grokked(self) -> bool:
        """Whether the detector calls what happened grokking."""
        return self.report["phase"] in GROKKED


@dataclass(frozen=True)
class ReportData:
    """What `report_data` found; `comparison` is by checkpoint, None without unlearning runs."""

    runs: tuple[GrokRun, ...]
    outcomes: tuple[Outcome, ...]
    comparison: Comparison | None
    configs: Mapping[str, str]
    """Name -> YAML text: the first training run's and the first unlearning run's config, free of the folders' place."""
    settings: Mapping[str, Mapping[str, Any]]
    """Method -> its resolved config, flat (`optim.lr`)."""
    environments: tuple[Mapping[str, Any], ...]
    failed: tuple[str, ...]
    """Labels of study cells that failed and were not mended since."""


def report_data(paths: Sequence[Path], scenario: str | None = None) -> ReportData:
    """Collect grokking runs, evaluated unlearning runs (of one scenario) and study records at or below the paths.

    Curves alone are a report too. Raises UserError for a path that does not exist, for a file that is no whole JSON,
    and when nothing is found.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such folder; give the folder of a run or a study")
    runs, outcomes = _grok_runs(paths), find_outcomes(paths)
    if scenario is not None:
        outcomes = of_scenario(outcomes, scenario)
    if not runs and not outcomes:
        raise UserError(f"nothing to report below {', '.join(map(str, paths))}: no finished grokking or unlearning run")
    records = [read_json(file) for path in paths for file in _measured(path, "cells/*.json")]
    environments = {digest(r["environment"]): r["environment"] for r in records if r.get("environment")}
    ended_well = {r["label"] for r in records if r["status"] != "failed"}
    return ReportData(
        tuple(runs),
        tuple(outcomes),
        compare(outcomes) if outcomes else None,
        _configs(paths, [*(r.folder for r in runs[:1]), *(o.folder for o in outcomes[:1])]),
        _settings(outcomes),
        tuple(environments.values()),
        tuple(sorted({r["label"] for r in records if r["status"] == "failed"} - ended_well)),
    )


def paired(runs: Sequence[GrokRun]) -> list[tuple[GrokRun | None, GrokRun | None]]:
    """Return (run, its gold) pairs, by name: same folder above and the same config but for what is excluded."""
    pairs: dict[tuple[Path, str], list[GrokRun | None]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in ("out", "exclude")}
        pairs.setdefault((run.folder.parent, digest(same)), [None, None])[int(run.gold)] = run
    return [(run, gold) for run, gold in pairs.values()]


def missing_kinds(data: ReportData) -> tuple[str, ...]:
    """Return the kinds of checkpoint of the main run nothing was unlearned from although something was from others."""
    if data.comparison is None:
        return ()
    return tuple(kind for kind in KINDS if kind not in data.comparison.groups)


def _measured(path: Path, pattern: str) -> list[Path]:
    """Return the files of a study or a run, those it was tuned on left out."""
    return [file for file in sorted(path.rglob(pattern)) if file.relative_to(path).parts[0] != "tune"]


def _grok_runs(paths: Sequence[Path]) -> list[GrokRun]:
    found: dict[Path, GrokRun] = {}
    for path in paths:
        for file in _measured(path, "run.json"):
            content = read_json(file)
            folder = file.parent
            if content.get("kind") != "grok" or folder.resolve() in found:
                continue
            config = content["origin"]["config"]
            found[folder.resolve()] = GrokRun(
                folder,
                folder.relative_to(path).as_posix() if folder != path else path.resolve().name,
                config["seed"],
                config["exclude"] == "forget",
                content["step"],
                content["stop"],
                content["report"],
                read_jsonl(folder / "curve.jsonl"),
                config,
            )
    return sorted(found.values(), key=lambda r: (r.folder.parent, r.seed, r.gold))


def _configs(paths: Sequence[Path], folders: Sequence[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for folder in folders:
        file = folder / "config.yaml"
        if not file.exists():
            continue
        text = file.read_text(encoding="utf-8")
        for path in paths:  # a page that is sent around should not tell where its author keeps files
            text = text.replace(f"{path.resolve()}/", "")
        texts[folder.name] = ABSOLUTE.sub(r"\1.../\2", text)
    return texts


def _settings(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for o in outcomes:
        file = o.folder / "run.json"
        if o.method not in settings and file.exists():
            settings[o.method] = flatten(read_json(file)["origin"]["config"])
    return settings
