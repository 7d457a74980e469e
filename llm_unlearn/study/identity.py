"""What of a cell's spec is in its id: configs get new keys, and finished cells keep their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATER: dict[str, Any] = {
    "config.loss": "ce",
    "config.shuffle": "none",
    "config.distil": None,
    "config.sam": None,
    "config.spline": None,
    "config.orthogonality": None,
    "config.data.image.clusters": 2,
    "config.data.image.coarse": False,
    "config.data.image.gray": False,
    "config.data.image.normalise": "unit",
    "config.data.image.size": None,
    "config.data.image.test": None,
    "config.data.image.train": 400,
    "config.data.image.val": 0,
    "config.loop.timeout_s": 600.0,
    "config.model.alpha": 1.0,
    "config.model.net": None,
    "config.optim.decay": "matrices",
    "config.optim.momentum": 0.9,
    "config.optim.optimizer": "adamw",
    "config.scenario.classes": [],
    "config.scenario.early_epoch": 20.0,
    "config.scenario.grokked_below": 0.01,
    "config.scenario.late_epoch": 100.0,
    "config.scenario.match": [],
    "config.scenario.record": None,
    "config.scenario.share": None,
    "config.scenario.ungrokked_above": 0.5,
    "config.stop.by": "prob",
}
"""Key of a spec that came after the first studies -> the value at which a run is what it was before. A new key of a
config that a cell holds belongs here; without it every study would run again.
"""


def as_before(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a spec without the keys of `LATER` that have the value there, and without sections that held only such."""
    out: dict[str, Any] = {}
    for key, value in spec.items():
        place = prefix + key
        if place in LATER and value == LATER[place]:
            continue
        if isinstance(value, Mapping):
            known = as_before(value, f"{place}.")
            if value and not known:
                continue
            out[key] = known
        else:
            out[key] = value
    return out
