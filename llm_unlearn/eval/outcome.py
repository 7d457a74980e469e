"""Evaluated unlearning runs, as a comparison reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm_unlearn.errors import UserError, suggest
from llm_unlearn.eval.derived import DERIVED, derive
from llm_unlearn.eval.reach import Time, first_at, time_to
from llm_unlearn.files import read_json, read_jsonl
from llm_unlearn.models.pretrained import split_reference

By = Literal["prob", "acc"]
Unit = Literal["updates", "seconds", "flops"]
UNTIL: dict[str, tuple[By, Unit]] = {
    "seconds_to_target": ("prob", "seconds"),
    "flops_to_target": ("prob", "flops"),
    "updates_to_gold_acc": ("acc", "updates"),
    "seconds_to_gold_acc": ("acc", "seconds"),
    "flops_to_gold_acc": ("acc", "flops"),
}
"""Times that a run which never got there does not have, beside those of `AT_TARGET`."""
DISTANCES = ("forget_acc", "forget_Q_A_Prob", "forget_inf_acc")
"""What a distance to gold is shown for: answering what was forgotten, its probability, and inferring from it."""
COLLAPSED_BELOW = 0.1  # retain accuracy, as a share of the start model's
LEAST_EXCESS = 0.1  # of a start model over gold, for a share of it to say anything
AT_TARGET = {"updates_to_target": "step", "retain_at_target": "retain_acc", "retain_inf_at_target": "retain_inf_acc"}
KEPT_AT_LEVEL = "kept_at_level"
"""`retain_acc@level`: retain accuracy of the model that the run delivers less what its forget probability (or accuracy,
as the target is read) lies above the target. At or below the target that is retain accuracy; a run that never got there
has the number too, and pays for it one for one, so that no seed is lost to a comparison (an analysis by intention to
treat, where `AT_TARGET` has only those who came).
"""


@dataclass(frozen=True)
class Outcome:
    """One evaluated unlearning run."""

    folder: Path
    method: str
    checkpoint: str
    seed: int
    metrics: Mapping[str, Mapping[str, Any]]
    trajectory: Sequence[Mapping[str, float]]
    target: float | None
    cost: Mapping[str, float | None]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]
    start_step: int | None = None
    """Step of the training the start model was taken at; None where it is not known."""
    request: str | None = None
    """Identity of the forget request; None where it is not known."""
    signs: Sequence[str] = ()
    """Signs that the model no longer speaks, as the evaluation found them."""
    stop: str | None = None
    """Why unlearning ended; None where it is not known."""
    kept_faults: Sequence[str] = ()
    """What the rules of stopping found wrong with the kept step: below_floor, over_forgotten."""
    architecture: str = ""
    """Name of the model's family; empty where the run does not say."""
    start_train_acc: float | None = None
    """Accuracy of the start model on its training questions, as its training saw it; None where that is not known."""
    start_held_out_acc: float | None = None
    """The same on questions it never saw."""
    control: bool = False
    """Whether it started from a control of a study, a training of its own."""
    match: str | None = None
    """Checkpoint whose accuracy a control's is meant to have."""
    scenario: str = ""
    """Name of the request in a study of several."""
    data: str = ""
    """Kind of the data it was evaluated on: image, world, tofu ...; empty where the results do not say."""
    primary: Mapping[str, Any] | None = None
    """The primary contrast as it was declared when the run was made."""
    target_by: By = "prob"
    """What had to come down to `target`: forget probability or forget accuracy."""

    @property
    def collapsed(self) -> bool:
        """Whether hardly anything above chance is left of what was to be kept: barred from ranking."""
        kept = self.metrics.get("retain_acc") or self.metrics.get("retain_Q_A_ROUGE") or {}
        chance = (self.metrics.get("retain_chance") or {}).get("value") or 0.0
        start, value = kept.get("start"), kept.get("value")
        if self.signs or not start or value is None or start <= chance:
            return bool(self.signs)
        return value - chance < COLLAPSED_BELOW * (start - chance)

    def number(self, name: str) -> float | None:
        """Return a metric's value, its distance to gold (`name~gold`), doing nothing's distance (`name~start`), by how
        much it fell from the start model's (`name~drop`), what is left of that by which the start model exceeds gold
        (`name~left`; None where that is less than `LEAST_EXCESS`), a measure of `DERIVED`, or a trajectory number.
        With `@level` behind it what the run did not forget counts against it one for one (`over_level`).
        """
        plain, at_level, _ = name.partition("@level")
        if at_level:
            value, over = self.number(plain), self.over_level()
            return None if value is None or over is None else value + (over if plain.endswith("~drop") else -over)
        base, _, versus = name.partition("~")
        if base in DERIVED:
            return derive(base, self.metrics).value
        if base == KEPT_AT_LEVEL:
            return self.number("retain_acc@level")
        if base in UNTIL:
            time = self.time_until(*UNTIL[base])
            return time.at if time is not None and time.reached else None
        if base in AT_TARGET:
            at = self.at_target()
            return None if at is None else at.get(AT_TARGET[base])
        line = self.metrics.get(base)
        if line is None:
            return None
        value, gold = line.get("start") if versus == "start" else line["value"], line.get("gold")
        if not versus:
            return value
        if versus == "left":
            excess = self.excess(base)
            if value is None or gold is None or excess is None or excess < LEAST_EXCESS:
                return None
            return (value - gold) / excess
        if versus == "drop":
            return None if value is None or line.get("start") is None else line["start"] - value
        return None if value is None or gold is None else abs(value - gold)

    def excess(self, name: str) -> float | None:
        """Return by how much the start model exceeds gold in a metric; None where one of the two is not known."""
        line = self.metrics.get(name) or {}
        start, gold = line.get("start"), line.get("gold")
        return None if start is None or gold is None else start - gold

    def distance(self, versus: Literal["gold", "start"] = "gold") -> float | None:
        """Return the mean of the distances to gold that a comparison shows (`DISTANCES`), or doing nothing's ("start");
        None where nothing has one.
        """
        found = [d for d in (self.number(f"{name}~{versus}") for name in DISTANCES) if d is not None]
        return float(np.mean(found)) if found else None

    def at_target(self) -> Mapping[str, float] | None:
        """Return the first evaluation at or below the target; None when it was never reached (censored)."""
        return None if self.target is None else first_at(self.trajectory, f"forget_{self.target_by}", self.target)

    def over_level(self) -> float | None:
        """Return by how much forget probability, or accuracy where the target is one, lies above the target (at least
        0); None where one of the two is not known.
        """
        forget = "forget_Q_A_Prob" if self.target_by == "prob" else "forget_acc"
        forgot = (self.metrics.get(forget) or {}).get("value")
        return None if forgot is None or self.target is None else max(0.0, forgot - self.target)

    def time_until(self, by: By = "prob", unit: Unit = "updates") -> Time | None:
        """Return when the run was first seen to have forgotten enough, or until when it had not.

        Args:
            by: "prob": down to the run's target, gold's forget probability plus its margin or what was given; "acc":
                down to gold's forget accuracy. Both on the rows that are watched on the way.
            unit: updates; seconds or FLOPs of training, in proportion to the updates. Passes of a reference model are
                in the FLOPs, evaluation on the way is in neither.

        Returns:
            None where the run was not watched, or the level or the cost is not known.
        """
        level = self.target if by == "prob" else (self.metrics.get("forget_acc") or {}).get("gold")
        cost = 1.0 if unit == "updates" else self._per_update(unit)
        if level is None or cost is None:
            return None
        key = f"forget_{self.target_by if by == 'prob' else by}"
        return time_to(self.trajectory, key, level, cost, self.stop not in (None, "max_steps", "edit"))

    def _per_update(self, unit: Unit) -> float | None:
        updates = self.cost.get("updates") or self.cost.get("steps")
        parts = ("train_seconds",) if unit == "seconds" else ("flops", "reference_flops")
        spent = [self.cost.get(part) for part in parts]
        if not updates or spent[0] is None:
            return None
        return sum(part or 0.0 for part in spent) / updates


def load_outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """Read every evaluated unlearning run at or below the paths, as `find_outcomes`. Raises UserError when there is
    none.
    """
    if found := find_outcomes(paths):
        return found
    raise UserError(
        f"no evaluated unlearning run below {', '.join(map(str, paths))}; run llm-unlearn eval on one first"
    )


def find_outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """Return every evaluated unlearning run at or below the paths, by folder; of several evaluations of a run the one
    with the most metrics of those of its newest weights, among equals the newest.

    Raises UserError for a path that does not exist and for a results.json that is not whole.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such folder or results.json; check the path")
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("results.json"))}
    newest: dict[Path, tuple[Any, int, Outcome]] = {}
    for file in sorted(files, key=lambda f: (f.stat().st_mtime_ns, f)):
        content = read_json(file)
        run = (content.get("run") if isinstance(content, dict) else None) or {}
        if "method" not in run or "checkpoint" not in run:
            continue  # of a model that was not unlearned, or no file of ours
        if missing := {"metrics", "answers"} - content.keys() or {"seed"} - run.keys():
            raise UserError(f"{file}: has no {' and no '.join(sorted(missing))}; evaluate the model again")
        folder, size = _run_folder(file, content), len(content["metrics"])
        weights = content.get("identity", {}).get("model")
        last = newest.get(folder)
        if last is None or weights != last[0] or size >= last[1]:
            newest[folder] = (weights, size, _outcome(folder, content, run))
    return [newest[folder][2] for folder in sorted(newest)]


def _run_folder(file: Path, content: Mapping[str, Any]) -> Path:
    """Folder of the run a results file tells of: around the results, or the model's when they were written elsewhere
    (`--out`).
    """
    if file.parent.name.startswith("eval-"):
        return file.parent.parent
    model = Path(split_reference(str(content.get("model", "")))[0])
    return next((place for place in (model, model.parent) if (place / "trajectory.jsonl").exists()), file.parent)


def _outcome(folder: Path, content: Mapping[str, Any], run: Mapping[str, Any]) -> Outcome:
    return Outcome(
        folder=folder,
        method=run["method"],
        checkpoint=run["checkpoint"],
        seed=run["seed"],
        metrics=content["metrics"],
        trajectory=read_jsonl(folder / "trajectory.jsonl"),
        target=run.get("target"),
        cost=run.get("cost", {}),
        answers=content["answers"],
        start_step=run.get("start_step"),
        request=run.get("request"),
        signs=content.get("collapse", ()),
        stop=run.get("stop"),
        kept_faults=run.get("kept_faults", ()),
        architecture=run.get("architecture") or "",
        start_train_acc=run.get("start_train_acc"),
        start_held_out_acc=run.get("start_held_out_acc"),
        control=bool(run.get("control")),
        match=run.get("match"),
        scenario=run.get("scenario") or "",
        data=content.get("data") or "",
        primary=run.get("primary"),
        target_by=run.get("target_by") or "prob",
    )


def of_scenario(outcomes: Sequence[Outcome], name: str) -> list[Outcome]:
    """Return the runs of one request of a study. Raises UserError when there is none."""
    if found := [o for o in outcomes if o.scenario == name]:
        return found
    known = sorted({o.scenario for o in outcomes} - {""})
    raise UserError(
        f"no run of scenario '{name}'" + (suggest(name, known) if known else "; these runs are of a study of one")
    )
