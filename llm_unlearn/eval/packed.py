"""Outcomes of a whole study in one small file, from which every table can be made again without its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.config import digest
from llm_unlearn.errors import UserError
from llm_unlearn.eval.outcome import Outcome

SCHEMA_VERSION = 1
SERIES = ("step", "forget_prob", "forget_acc", "retain_acc", "retain_inf_acc", "test_acc")
"""What is kept of a trajectory."""
BESIDE = ("gold", "start", "n")
"""What is kept of a metric besides its value: the same for all methods at one place."""
PLACE = ("scenario", "architecture", "seed", "checkpoint", "control", "match", "start_step", "start_train_acc",
         "start_held_out_acc", "request", "target", "target_by")  # fmt: skip
DIGITS = 6


def pack(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return outcomes as plain JSON values: `places` (model, request, gold's and doing nothing's numbers, one list per
    key of `BESIDE`), and `runs`, each at the number of a place.

    Kept is what `Outcome.number` and the tables read: values to 6 decimals, no intervals of single runs, no answers.
    Metrics stand in the order of `metrics`; a run without one has null there.
    """
    names = list(dict.fromkeys(name for o in outcomes for name in o.metrics))
    numbers: dict[str, int] = {}
    declared = {digest(o.primary): o.primary for o in outcomes if o.primary}
    places, runs = [], []
    for o in outcomes:
        place = _place(o, names)
        key = digest(place)
        if key not in numbers:
            numbers[key] = len(places)
            places.append(place)
        primary = list(declared).index(digest(o.primary)) if o.primary else None
        runs.append({**_run(o, numbers[key], names), "primary": primary})
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics": names,
        "primary": [dict(primary) for primary in declared.values()],
        "places": places,
        "runs": runs,
    }


def unpack(content: Mapping[str, Any], where: str = "packed outcomes") -> list[Outcome]:
    """Return the outcomes that `pack` was given, in their order; folders are names that lead nowhere.

    Raises UserError for what is none of it, or of a newer version.
    """
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema {version}, this version reads {SCHEMA_VERSION}; make the file again")
    return [_outcome(run, content) for run in content["runs"]]


def _place(o: Outcome, names: Sequence[str]) -> dict[str, Any]:
    place = {name: _short(getattr(o, name)) for name in PLACE}
    return place | {key: [_short((o.metrics.get(name) or {}).get(key)) for name in names] for key in BESIDE}


def _run(o: Outcome, place: int, names: Sequence[str]) -> dict[str, Any]:
    keys = [key for key in SERIES if any(key in line for line in o.trajectory)]
    return {
        "place": place,
        "method": o.method,
        "values": [_short((o.metrics.get(name) or {}).get("value")) for name in names],
        "has": [int(name in o.metrics) for name in names] if len(o.metrics) < len(names) else None,
        "trajectory": {key: [_short(line.get(key)) for line in o.trajectory] for key in keys},
        "cost": {key: _short(value) for key, value in o.cost.items() if value},
        "stop": o.stop,
        "kept_faults": list(o.kept_faults),
        "signs": list(o.signs),
    }


def _outcome(run: Mapping[str, Any], content: Mapping[str, Any]) -> Outcome:
    place = content["places"][run["place"]]
    has = run["has"] or [1] * len(content["metrics"])
    metrics = {
        name: {"value": run["values"][i], **{key: place[key][i] for key in BESIDE}}
        for i, name in enumerate(content["metrics"])
        if has[i]
    }
    series = run["trajectory"]
    rows = zip(*series.values(), strict=True)
    trajectory = [{key: v for key, v in zip(series, row, strict=True) if v is not None} for row in rows]
    folder = Path(place["scenario"] or ".", place["architecture"], place["checkpoint"], run["method"])
    return Outcome(
        folder=folder / f"seed{place['seed']}",
        method=run["method"],
        metrics=metrics,
        trajectory=trajectory,
        cost=run["cost"],
        answers={},
        stop=run["stop"],
        kept_faults=run["kept_faults"],
        signs=run["signs"],
        primary=None if run["primary"] is None else content["primary"][run["primary"]],
        **{name: place[name] for name in PLACE if name in place},
    )


def _short(value: Any) -> Any:
    """Both sides of every comparison are rounded alike, so what was equal stays equal."""
    return round(value, DIGITS) if isinstance(value, float) else value
