"""Studies that come with the package."""

from __future__ import annotations

from pathlib import Path

from llm_unlearn.config import build_config
from llm_unlearn.study.config import StudyConfig

TOY = {
    "model": {"size": "nano"},
    "optim": {"lr": 3e-3},
    "loop": {"max_steps": 400, "batch_size": 64, "threads": 1},
    "scenario": {"size": 2},
}


VISION = {
    "suite": "vision",
    "checkpoints": ["fit", "fit_scaled", "grok", "easy"],
    "controls": {
        "easy": {
            "take": "last",
            "match": "grok",
            "changes": {"model": {"net": {"alpha": 1}}, "loop": {"max_steps": 1500}, "watch": {"until": "max_steps"}},
        }
    },
    "methods": {"finetune": {}, "neggrad_plus": {}, "nabla_tau": {}, "scrub": {}, "salun": {}},
    "grok": {
        "data": {"kind": "digits"},
        "scenario": {"kind": "class", "size": 2, "share": 0.5},
        "model": {"net": {"arch": "cnn", "alpha": 16}},
        "optim": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.999], "warmup": 0, "clip": 0, "decay": "all"},
        "loop": {"max_steps": 6000, "batch_size": 100, "threads": 1},
        "watch": {"thresholds": "vision", "until": "grok"},
    },
    "unlearn": {
        "optim": {"lr": 3e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "warmup": 0},
        "loop": {"max_steps": 60, "batch_size": 40, "threads": 1},
        "stop": {"every": 5, "items": 400},
    },
}


def vision(out: Path, seed: int) -> StudyConfig:
    """Return the quickstart's study of images: digits, a small CNN, half of two classes forgotten, five methods."""
    return build_config(StudyConfig, {"out": str(out), "seeds": (seed,), **VISION}, "quickstart --vision")


def quickstart(out: Path, seed: int, preset: str) -> StudyConfig:
    """Return the quickstart's study: one seed, four checkpoints, every method, on a preset of the embedded world."""
    grok = {"data": {"preset": preset}, "loop": {"threads": 1}, **(TOY if preset == "world12" else {})}
    return build_config(StudyConfig, {"out": str(out), "seeds": (seed,), "grok": grok}, "quickstart")
