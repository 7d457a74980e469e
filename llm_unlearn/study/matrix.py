"""The cells of a study: what each one runs, what it waits for, and its identity."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_unlearn import __version__
from llm_unlearn.config import build_config, digest
from llm_unlearn.data.splits import Scenario
from llm_unlearn.data.world import preset
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.eval.suite import Suite, load_suite
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.methods.needs import check_params
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.tiny import SIZES
from llm_unlearn.study.arms import (
    Wanted,
    arm_of,
    arms_of,
    check_arms,
    merged,
    seeds_of,
    taken,
    trained_until,
    training_of,
    trainings,
    wanted,
)
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.identity import as_before
from llm_unlearn.study.tuned import Tuned, read_tuned, settings_for
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.wrapped import choose_wrapper

CellKind = Literal["train", "unlearn", "tune"]
CONTROLS = "controls"
"""Folder of a study with the runs of its controls: controls/NAME/seed0, and the golds beside."""
FOLDER_NAME = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # not . or .., and nothing hidden


@dataclass(frozen=True)
class Cell:
    """One run of a study. `spec` decides its result; `id` is a hash of it, of the code version and of the cells it
    waits for. `facts` are what its result says besides: they decide nothing, and are in no hash.
    """

    id: str
    kind: CellKind
    label: str
    spec: Mapping[str, Any]
    after: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def plan(config: StudyConfig, only: Collection[Wanted] | None = None) -> list[Cell]:
    """Return a study's cells in a fixed order, training first. Raises UserError for an unknown world preset, model
    size, checkpoint, method, knob or suite, what is listed twice, a name that cannot be a folder's, controls, extra
    cells and a primary contrast that cannot be, and a `tuned` file that does not fit.

    Args:
        only: of what the study measures these alone, and the trainings they wait for: the same cells as in the whole
            plan. The `tuned` file need not have settings for the others. None: all.
    """
    suite = load_suite(config.suite)
    check_study(config)
    tuned = read_tuned(config.tuned, seeds_of(config)) if config.tuned is not None else None
    trained = {
        (seed, arm): training_cells(config, seed, scenarios, arm)
        for (seed, arm), scenarios in trainings(config).items()
    }
    told = _told(config)
    unlearning = [
        _study_cell(
            config, suite, place_of(config, w, trained[w.seed, arm_of(config, w.checkpoint)]), w.method, tuned, told
        )
        for w in wanted(config)
        if only is None or w in only
    ]
    cells = [*(cell for model, golds in trained.values() for cell in (model, *golds.values())), *unlearning]
    return cells if only is None else with_trainings(cells, unlearning)


def with_trainings(cells: Sequence[Cell], chosen: Collection[Cell]) -> list[Cell]:
    """Return those chosen and what they wait for, in the order of all `cells`."""
    ids = {name for cell in chosen for name in (cell.id, *cell.after)}
    return [cell for cell in cells if cell.id in ids]


def place_of(config: StudyConfig, w: Wanted, trained: tuple[Cell, Mapping[str, Cell]]) -> Place:
    """Return where a cell begins, given the model of its arm and the golds by scenario."""
    return Place(w.seed, w.scenario, w.checkpoint, taken(config, w.checkpoint), trained[0], trained[1][w.scenario])


def _told(config: StudyConfig) -> dict[str, Any]:
    """What every result says of the study it was made for."""
    study = config.model_dump(mode="json", exclude={"out", "design"})
    told: dict[str, Any] = {"study": digest(study), **_designed(config)}
    return told if config.primary is None else {**told, "primary": config.primary.model_dump(mode="json")}


def _designed(config: StudyConfig) -> dict[str, str]:
    return {} if config.design is None else {"design": config.design}


def check_study(config: StudyConfig) -> None:
    """Refuse what no cell could run with. Raises UserError."""
    _check_training(config.grok)
    for arm in filter(None, arms_of(config)):
        _check_training(build_config(GrokConfig, training_of(config, arm), f"controls.{arm}.changes"))
    known_method(config.unlearn.method.name, "unlearn.method.name")
    for section, names in (
        ("methods", config.methods),
        ("scenarios", config.scenarios),
        ("controls", config.controls),
    ):
        for name in names:
            if not FOLDER_NAME.fullmatch(name):
                raise UserError(
                    f"bad name '{name}' in {section}: it names a folder; use letters, digits, _ and -, and . inside"
                )
    check_once(config.seeds, "seeds")
    check_arms(config, load_suite(config.suite))


def check_once(seeds: Sequence[int], where: str) -> None:
    """Refuse seeds listed twice. Raises UserError."""
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{where} {list(seeds)} repeat; the seed is the unit of the statistics, list each once")


def training_cells(
    config: StudyConfig, seed: int, wanted_of: Mapping[str, Collection[str]], arm: str = ""
) -> tuple[Cell, dict[str, Cell]]:
    """Return a seed's model in an arm and, by scenario, its golds; "" names a study's only one, `grok.scenario`.

    The model is shared: what it is trained on does not depend on what will be forgotten.

    Args:
        wanted_of: scenario -> the checkpoints that are taken of the model and of that gold.
    """
    every = {kind for kinds in wanted_of.values() for kind in kinds}
    model = _train_cell(config, seed, arm, f"seed{seed}", "none", config.grok.scenario, every)
    golds = {}
    for name, kinds in wanted_of.items():
        run, scenario = (f"seed{seed}-gold-{name}", config.scenarios[name]) if name else (f"seed{seed}-gold", None)
        golds[name] = _train_cell(config, seed, arm, run, "forget", scenario or config.grok.scenario, kinds)
    return model, golds


@dataclass(frozen=True)
class Place:
    """Where a cell begins: a seed's model at a checkpoint (`take` is its kind in the folder of the run), what it is to
    forget, and the gold for that.
    """

    seed: int
    scenario: str
    checkpoint: str
    take: str
    model: Cell
    gold: Cell

    @property
    def folder(self) -> str:
        """Scenario and checkpoint as part of a path."""
        return str(Path(self.scenario) / self.checkpoint)

    @property
    def label(self) -> str:
        """The same as part of a label."""
        return " ".join(part for part in (f"seed{self.seed}", self.scenario, self.checkpoint) if part)


def _check_training(grok: GrokConfig) -> None:
    """Refuse now what would otherwise fail in every training cell, one after the other."""
    if grok.data.kind == "world" and grok.data.path is None:
        preset(grok.data.preset)
    if grok.model.name is None and grok.model.shape is None and grok.model.size not in SIZES:
        size = grok.model.size
        raise UserError(f"unknown model size '{size}' in grok.model.size{suggest(size, SIZES)}")


def make_cell(
    kind: CellKind,
    label: str,
    spec: Mapping[str, Any],
    after: tuple[str, ...] = (),
    facts: Mapping[str, Any] | None = None,
) -> Cell:
    """Return a cell with the id that its content gives it."""
    found = digest({"kind": kind, "spec": as_before(spec), "after": after, "code": __version__})[:12]
    return Cell(found, kind, label, spec, after, facts or {})


def _train_cell(
    config: StudyConfig, seed: int, arm: str, run: str, exclude: str, scenario: Scenario, kinds: Collection[str]
) -> Cell:
    grok = training_of(config, arm)
    label = f"{arm}/{run}" if arm else run
    folder = Path(config.out) / (f"{CONTROLS}/{arm}" if arm else "runs") / run
    values = {**grok, "seed": seed, "exclude": exclude, "out": str(folder)}
    values["data"] = {**grok["data"], "seed": seed}
    values["scenario"] = {**scenario.model_dump(), "seed": seed}
    values["watch"] = {**grok["watch"], "until": trained_until(config, arm, kinds)}
    checked = build_config(GrokConfig, values, f"study cell {label}")
    spec = {"config": checked.model_dump(mode="json"), "seed": seed, "exclude": exclude}
    return make_cell("train", label, spec, facts=_designed(config))


def _study_cell(
    config: StudyConfig, suite: Suite, place: Place, name: str, tuned: Tuned | None, told: Mapping[str, Any]
) -> Cell:
    found = settings_for(tuned, str(config.tuned), place.scenario, place.checkpoint, name) if tuned is not None else {}
    # tuned again, a method has other settings and so a folder of its own
    folder = name if tuned is None else f"{name}-{digest(found)[:12]}"
    out = Path(place.model.spec["config"]["out"]) / "unlearn" / place.folder / folder
    try:
        checked = unlearn_config(config, place, name, found, out)
    except UserError as error:
        where = f"{config.tuned}: '{name}' at '{place.checkpoint}': " if found else ""
        raise UserError(f"{where}{error}") from None
    spec = {
        "config": checked.model_dump(mode="json"),
        "seed": place.seed,
        "checkpoint": place.checkpoint,
        "method": name,
        "suite": config.suite,
        "suite_digest": suite.digest,
        **({"scenario": place.scenario} if place.scenario else {}),
        **({"tuned": found} if tuned is not None else {}),
        **({"relearn": config.relearn.model_dump(mode="json")} if config.relearn is not None else {}),
    }
    facts = {"method": name, "checkpoint": place.checkpoint, "scenario": place.scenario, **told}
    if place.checkpoint in config.controls:
        facts |= {"control": True, "match": config.controls[place.checkpoint].match}
    return make_cell("unlearn", f"{place.label} {name}", spec, (place.model.id, place.gold.id), facts)


def unlearn_config(
    config: StudyConfig, place: Place, name: str, changes: Mapping[str, Any], out: Path
) -> UnlearnConfig:
    """Return the config of one unlearning run: the study's `unlearn`, over it the method's section, over it `changes`.

    Raises UserError for an unknown method or knob and for values that are no config.
    """
    values = method_values(config, name)
    if isinstance(values["method"], Mapping):  # anything else is left for the config's check to refuse
        values = merged(values, changes)
    run, gold = (cell.spec["config"] for cell in (place.model, place.gold))
    values.update(
        model=f"{run['out']}@{place.take}",
        gold=f"{gold['out']}@{place.take}",
        seed=place.seed,
        out=str(out),
    )
    if place.scenario:
        values["scenario"] = gold["scenario"]
    if place.scenario in config.levels and isinstance(values["stop"], Mapping):
        values["stop"] = {**values["stop"], "target": config.levels[place.scenario]}
    checked = build_config(UnlearnConfig, values, f"study method {name}")
    known_method(checked.method.name, "methods")
    try:
        check_params(METHODS[checked.method.name], checked.method.params, checked.method.retain)
    except ValueError as error:
        raise UserError(f"study method {name}: {error}") from None
    choose_wrapper(checked.method)
    return checked


def method_values(config: StudyConfig, name: str) -> dict[str, Any]:
    """Return the study's `unlearn` with a method's section over it, as plain values that are not checked yet."""
    method = config.methods[name].get("method", {})
    values = merged(config.unlearn.model_dump(), config.methods[name])
    if isinstance(method, Mapping):
        values["method"] = {**config.unlearn.method.model_dump(), "params": {}, "name": name, **method}
    return values


def known_method(name: str, where: str) -> None:
    """Refuse a method that is not in the table. Raises UserError."""
    if name not in METHODS:
        raise UserError(f"unknown method '{name}' in {where}{suggest(name, METHODS)}")
