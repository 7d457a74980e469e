"""Files of results made by hand, in the form that the programs under benchmarks/ write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.packed import pack
from llm_unlearn.study.collect import write_rows

KINDS = ("early", "fit", "grok", "easy")
METHODS = ("ga", "npo", "rmu")
STEPS = {"early": 100, "fit": 200, "grok": 1000, "easy": 400}
PROBES = {  # by checkpoint: value at grok, elsewhere
    "alignment, ce: cos(all forget, all retain)": (0.5, 0.9),
    "cka_paper, layer 2: forget, retain": (0.2, 0.6),
    "local_complexity, retain: absolute r = 0.005": (8.0, 20.0),
    "norms, all: norm": (19.0, 21.0),
}


def primary(**changes: Any) -> dict[str, Any]:
    plain = {"measure": "kept_at_level", "methods": list(METHODS), "contrasts": [["grok", "fit"], ["grok", "easy"]],
             "scenario": "author", "bound": 0.05, "alpha": 0.05}  # fmt: skip
    return {**plain, **changes}


def outcome(
    seed: int, kind: str, method: str, kept: float, *, images: bool = False, reach: int = 20, scenario: str = "author"
) -> Outcome:
    """A run that comes down to its level after `reach` updates (never, if above 40) and keeps `kept`."""
    noise = np.random.default_rng([seed, len(kind), len(method)])
    acc = {"forget_acc": (0.3, 0.2, 1.0), "retain_acc": (kept, 1.0, 1.0), "forget_Q_A_Prob": (0.2, 0.2, 0.95)}
    text = {"forget_inf_acc": (0.4, 0.05, 0.8), "retain_inf_acc": (0.6, 0.7, 0.7), "relearn_acc": (0.3, 0.1, None)}
    acc |= {"test_acc": (0.8, 0.9, 0.9), "retain_chance": (0.1, 0.1, 0.1)} if images else text
    metrics = {}
    for name, (value, gold, start) in acc.items():
        moved = value if name in ("retain_acc", "forget_Q_A_Prob") else value + 0.02 * float(noise.standard_normal())
        metrics[name] = {"value": moved, "gold": gold, "start": start, "n": 200}
    path = [{"step": s, "forget_prob": 0.9 if s < reach else 0.2, "forget_acc": 1.0 if s < reach else 0.2,
             "retain_acc": 1.0 - (1.0 - kept) * s / 40, **({"test_acc": 0.9} if images else {})}
            for s in (0, 10, 20, 30, 40)]  # fmt: skip
    return Outcome(
        Path(f"{scenario}-{kind}-{method}-{seed}"), method, kind, seed, metrics, path, 0.25,
        {"updates": 40, "train_seconds": 4.0, "flops": 4e9, "cpu_seconds": 5.0}, {}, start_step=STEPS.get(kind, 500),
        request=f"r{seed}{scenario}", stop="max_steps", architecture="cnn" if images else "",
        start_train_acc=1.0, start_held_out_acc=0.4 if kind == "fit" else 0.95, control=kind == "easy",
        match="grok" if kind == "easy" else None, scenario=scenario, primary=primary(),
    )  # fmt: skip


def outcomes(
    more: Mapping[str, Sequence[float]], seeds: int = 10, *, images: bool = False, **reach: int
) -> list[Outcome]:
    """Runs from which grok keeps `more[checkpoint][method]` more than that checkpoint, give or take .01 by seed."""
    out = []
    for seed in range(seeds):
        noise = np.random.default_rng(seed)
        for kind in KINDS:
            for i, method in enumerate(METHODS):
                kept = 0.85 - (more[kind][i] if kind in more else 0.0) + 0.01 * float(noise.standard_normal())
                out.append(outcome(seed, kind, method, kept, images=images, reach=reach.get(kind, 20)))
    return out


def content(found: Sequence[Outcome], **changes: Any) -> dict[str, Any]:
    seeds = sorted({o.seed for o in found})
    names = sorted({o.scenario for o in found})
    trainings = [
        {"run": f"{arm}seed{s}", "phase": "grok", "ratio": 4.0 + 0.1 * s, "steps": steps, "cpu_seconds": 0.1 * steps,
         "flops": 1e7 * steps}
        for s in seeds for arm, steps in (("", 1000), ("easy/", 400))
    ]  # fmt: skip
    noise = np.random.default_rng(0)
    probes = [
        {"seed": s, "checkpoint": k, "lines": {
            n: [(at if k == "grok" else other) * (1 + 0.02 * float(noise.standard_normal())), 0.1, 0.9]
            for n, (at, other) in PROBES.items()}}
        for s in seeds for k in KINDS
    ]  # fmt: skip
    plain = {
        "what": "made by hand", "command": "python benchmarks/language.py",
        "designs": ["a" * 64], "cells": {"tuning": {"ok": 4}, "measured": {"ok": len(found)}},
        "study": {"seeds": seeds, "checkpoints": list(KINDS), "methods": {m: {} for m in METHODS}, "extra": [],
                  "scenarios": {n: {} for n in names}, "grid_scenarios": [], "primary": primary()},
        "left_out": [], "cost": {"train": {"cells": 4, "seconds": 100.0, "train_cpu_s": 90}},
        "trainings": trainings, "censored": [], "errors": {}, "tuned": [], "probes": probes,
        "outcomes": pack(found), "environment": {"machine": "a machine", "cores": 2},
    }  # fmt: skip
    return {**plain, **changes}


def images(found: Sequence[Outcome], arch: str = "cnn", **changes: Any) -> dict[str, Any]:
    told = {"data": "digits", "arch": arch, "arm": "main", "command": f"python benchmarks/vision.py --arch {arch}"}
    return {**content(found), **told, **changes}


def local() -> dict[str, Any]:
    def way(shift: float) -> dict[str, Any]:
        early, late = [0.3, 0.35, 0.32, 0.33], [0.5 + shift, 0.53 + shift, 0.51 + shift, 0.55 + shift]
        d = {"mean": -0.2, "lo": -0.25, "hi": -0.15, "n": 4, "p": 0.001}
        return {"seeds": [0, 1, 2, 3], "values": [early, late], "difference": d}

    lines = [
        {"measure": m, "method": "ga", "size": 50, "published": (0.344, 0.518) if m == "forget" else None,
         "as_published": way(0.0), "matched": way(-0.19)}
        for m in ("forget", "retain")
    ]  # fmt: skip
    groups = {"early_epoch": 18.0, "late_epoch": 40.0, "questions": {"local_grok": 197, "local_ungrok": 291},
              "matched_pairs": 98}  # fmt: skip
    return {"command": "python benchmarks/local_grokking.py", "lines": lines, "groups": groups, "draws": 4,
            "rule": {"grokked_below": 0.03, "ungrokked_above": 0.3}, "left_out": ["150 matched: there are 98"],
            "environment": {"machine": "a machine"}}  # fmt: skip


def pretrained() -> dict[str, Any]:
    ratio = {"mean": 0.5, "ci": [0.4, 0.6], "n": 3}
    line = {"arm": "pretrained", "to": "t_gen", "reached": 3, "of": 3, "updates": 1200.0, "flops": 1e12,
            "cpu_seconds": 100.0, "updates_ratio": ratio, "flops_ratio": ratio, "cpu_seconds_ratio": ratio}  # fmt: skip
    command = "python benchmarks/pretrained_start.py"
    rows = [
        {"seed": s, "arm": "pretrained", "phase": "grok", "held_out_at_fit": 0.5, "held_out_best": 1.0}
        for s in range(3)
    ]
    rows.append({"seed": 0, "arm": "scratch, distilled", "error": "no teacher"})
    brought = [
        {"seed": s, "arm": arm, "checkpoint": kind, "values": {"npo, kept_at_level": [kept + s / 100, 0.01]}}
        for arm, kind, kept in (("scratch", "fit", 0.6), ("scratch", "grok", 0.8), ("pretrained", "grok", 0.7))
        for s in range(3)
    ]
    brought += [{"seed": 0, "arm": "scratch, distilled", "checkpoint": "grok", "error": "never reached"}]
    return {
        "command": command,
        "lines": [line],
        "rows": rows,
        "brought": brought,
        "environment": {"machine": "a machine"},
    }


def write(folder: Path, **files: Mapping[str, Any]) -> Path:
    """Write `NAME=content` as NAME.json; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if "outcomes" in value:
            write_rows(folder / f"{name}.json", value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
