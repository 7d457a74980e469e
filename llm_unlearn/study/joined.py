"""Going on with a study from its file of results alone, on another machine or after its folder is gone: what the file
holds is not run again, and what is run joins it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.config import build_config, digest
from llm_unlearn.errors import UserError
from llm_unlearn.eval.packed import pack, unpack
from llm_unlearn.study.arms import Wanted, wanted
from llm_unlearn.study.collect import choices_in, declared
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.tune import Choice, plan_tuning

PLACE = ("scenario", "checkpoint", "method")


@dataclass(frozen=True)
class Held:
    """What a file of results holds: labels of the cells that ended or whose checkpoint was never reached, and what
    tuning chose.
    """

    ended: Collection[str] = ()
    choices: Sequence[Choice] = ()

    def tuned(self, w: Wanted, one_scenario: bool) -> bool:
        """Whether it was tuned where `w` is; with `one_scenario` a choice over all of them is the one for it."""
        scenarios = (w.scenario, "") if one_scenario else (w.scenario,)
        places = {(c.scenario, c.checkpoint, c.method) for c in self.choices}
        return any((scenario, w.checkpoint, w.method) in places for scenario in scenarios)


def held_in(content: Mapping[str, Any], study: StudyConfig, where: str) -> Held:
    """Return what a file of results (`study.collect.study_content`) holds of a study. Raises UserError for a file that
    is none, and for one of a study that was declared otherwise: its cells are none of this one's.
    """
    if not {"study", "digests", "unreached", "tuned"} <= content.keys():
        raise UserError(f"{where}: holds no results that can be gone on from; leave --from out")
    theirs = build_config(StudyConfig, {**content["study"], "out": study.out}, f"{where}: study")
    if declared(theirs) != (mine := declared(study)):
        differ = sorted(key for key, value in declared(theirs).items() if value != mine[key])
        raise UserError(f"{where}: is of another study ({', '.join(differ)} differ); leave --from out")
    return Held(frozenset((*content["digests"], *content["unreached"])), tuple(choices_in(content, where)))


def join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file of results of both. Of what both hold (a model trained again for further runs) the first is told;
    the cost is that of all that was done. `environment` is the second's, another of the first is kept beside.
    """
    before = [*first.get("environments_before", ()), first["environment"]]
    others = {digest(e): e for e in before if e != second["environment"]}
    return {
        **second,
        "designs": sorted({*first["designs"], *second["designs"]}),
        "left_out": sorted({*first["left_out"], *second["left_out"]}),
        "cost": {kind: _added(first, second, kind) for kind in dict.fromkeys((*first["cost"], *second["cost"]))},
        "trainings": _each(("run",), first["trainings"], second["trainings"]),
        "censored": sorted({*first["censored"], *second["censored"]}),
        "unreached": sorted({*first["unreached"], *second["unreached"]}),
        "errors": {k: v for k, v in first["errors"].items() if k not in second["digests"]} | second["errors"],
        "tuned": _each(PLACE, first["tuned"], second["tuned"]),
        "trials": _each((*PLACE, "setting"), first["trials"], second["trials"]),
        "digests": {**second["digests"], **first["digests"]},
        "outcomes": pack([*unpack(first["outcomes"]), *unpack(second["outcomes"])]),
        **({"environments_before": list(others.values())} if others else {}),
    }


def progress_of(study: StudyConfig, content: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many trials of tuning and how many runs of a study a file of results holds and how they ended, and how
    many have `not run yet`; those of what had to be left out do not count.
    """
    gone = set(content["left_out"])
    labels = [w.label for w in wanted(study) if not {w.checkpoint, w.method} & gone]
    ok, censored, failed = (sum(x in content[key] for x in labels) for key in ("digests", "unreached", "errors"))
    choices = Held(choices=choices_in(content, "results"))
    trials = [cell.spec for cell in plan_tuning(study) if cell.kind == "tune"]
    one = len({spec["scenario"] for spec in trials}) == 1
    places = [Wanted(s["seed"], s["scenario"], s["checkpoint"], s["method"]) for s in trials]
    tried, ended = sum(choices.tuned(w, one) for w in places), sum(len(row["seeds"]) for row in content["trials"])
    return {
        "tuning": _counted(ok=ended, without_result=tried - ended, not_run_yet=len(trials) - tried),
        "measured": _counted(ok=ok, censored=censored, failed=failed, not_run_yet=len(labels) - ok - censored - failed),
    }


def _counted(**numbers: int) -> dict[str, int]:
    return {how.replace("_", " "): n for how, n in numbers.items() if n or how == "ok"}


def _added(first: Mapping[str, Any], second: Mapping[str, Any], kind: str) -> dict[str, float]:
    found = [part["cost"][kind] for part in (first, second) if kind in part["cost"]]
    return {key: round(sum(part[key] for part in found), 1) for key in found[0]}


def _each(keys: Sequence[str], *tables: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of all tables, of those with the same keys the first."""
    rows: dict[str, Mapping[str, Any]] = {}
    for row in (row for table in tables for row in table):
        rows.setdefault(digest([row[key] for key in keys]), row)
    return list(rows.values())
