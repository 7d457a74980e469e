"""Which cells a study wants, and which trainings they need: the main run, and controls with trainings of their own."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.eval.compare import MAIN
from llm_unlearn.eval.derived import DERIVED
from llm_unlearn.eval.outcome import AT_TARGET, KEPT_AT_LEVEL, UNTIL
from llm_unlearn.eval.primary import MIN_SEEDS, Primary
from llm_unlearn.eval.suite import Suite
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.study.config import Control, Extra, StudyConfig

SET_PER_CELL = ("seed", "out", "exclude", "scenario")
KINDS_BEFORE = {"fit": ("early", "fit"), "grok": ("early", "fit", "grok"), "post": ("early", "fit", "grok", "post")}
"""watch.until -> kinds that are there once it is reached."""
RESERVED = (*MAIN, "gold", "start", "last")


@dataclass(frozen=True)
class Wanted:
    """One thing to measure. `checkpoint` is a kind of the main run or the name of a control."""

    seed: int
    scenario: str
    checkpoint: str
    method: str

    @property
    def label(self) -> str:
        """Its cell's label."""
        return " ".join(part for part in (f"seed{self.seed}", self.scenario, self.checkpoint, self.method) if part)


def wanted(config: StudyConfig) -> list[Wanted]:
    """Return what a study measures, each once: the grid, then what `extra` adds."""
    return list(dict.fromkeys(Wanted(*place) for part in _parts(config) for place in itertools.product(*part)))


def trainings(config: StudyConfig) -> dict[tuple[int, str], dict[str, set[str]]]:
    """Return (seed, arm) -> scenarios that need its gold, each with the checkpoints that are wanted of both; by seed,
    the main run ("") first.
    """
    found: dict[tuple[int, str], dict[str, set[str]]] = {}
    for seeds, scenarios, checkpoints, _ in _parts(config):
        for seed, scenario, checkpoint in itertools.product(seeds, scenarios, checkpoints):
            arm = found.setdefault((seed, arm_of(config, checkpoint)), {})
            arm.setdefault(scenario, set()).add(checkpoint)
    seeds, arms = dict.fromkeys(seed for seed, _ in found), ("", *config.controls)
    return {(seed, arm): found[seed, arm] for seed in seeds for arm in arms if (seed, arm) in found}


def _parts(config: StudyConfig) -> list[tuple[Any, ...]]:
    """Return (seeds, scenarios, checkpoints, methods) of the grid and of every extra."""
    scenarios = config.grid_scenarios or tuple(config.scenarios) or ("",)
    grid = (config.seeds, scenarios, config.checkpoints, tuple(config.methods))
    own = ((part.seeds, part.scenarios, part.checkpoints, part.methods) for part in config.extra)
    return [grid, *(tuple(mine or usual for mine, usual in zip(part, grid, strict=True)) for part in own)]


def seeds_of(config: StudyConfig) -> tuple[int, ...]:
    """Return every seed of a study."""
    return tuple(dict.fromkeys(seed for seed, _ in trainings(config)))


def arms_of(config: StudyConfig) -> list[str]:
    """Return the arms that have to be trained, the main run ("") first."""
    used = {arm for _, arm in trainings(config)}
    return [arm for arm in ("", *config.controls) if arm in used]


def pairs_of(config: StudyConfig) -> list[tuple[str, str]]:
    """Return every (checkpoint, method) of a study, each once."""
    return list(dict.fromkeys((w.checkpoint, w.method) for w in wanted(config)))


def arm_of(config: StudyConfig, checkpoint: str) -> str:
    """Return the control that a checkpoint is taken of, "" for the main run."""
    return checkpoint if checkpoint in config.controls else ""


def taken(config: StudyConfig, checkpoint: str) -> str:
    """Return the checkpoint kind that stands for a checkpoint in the folder of its run."""
    return config.controls[checkpoint].take if checkpoint in config.controls else checkpoint


def training_of(config: StudyConfig, arm: str) -> dict[str, Any]:
    """Return the `grok` section of an arm as plain values: a control's changes over the study's own."""
    values = config.grok.model_dump()
    return merged(values, config.controls[arm].changes) if arm else values


def trained_until(config: StudyConfig, arm: str, checkpoints: Collection[str]) -> str:
    """Return the `watch.until` of a run that these checkpoints are taken of (see `StudyConfig.train`)."""
    until = training_of(config, arm)["watch"]["until"]
    # not to `fit`: `early` is chosen among evaluations up to the jump, which may come after it
    return "grok" if config.train == "needed" and not arm and until == "post" and "post" not in checkpoints else until


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with those of `changes` over them."""
    out = dict(base)
    for key, value in changes.items():
        below = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if below else value
    return out


def check_arms(config: StudyConfig, suite: Suite) -> None:
    """Refuse checkpoints, controls, extra cells and a primary contrast that cannot be. Raises UserError."""
    for name, control in config.controls.items():
        _check_control(config, name, control)
    lists = [("", Extra(checkpoints=config.checkpoints, scenarios=config.grid_scenarios))]
    lists += [(f"extra[{i}].", part) for i, part in enumerate(config.extra)]
    for where, part in lists:
        grid = "" if where else "grid_"
        _check_names(part.checkpoints, (*MAIN, *config.controls), f"{where}checkpoints", "checkpoint kind")
        _check_names(part.methods, config.methods, f"{where}methods", "method")
        _check_names(part.scenarios, config.scenarios, f"{where}{grid}scenarios", "scenario")
        _once(part.seeds, f"{where}seeds")
    _check_names(tuple(config.levels), config.scenarios, "levels", "scenario")
    if config.primary is not None:
        _check_primary(config, config.primary, suite)


def _check_control(config: StudyConfig, name: str, control: Control) -> None:
    where = f"controls.{name}"
    if name in RESERVED:
        raise UserError(f"{where}: '{name}' has a meaning of its own; choose another name")
    if control.match is not None:
        others = [other for other in (*MAIN, *config.controls) if other != name]
        _check_names((control.match,), others, f"{where}.match", "checkpoint")
    data = control.changes.get("data")
    fixed = [key for key in SET_PER_CELL if key in control.changes]
    if fixed or (isinstance(data, dict) and "seed" in data):
        raise UserError(f"{where}.changes: {fixed[0] if fixed else 'data.seed'} is set per cell; leave it out")
    grok = build_config(GrokConfig, training_of(config, name), f"{where}.changes")
    until = grok.watch.until
    there = KINDS_BEFORE.get(until, (*KINDS_BEFORE["post"], "last"))
    if control.take not in there:
        raise UserError(
            f"{where}: takes '{control.take}', and its training ends at watch.until={until}; "
            + ("set changes: {watch: {until: max_steps}}" if control.take == "last" else "let it train longer")
        )


def _check_primary(config: StudyConfig, primary: Primary, suite: Suite) -> None:
    _check_names(primary.methods, config.methods, "primary.methods", "method")
    scenarios = tuple(config.scenarios) or ("",)
    if primary.scenario not in scenarios:
        raise UserError(
            f"primary.scenario: '{primary.scenario}' is none of this study's"
            + (suggest(primary.scenario, scenarios) if config.scenarios else "; it has one scenario, leave it out")
        )
    base, _, versus = primary.measure.partition("~")
    whole = (KEPT_AT_LEVEL, *AT_TARGET, *UNTIL, *DERIVED)
    known = (*suite.config.metrics, *whole)
    if base not in known or versus not in ("", "gold", "drop") or (versus and base in whole):
        raise UserError(f"primary.measure: unknown measure '{primary.measure}'{suggest(base, known)}")
    _once(primary.contrasts, "primary.contrasts")
    cells = set(wanted(config))
    for method, pair in itertools.product(primary.methods, primary.contrasts):
        if pair[0] == pair[1]:
            raise UserError(f"primary.contrasts: {list(pair)} contrasts a checkpoint with itself")
        planned = [{w.seed for w in cells if (w.scenario, w.checkpoint, w.method) == (primary.scenario, k, method)}
                   for k in pair]  # fmt: skip
        if (common := len(planned[0] & planned[1])) < MIN_SEEDS:
            raise UserError(
                f"primary: {method} at {pair[0]} and {pair[1]} has {common} seeds in common, and a paired difference "
                f"needs {MIN_SEEDS}; list more seeds, or cells in extra"
            )


def _check_names(names: Sequence[str], known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            hint = suggest(name, known) if known else "; there are none"
            raise UserError(f"unknown {what} '{name}' in {where}{hint}")
    _once(names, where)


def _once(values: Sequence[Any], where: str) -> None:
    if len(set(values)) != len(values):
        raise UserError(f"{where} {list(values)} repeat; list each once")
