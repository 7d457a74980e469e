"""Running one cell: idempotent, and a record is written whatever happens."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.attacks.config import RelearnConfig
from llm_unlearn.attacks.relearn import relearn_beside
from llm_unlearn.config import build_config, digest
from llm_unlearn.data.source import open_corpus
from llm_unlearn.data.splits import draw_request
from llm_unlearn.errors import Diverged, TooEarly, UserError
from llm_unlearn.eval.evaluate import evaluate
from llm_unlearn.eval.suite import load_suite
from llm_unlearn.files import read_json, read_jsonl
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.phases import GROKKED
from llm_unlearn.grok.run import train_grok
from llm_unlearn.log import get_logger
from llm_unlearn.study.matrix import Cell
from llm_unlearn.study.store import Store
from llm_unlearn.train.snapshot import check_output
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.facts import comparison_facts, write_study_facts
from llm_unlearn.unlearn.run import run_unlearn
from llm_unlearn.unlearn.start import open_start

log = get_logger(__name__)


def check_ready(cells: Sequence[Cell]) -> None:
    """Refuse now what would fail in every cell: folders that hold another config's runs, data that cannot be opened, a
    forget set that cannot be drawn from it. Raises UserError.
    """
    training = [build_config(GrokConfig, cell.spec["config"]) for cell in cells if cell.kind == "train"]
    for config in training:
        check_output(Path(config.out), config, "grok")
    first = [config for config in training if config.seed == training[0].seed]
    for config in {digest([config.data, config.scenario]): config for config in first}.values():
        draw_request(open_corpus(config.data), config.scenario)


def run_cell(study: Path, cell: Cell) -> str:
    """Run a cell unless its result is there; return its status. An error becomes a "failed" record, no exception.
    Of a trial of tuning no weights are kept.

    "waiting" leaves no record: its training is not finished, or another process is at it (an array submitted twice).
    """
    store = Store(study)
    record = store.read(cell)
    if record is not None and record["status"] != "failed":
        return record["status"]
    started = time.perf_counter()
    try:
        missing = _missing_checkpoint(cell)
        if missing:
            store.write(cell, "censored", error=missing)
            return "censored"
        result = _run(cell)
    except TooEarly as error:
        log.error("%s has to wait: %s", cell.label, error)
        return "waiting"
    except UserError as error:
        store.write(cell, "failed", error=str(error), seconds=time.perf_counter() - started)
        log.error("%s failed: %s", cell.label, error)
        return "failed"
    except Exception as error:
        store.write(cell, "failed", error=traceback.format_exc(limit=5), seconds=time.perf_counter() - started)
        log.error("%s failed: %r", cell.label, error)
        return "failed"
    store.write(cell, "ok", result, seconds=time.perf_counter() - started)
    if cell.kind == "tune":  # now that the record holds what the trial is for
        for weights in ("final", "checkpoints", "adapter"):
            shutil.rmtree(Path(cell.spec["config"]["out"]) / weights, ignore_errors=True)
    return "ok"


def _missing_checkpoint(cell: Cell) -> str:
    """Say which training has no such checkpoint, or none of a grokked model; return an empty text if all is there.

    A control need not have grokked: it may be meant to generalise without delay, or never.
    """
    if cell.kind == "train":
        return ""
    for reference in (cell.spec["config"]["model"], cell.spec["config"]["gold"]):
        run, _, kind = reference.rpartition("@")
        if not (Path(run) / "run.json").exists():
            raise TooEarly(f"{run} is not trained yet; run the study's training cells first")
        if not (Path(run) / kind / "config.json").exists():
            return f"{run} never reached '{kind}'"
        if cell.spec["checkpoint"] in ("grok", "post", "fit_scaled", "fit_normed"):
            phase = read_json(Path(run) / "run.json")["report"]["phase"]
            if phase not in GROKKED:
                return f"{run} did not grok ({phase}): its '{kind}' is no grokked model"
    return ""


def _run(cell: Cell) -> dict[str, Any]:
    if cell.kind == "train":
        return train_grok(build_config(GrokConfig, cell.spec["config"]))
    return _try(cell) if cell.kind == "tune" else _unlearn_and_evaluate(cell)


def _try(cell: Cell) -> dict[str, Any]:
    """Run a trial of tuning: the updates and what is watched on the way, no evaluation."""
    config = build_config(UnlearnConfig, cell.spec["config"])
    out = Path(cell.spec["config"]["out"])
    try:
        outcome = run_unlearn(config)
    except Diverged as error:
        return {"diverged": str(error)}
    lines = read_jsonl(out / "trajectory.jsonl")
    return {
        "start": lines[0],
        "kept": next(line for line in reversed(lines) if line["step"] <= outcome["kept_step"]),
        **{key: outcome[key] for key in ("target", "steps", "kept_step", "cost")},
    }


def _unlearn_and_evaluate(cell: Cell) -> dict[str, Any]:
    config = build_config(UnlearnConfig, cell.spec["config"])
    outcome = run_unlearn(config)
    start = open_start(config.model, config.data, config.scenario)
    write_study_facts(Path(str(config.out)), cell.facts)
    facts = {**comparison_facts(outcome, start.origin), **cell.facts}
    others, told = {}, {}
    if (asked := cell.spec.get("relearn")) is not None and config.gold is not None:
        keep = Path(config.gold.rpartition("@")[0]) / "relearn"
        attack = build_config(RelearnConfig, asked)
        others, told["relearn"] = relearn_beside(str(config.out), config.gold, start, attack, keep)
    result = evaluate(
        str(config.out),
        load_suite(cell.spec["suite"]),
        start.corpus,
        start.request,
        fmt=start.data.format,
        gold=config.gold,
        start=config.model,
        run=facts,
        others=others,
    )
    return {
        "run": facts, "metrics": result["metrics"], "evaluation": result["cost"], "folder": str(config.out), **told
    }  # fmt: skip
