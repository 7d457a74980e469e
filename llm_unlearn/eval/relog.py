"""OpenUnlearning's numbers computed anew from the rows of its log; runs no model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from llm_unlearn import __version__
from llm_unlearn.errors import UserError
from llm_unlearn.eval.compute import compute, logged_attack, values
from llm_unlearn.eval.peer_log import AUC_KEYS, ITEM_KEYS, SHORT, PeerLog
from llm_unlearn.eval.sources import check_same_rows
from llm_unlearn.eval.suite import Entry, Suite, SuiteConfig
from llm_unlearn.files import write_atomic

WHOLE = (
    Entry(metric="forget_quality", split="forget"),
    Entry(metric="privleak", split="forget", against="holdout"),
    Entry(metric="model_utility"),
)
LOGGED_REFERENCE = "mia_reference"  # its rows have the reference model's loss taken off already


def log_suite(log: PeerLog) -> Suite:
    """Return a suite of everything a log names, under the log's own names.

    Raises UserError for a log of which not one metric is known.
    """
    metrics: dict[str, Entry] = {}
    for split, short in SHORT.items():
        for metric, (key, field) in ITEM_KEYS.items():
            name = key.format(short)
            if "{}" in key and log.has(name) and field in ("prob", "rougeL_recall"):
                metrics[name] = Entry(metric=metric, split=split)
        name, aggregator = f"{short}_Truth_Ratio", "truth_ratio_true_better"
        if split == "forget":
            name, aggregator = "forget_truth_ratio", "truth_ratio_closer_to_1_better"
        if log.has(name):
            metrics[name] = Entry(metric=aggregator, split=split)
    for metric in ("extraction_strength_openunlearning", "exact_memorization"):
        if log.has(ITEM_KEYS[metric][0]):
            metrics[ITEM_KEYS[metric][0]] = Entry(metric=metric, split="forget")
    for name in AUC_KEYS.values():
        if log.has(name) and name != LOGGED_REFERENCE:
            metrics[name] = Entry(metric=name, split="forget", against="holdout")
    metrics |= {entry.metric: entry for entry in WHOLE if log.has(entry.metric)}
    if "forget_quality" in metrics:
        for name in ("forget_ks", "forget_effect_size"):
            metrics[name] = Entry(metric=name, split="forget")
    if not metrics:
        raise UserError(f"{log.path}: names no metric of OpenUnlearning; is it a TOFU_EVAL.json?")
    return Suite(SuiteConfig(name="log", metrics=dict(sorted(metrics.items()))))


def evaluate_log(path: Path, reference: Path | None = None, out: Path | None = None) -> dict[str, Any]:
    """Compute every aggregate of a log from its rows, with intervals the log does not have.

    Args:
        path: TOFU_EVAL.json of the model.
        reference: TOFU_EVAL.json of the model trained without the forget set; without it what is read against gold is
            null.
        out: folder for `results.json`; none is written without it.

    Raises UserError for a file that is no log, a metric without rows (named), and a reference of other rows.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    log = PeerLog(path)
    gold = None if reference is None else PeerLog(reference)
    if gold is not None:
        check_same_rows(log, gold, "forget")
    suite = log_suite(log)
    metrics = compute(suite, log, gold)
    if log.has(LOGGED_REFERENCE):
        metrics[LOGGED_REFERENCE] = logged_attack(LOGGED_REFERENCE, "reference_loss", log)
    for name, value in values(suite, gold, gold).items() if gold is not None else ():
        metrics[name]["gold"] = value
    result: dict[str, Any] = {
        "model": str(path),
        "suite": "log",
        "reference": None if reference is None else str(reference),
        "metrics": metrics,
        "identity": {
            "log": log.identity,
            "reference": None if gold is None else gold.identity,
            "suite": suite.digest,
            "code": __version__,
        },
        "cost": {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "forward_tokens": 0,
            "generated_tokens": 0,
        },
    }
    if out is not None:
        write_atomic(out / "results.json", (json.dumps(result, indent=1) + "\n").encode())
    return result
