"""The file that tuning writes and a study reads: settings per checkpoint and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from llm_unlearn.config import Config, load_config
from llm_unlearn.errors import UserError, suggest


class TunedEntry(Config):
    """What was chosen for a method at a checkpoint, and how good it was."""

    settings: dict[str, Any] = Field(description="Sections of an unlearning config, for example {optim: {lr: 1e-4}}.")
    feasible: bool = Field(
        description="Whether forgetting reached gold's level plus the margin with enough left; else the nearest."
    )
    shortfall: float = Field(description="Forget probability above that level, mean over seeds and scenarios.")
    damage: float = Field(description="Fall of the kept answers' probability, mean over direct and two-hop questions.")
    trials: int = Field(ge=1, description="Settings tried.")


class Tuned(Config):
    """The content of tuned.yaml: checkpoint -> method -> what to use, and what it was found on."""

    seeds: tuple[int, ...] = Field(min_length=1, description="Seeds that were tuned on: no study may measure these.")
    scenarios: tuple[str, ...] = Field((), description="Scenarios that were tuned on; empty: the study's only one.")
    updates: int = Field(ge=1, description="Most updates of a trial.")
    checkpoints: dict[str, dict[str, TunedEntry]] = Field(
        description="Checkpoint kind -> method -> settings, chosen over all scenarios together."
    )
    by_scenario: dict[str, dict[str, dict[str, TunedEntry]]] = Field(
        default_factory=dict,
        description="Scenario -> the same, chosen on it alone, which a study takes for it; others take the former.",
    )


def read_tuned(path: str, seeds: tuple[int, ...]) -> Tuned:
    """Read the file for a study of these seeds. Raises UserError for a file that is not there or not whole, and for one
    that was tuned on a seed of the study.
    """
    tuned = load_config(Tuned, Path(path))
    check_other_seeds(tuned.seeds, seeds, f"{path}: was tuned on")
    return tuned


def settings_for(tuned: Tuned, path: str, scenario: str, checkpoint: str, method: str) -> dict[str, Any]:
    """Return the settings of a method at a checkpoint, for a scenario. Raises UserError where the file has none: tuned
    methods beside untuned ones are no comparison.
    """
    methods = tuned.by_scenario.get(scenario, tuned.checkpoints).get(checkpoint)
    if methods is None:
        raise UserError(
            f"{path}: has no checkpoint '{checkpoint}'{suggest(checkpoint, tuned.checkpoints)}; tune it with "
            "llm-unlearn tune, or leave it out of checkpoints"
        )
    if method not in methods:
        raise UserError(
            f"{path}: has no settings of '{method}' at '{checkpoint}'{suggest(method, methods)}; tune it with "
            "llm-unlearn tune, or leave it out of methods"
        )
    return methods[method].settings


def check_other_seeds(tuned_on: tuple[int, ...], measured: tuple[int, ...], where: str) -> None:
    """Refuse to measure on what was tuned on. Raises UserError."""
    if both := sorted(set(tuned_on) & set(measured)):
        named = f"seed{'s' if len(both) > 1 else ''} {', '.join(map(str, both))}"
        raise UserError(
            f"{where} {named} of the study itself; tune on other "
            "seeds (tune.seeds), or the numbers are of what they were chosen on"
        )
