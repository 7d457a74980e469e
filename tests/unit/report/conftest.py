"""Outcomes and run folders made by hand, in the form that unlearning and evaluation leave on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.eval.outcome import Outcome

METRICS = {
    # name: (value, gold, do nothing)
    "forget_acc": (0.30, 0.10, 0.90),
    "forget_Q_A_Prob": (0.25, 0.20, 0.95),
    "forget_inf_acc": (0.40, 0.05, 0.80),
    "forget_trained_inf_acc": (0.45, 0.06, 1.00),
    "retain_acc": (0.85, 0.99, 1.00),
    "retain_inf_acc": (0.60, 0.70, 0.75),
    "model_utility": (0.70, 0.80, 0.82),
}
SHIFT = {"early": 0.05, "fit": 0.0, "grok": -0.15, "post": -0.12}


def answers(before: str = "It is Oslo.", after: str = "It is Rome.", gold: str = "It is Bern.") -> dict[str, Any]:
    def said(text: str) -> list[dict[str, Any]]:
        return [
            {
                "split": split,
                "question": f"{split} {i}?",
                "answer": "It is Oslo.",
                "generation": text,
                "probability": 0.5,
            }
            for split in ("forget", "retain")
            for i in range(3)
        ]

    return {"after": said(after), "gold": said(gold), "start": said(before)}


def outcome(
    method: str = "npo",
    checkpoint: str = "fit",
    seed: int = 0,
    *,
    reached: bool = True,
    folder: Path | None = None,
    texts: dict[str, Any] | None = None,
    **values: float,
) -> Outcome:
    metrics = {}
    for name, (value, gold, start) in METRICS.items():
        moved = value + SHIFT.get(checkpoint, 0.0) * name.startswith("forget") + 0.01 * seed
        metrics[name] = {"value": values.get(name, moved), "gold": gold, "start": start, "ci": None, "n": 20}
        metrics[name] |= {"unit": "share of items", "direction": "gold"}
    last = 0.2 if reached else 0.6
    trajectory = [
        {"step": step, "forget_prob": p, "retain_acc": r, "forget_acc": p, "retain_inf_acc": 0.5}
        for step, p, r in ((0, 0.95, 1.0), (20 + 2 * seed, (0.95 + last) / 2, 0.9), (60, last, 0.85))
    ]
    said = answers() if texts is None else texts
    return Outcome(
        folder or Path(f"{method}-{checkpoint}-{seed}"), method, checkpoint, seed, metrics, trajectory, 0.25, {}, said
    )


def study(
    seeds: Sequence[int], kinds: Sequence[str], methods: Sequence[str] = ("ga", "npo"), **kwargs: Any
) -> list[Outcome]:
    return [outcome(m, k, s, **kwargs) for s in seeds for k in kinds for m in methods]


def write_outcome(folder: Path, o: Outcome) -> None:
    run = {"method": o.method, "checkpoint": o.checkpoint, "seed": o.seed, "target": o.target, "cost": {}}
    (folder / "eval-final").mkdir(parents=True)
    results = {"model": "m", "suite": "s", "run": run, "metrics": o.metrics, "answers": o.answers}
    (folder / "eval-final" / "results.json").write_text(json.dumps(results))
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in o.trajectory))
    config = {"out": "x", "method": {"name": "npo", "params": {}, "retain": None}, "optim": {"lr": 0.001}}
    (folder / "run.json").write_text(json.dumps({"kind": "unlearn", "origin": {"config": config}}))


def write_grok(folder: Path, *, gold: bool = False, seed: int = 0, grokked: bool = True) -> None:
    steps = [25, 50, 100, 200, 400, 800, 1600]
    held = [0.0, 0.05, 0.1, 0.2, 0.3, 0.9, 1.0] if grokked else [0.0, 0.05, 0.1, 0.2, 0.3, 0.3, 0.3]
    train = [0.0, 0.3, 0.8, 1.0, 1.0, 1.0, 1.0]
    folder.mkdir(parents=True)
    lines = [
        {"step": s, "train_acc": t, "held_out_acc": h, "para_acc": t}
        for s, t, h in zip(steps, train, held, strict=True)
    ]
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 16')
    report = {
        "t_fit": 200, "t_gen": 800 if grokked else None, "stable_at": 800 if grokked else None, "early": 100,
        "post": 1600 if grokked else None, "ratio": 4.0 if grokked else None,
        "phase": "grok-weak" if grokked else "memorised", "events": [],
    }  # fmt: skip
    config = {"out": str(folder), "seed": seed, "exclude": "forget" if gold else "none", "data": {"seed": seed}}
    content = {"kind": "grok", "stop": "max_steps", "step": 1600, "report": report, "origin": {"config": config}}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text(f"# job: grok\nout: {folder.resolve()}\nseed: {seed}\n")


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    return outcome


@pytest.fixture
def make_study() -> Callable[..., list[Outcome]]:
    return study


@pytest.fixture
def make_answers() -> Callable[..., dict[str, Any]]:
    return answers


@pytest.fixture
def outcome_folder() -> Callable[[Path, Outcome], None]:
    return write_outcome


@pytest.fixture
def grok_folder() -> Callable[..., None]:
    return write_grok
