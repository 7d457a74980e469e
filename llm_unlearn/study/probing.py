"""Looking into the start models of a study: which models, how much, and a row of numbers each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import build_config
from llm_unlearn.data.splits import Scenario
from llm_unlearn.errors import UserError
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.probes.run import PROBES_FILE, probe_model
from llm_unlearn.eval.probes.table import Settings
from llm_unlearn.files import read_json
from llm_unlearn.log import get_logger
from llm_unlearn.models.pretrained import fingerprint
from llm_unlearn.study.arms import arm_of, taken, trainings
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import training_cells
from llm_unlearn.unlearn.start import open_start

log = get_logger(__name__)


@dataclass(frozen=True)
class Look:
    """What is looked at: probes that every model has, and those that one may have nothing for, such as curvature at a
    loss that no temperature brings it to.
    """

    always: tuple[str, ...]
    optional: tuple[str, ...]
    settings: Settings


def probe_starts(
    study: StudyConfig, outcomes: Sequence[Outcome], look: Look, seeds: Sequence[int], jobs: int
) -> list[dict[str, Any]]:
    """Look into every start model that these seeds' outcomes of the study's first scenario began from, on `jobs`
    processes; return a row a model: seed, checkpoint, `lines` (name -> value and the ends of its null), CPU-seconds.
    """
    scenario = next(iter(study.grid_scenarios or study.scenarios), "")
    used = [(o.seed, o.checkpoint) for o in outcomes if o.scenario == scenario and o.seed in seeds]
    named = list(dict.fromkeys((*study.checkpoints, *(kind for _, kind in used))))
    tasks = []
    for seed, kind in sorted(set(used), key=lambda place: (place[0], named.index(place[1]))):
        arm = arm_of(study, kind)
        model, golds = training_cells(study, seed, trainings(study)[seed, arm], arm)
        reference = f"{model.spec['config']['out']}@{taken(study, kind)}"
        asked = golds[scenario].spec["config"]["scenario"]
        tasks.append((reference, asked, str(Path(study.out) / "probes" / f"seed{seed}-{kind}"), seed, kind, look))
    if not tasks:
        return []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        return list(pool.map(probe_one, tasks))


def probe_one(task: tuple[str, dict[str, Any], str, int, str, Look]) -> dict[str, Any]:
    """Probe one model; what is there of the same weights and settings is read. What an optional probe cannot be taken
    of has none.
    """
    reference, scenario, out, seed, kind, look = task
    path = Path(out) / PROBES_FILE
    found: dict[str, Any] = read_json(path) if path.exists() else {"identity": {}, "probes": {}}
    asked = {"model": fingerprint(reference), "settings": asdict(look.settings)}
    known = {key: found["identity"].get(key) for key in asked} == asked
    if not known or set(look.always) - set(found["probes"]):
        path.unlink(missing_ok=True)
        start = open_start(reference, None, build_config(Scenario, scenario))
        given: dict[str, Any] = {"settings": look.settings, "out": Path(out)}
        found = probe_model(reference, start.corpus, start.request, which=look.always, **given)
        for name in look.optional:
            try:
                found = probe_model(reference, start.corpus, start.request, which=(name,), **given)
            except UserError as error:
                log.warning("seed %s %s: no %s: %s", seed, kind, name, error)
    have = [name for name in (*look.always, *look.optional) if name in found["probes"]]
    lines = [(f"{name}, {line['name']}", line) for name in have for line in found["probes"][name]["lines"]]
    return {
        "seed": seed,
        "checkpoint": kind,
        "lines": {name: [_short(line["value"]), *map(_short, line["null"] or ())] for name, line in lines},
        "cpu_seconds": round(sum(probe["cost"]["cpu_seconds"] for probe in found["probes"].values()), 2),
    }


def _quiet() -> None:
    import torch

    os.environ["LLM_UNLEARN_QUIET"] = "1"
    torch.set_num_threads(1)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
