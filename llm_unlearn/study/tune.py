"""Tuning with equal budgets: which trials there are, how one is judged, which settings are taken.

Trials are cells of the study's store, run by the same runner; their models and golds are trained on seeds of their own,
which draw other worlds and other forget sets than those the study measures; from data that is given (`data.path`, TOFU)
only other forget sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.config import build_config, digest, dump_config
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.data.splits import Scenario, draw_request
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.methods.table import METHODS
from llm_unlearn.seeding import rng
from llm_unlearn.study.arms import (
    Wanted,
    arm_of,
    arms_of,
    pairs_of,
    seeds_of,
    training_of,
    trainings,
    wanted,
)
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.identity import as_before
from llm_unlearn.study.matrix import (
    Cell,
    Place,
    check_once,
    check_study,
    known_method,
    make_cell,
    method_values,
    place_of,
    training_cells,
    unlearn_config,
)
from llm_unlearn.study.search import Setting, axes, has_learning_rate, nested, settings
from llm_unlearn.study.store import Store
from llm_unlearn.study.tuned import Tuned, TunedEntry, check_other_seeds
from llm_unlearn.train.origin import request_digest
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.stopping import left

KEPT = ("retain_prob", "retain_inf_prob", "val_prob", "test_prob")  # test_prob only without val_prob
WORLDS = ("world", "ledger")  # drawn by their seed, and slow to make


@dataclass(frozen=True)
class Draw:
    """How a setting did on one seed and scenario, at the step that the run kept, as shares of one: forget probability
    above the target (at most 0: reached), the mean fall of the kept answers' probability, and whether as much is left
    as the run's own `stop.floor` asks.
    """

    excess: float
    damage: float
    enough: bool = True


DIVERGED = Draw(1.0, 1.0, False)  # nothing is left of such a model


@dataclass(frozen=True)
class Score:
    """A setting over all draws: means of what was missing to the target (0 where it was reached) and of the damage, and
    whether more than half of the draws reached it with enough left.
    """

    shortfall: float
    damage: float
    feasible: bool
    draws: int


@dataclass(frozen=True)
class Choice:
    """What tuning found for a method at a checkpoint; None where no trial has a result (its checkpoint was never
    reached, or every trial failed). `scenario` is empty where the draws of all scenarios are taken together.
    """

    scenario: str
    checkpoint: str
    method: str
    setting: Setting | None
    score: Score | None
    trials: int
    feasible_trials: int


def plan_tuning(config: StudyConfig) -> list[Cell]:
    """Return the cells of tuning in a fixed order: models and golds of the tuning seeds, then every trial.

    Trials have the same number of updates and there are equally many per method and checkpoint (`search.settings`); of
    an edit in one go, which takes none, all that there are.
    Raises UserError for what `plan` refuses, for a tuning seed that is one of the study's, for a forget request that is
    one of the study's, and for an unknown scenario.
    """
    check_study(config)
    check_once(config.tune.seeds, "tune.seeds")
    check_other_seeds(config.tune.seeds, seeds_of(config), "tune.seeds: has")
    for name in config.tune.scenarios:
        if name not in config.scenarios:
            raise UserError(f"unknown scenario '{name}' in tune.scenarios{suggest(name, config.scenarios)}")
    grids = {name: trials_of(config, name) for name in config.methods}
    apart = config.model_copy(update={"out": str(Path(config.out) / "tune")})
    pairs = _tuned_pairs(config)
    trained = {
        (seed, arm): training_cells(apart, seed, kinds, arm)
        for seed in config.tune.seeds
        for arm in arms_of(config)
        if (kinds := _kinds_of(config, arm, pairs))
    }
    trials = [
        _trial_cell(apart, place_of(apart, w, trained[seed, arm_of(config, checkpoint)]), name, setting)
        for seed in config.tune.seeds
        for scenario, found in pairs.items()
        for checkpoint, name in found
        for w in [Wanted(seed, scenario, checkpoint, name)]
        for setting in grids[name]
    ]
    for arm in arms_of(config):
        tuning = [gold for (_, a), (_, golds) in trained.items() if a == arm for gold in golds.values()]
        _check_other_requests(config, arm, tuning)
    return [*(cell for model, golds in trained.values() for cell in (model, *golds.values())), *trials]


def _tuned_pairs(config: StudyConfig) -> dict[str, list[tuple[str, str]]]:
    """Scenario that is tuned on -> the (checkpoint, method) that the study measures there, or where nothing is tuned
    on: those use what all scenarios together say.
    """
    tuned_on = config.tune.scenarios or tuple(config.scenarios) or ("",)
    cells = wanted(config)
    found = {
        s: {(w.checkpoint, w.method) for w in cells if w.scenario == s or w.scenario not in tuned_on} for s in tuned_on
    }
    return {s: [pair for pair in pairs_of(config) if pair in found[s]] for s in tuned_on if found[s]}


def _kinds_of(config: StudyConfig, arm: str, pairs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, list[str]]:
    """Scenario -> the checkpoints of an arm that are tuned on it."""
    found = {s: [kind for kind, _ in of if arm_of(config, kind) == arm] for s, of in pairs.items()}
    return {s: list(dict.fromkeys(kinds)) for s, kinds in found.items() if kinds}


def _check_other_requests(config: StudyConfig, arm: str, tuning: Sequence[Cell]) -> None:
    """Refuse to tune an arm on what the study forgets. Raises UserError."""
    data = build_config(DataConfig, training_of(config, arm)["data"])
    if _drawn_by_seed(data, config.seeds[0], config.tune.seeds[0]):
        return
    corpus = open_corpus(data)

    def request(gold: Cell) -> str:
        return request_digest(corpus, draw_request(corpus, build_config(Scenario, gold.spec["config"]["scenario"])))

    golds = [
        gold
        for (seed, a), kinds in trainings(config).items()
        if a == arm
        for gold in training_cells(config, seed, kinds, arm)[1].values()
    ]
    measured = {request(gold): gold.label for gold in reversed(golds)}
    for gold in tuning:
        if (same := measured.get(request(gold))) is not None:
            raise UserError(
                f"tuning's {gold.label} forgets the same as the study's {same}: the data is one for all seeds, and the "
                "scenario draws no other request from it; tune on another scenario (tune.scenarios)"
            )


def _drawn_by_seed(data: DataConfig, a: int, b: int) -> bool:
    """Whether other seeds have other data. Worlds have; of anything else two draws are looked at."""
    if data.path is None and data.kind in WORLDS:
        return True
    drawn = (open_corpus(data.model_copy(update={"seed": seed})).identity for seed in (a, b))
    return len(set(drawn)) == 2


def trials_of(config: StudyConfig, name: str) -> list[Setting]:
    """Return the settings that are tried for a method of the study, the same ones at every checkpoint and seed: as many
    as `tune.trials` (all that there are of a method with a learning rate of its own and a smaller grid), or all of an
    edit in one go, which takes no updates.
    """
    section = method_values(config, name)["method"]
    if not isinstance(section, Mapping):
        raise UserError(f"study method {name}: method must be a section (key: value), got {section!r}")
    known_method(section["name"], "methods")
    method, tune = METHODS[section["name"]], config.tune
    given = build_config(MethodConfig, section, f"study method {name}: method")
    if any(lr <= 0 for lr in tune.lrs) or len(set(tune.lrs)) != len(tune.lrs):
        raise UserError(f"tune.lrs={list(tune.lrs)}: want different learning rates above 0")
    own = config.methods[name].get("optim")
    is_set = isinstance(own, Mapping) and "lr" in own
    steps = has_learning_rate(method, given)
    lrs, wanted = tune.lrs if steps and not is_set else (), tune.trials if steps else None
    return settings(axes(method, given), lrs, wanted, rng(tune.draw, "tune", name))


def _trial_cell(config: StudyConfig, place: Place, name: str, setting: Setting) -> Cell:
    updates = config.tune.updates or config.unlearn.loop.max_steps
    changes = nested({**setting, "loop.max_steps": updates})
    # named by what is tried, so that other trials never find its folder taken
    base = as_before(method_values(config, name), "config.")
    folder = digest({"changes": changes, "base": base, "seeds": place.seed})[:12]
    checked = unlearn_config(config, place, name, changes, Path(config.out) / "trials" / place.folder / name / folder)
    spec = {
        "config": checked.model_dump(mode="json"),
        "seed": place.seed,
        "checkpoint": place.checkpoint,
        "method": name,
        "scenario": place.scenario,
        "trial": setting,
    }
    told = " ".join(f"{key.rsplit('.', 1)[-1]}={value:g}" for key, value in setting.items())
    return make_cell(
        "tune", f"tune {place.label} {name} {told}".rstrip(), spec, (place.model.id, place.gold.id), place.model.facts
    )


def draw_of(result: Mapping[str, Any], floor: float | None = None) -> Draw:
    """Return what the result of a trial's cell says; `floor` is that of `StopConfig`."""
    if "diverged" in result:
        return DIVERGED
    start, kept = result["start"], result["kept"]
    read = [name for name in KEPT if name in kept and not (name == "test_prob" and "val_prob" in kept)]
    falls = [start[name] - kept[name] for name in read]
    enough = left(kept, start) >= (floor or 0.0)
    found = Draw(kept[f"forget_{result.get('target_by', 'prob')}"] - result["target"], sum(falls) / len(falls), enough)
    return found if math.isfinite(found.excess) and math.isfinite(found.damage) else DIVERGED


def score(draws: Sequence[Draw]) -> Score:
    """Return what a setting did over its draws (seeds x scenarios)."""
    reached = sum(draw.excess <= 0 and draw.enough for draw in draws)
    shortfall = float(np.mean([max(0.0, draw.excess) for draw in draws]))
    return Score(shortfall, float(np.mean([draw.damage for draw in draws])), 2 * reached > len(draws), len(draws))


def best(scores: Sequence[Score]) -> int:
    """Return which setting is taken: of the feasible ones that with the least damage; if there is none, the one with
    the least shortfall and damage together: forgetting by destroying the model is no nearer than not forgetting. The
    first of equals wins.
    """
    feasible = [i for i, found in enumerate(scores) if found.feasible]
    if feasible:
        return min(feasible, key=lambda i: scores[i].damage)
    return min(range(len(scores)), key=lambda i: scores[i].shortfall + scores[i].damage)


def choices(config: StudyConfig, cells: Sequence[Cell], store: Store) -> list[Choice]:
    """Return what was found for every checkpoint and method, from the records of the trials that have one: over all
    scenarios together and, where there are several, for each.
    """
    draws: dict[tuple[str, str, str], dict[str, tuple[Setting, list[Draw]]]] = {}
    for cell in cells:
        record = store.read(cell) if cell.kind == "tune" else None
        if record is None or record["status"] != "ok":
            continue
        found = draw_of(record["result"], cell.spec["config"]["stop"]["floor"])
        for scenario in {"", cell.spec["scenario"]}:
            of_method = draws.setdefault((scenario, cell.spec["checkpoint"], cell.spec["method"]), {})
            of_method.setdefault(digest(cell.spec["trial"]), (cell.spec["trial"], []))[1].append(found)
    pairs = _tuned_pairs(config)
    each = pairs if len(pairs) > 1 else {}
    return [
        _choice(scenario, kind, name, list(draws.get((scenario, kind, name), {}).values()))
        for scenario, of in {"": pairs_of(config), **each}.items()
        for kind, name in of
    ]


def _choice(scenario: str, kind: str, name: str, tried: Sequence[tuple[Setting, Sequence[Draw]]]) -> Choice:
    most = max((len(draws) for _, draws in tried), default=0)
    whole = [(setting, score(draws)) for setting, draws in tried if len(draws) == most]
    if not whole:
        return Choice(scenario, kind, name, None, None, 0, 0)
    setting, found = whole[best([found for _, found in whole])]
    return Choice(scenario, kind, name, setting, found, len(whole), sum(found.feasible for _, found in whole))


def with_settings(asked: Sequence[Wanted], found: Sequence[Choice]) -> tuple[list[Wanted], list[str]]:
    """Return what there are settings for, looked up as a study does (`tuned.settings_for`), and the names of what has
    to be left out: a checkpoint or a method where all that was asked of it is, else "scenario checkpoint method". The
    study stays as declared, and with it what is trained. Raises UserError if nothing is left.
    """
    have = {(c.scenario, c.checkpoint, c.method) for c in found if c.setting is not None}
    own = {scenario for scenario, _, _ in have}
    left = [w for w in asked if (w.scenario if w.scenario in own else "", w.checkpoint, w.method) in have]
    if not left:
        raise UserError("nothing is left to run: all of it is there, or no trial of tuning has a result (see cells/)")
    there = {name for w in left for name in (w.checkpoint, w.method)}
    names = {
        next((n for n in (w.checkpoint, w.method) if n not in there), f"{w.scenario} {w.checkpoint} {w.method}".strip())
        for w in set(asked) - set(left)
    }
    return left, sorted(names)


def write_tuned(path: Path, config: StudyConfig, found: Sequence[Choice]) -> None:
    """Write what was chosen as the file that `StudyConfig.tuned` names; a method without a result is left out."""
    chosen: dict[str, dict[str, dict[str, TunedEntry]]] = {}
    for choice in found:
        if choice.setting is None or choice.score is None:
            continue
        chosen.setdefault(choice.scenario, {}).setdefault(choice.checkpoint, {})[choice.method] = TunedEntry(
            settings=nested(choice.setting),
            feasible=choice.score.feasible,
            shortfall=choice.score.shortfall,
            damage=choice.score.damage,
            trials=choice.trials,
        )
    dump_config(
        Tuned(
            seeds=config.tune.seeds,
            scenarios=config.tune.scenarios or tuple(config.scenarios),
            updates=config.tune.updates or config.unlearn.loop.max_steps,
            checkpoints=chosen.pop("", {}),
            by_scenario=chosen,
        ),
        path,
    )
