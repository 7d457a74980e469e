"""Going on with a study from its file of results alone, on another machine or after its folder is gone: what the file
holds is not run again, and what is run joins it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.config import build_config, digest
from llm_unlearn.errors import UserError
from llm_unlearn.eval.packed import pack, unpack
from llm_unlearn.study.arms import Wanted, wanted
from llm_unlearn.study.collect import MARKS, choices_in, declared
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.tune import Choice, plan_tuning


@dataclass(frozen=True)
class Held:
    """What a file of results holds: labels of the cells that ended or whose checkpoint was never reached and of those
    that failed, what tuning chose, and rows of trainings.
    """

    ended: Collection[str] = ()
    failed: Collection[str] = ()
    choices: Sequence[Choice] = ()
    trainings: Sequence[Mapping[str, Any]] = ()

    def tuned(self, w: Wanted) -> bool:
        """Whether it was tuned where `w` is; of a study of one scenario the choices name none."""
        named = any(c.scenario for c in self.choices)
        place = (w.scenario if named else "", w.checkpoint, w.method)
        return place in {(c.scenario, c.checkpoint, c.method) for c in self.choices}


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
    ended = frozenset((*content["digests"], *content["unreached"]))
    return Held(ended, frozenset(content["errors"]), choices_in(content, where), content["trainings"])


def join(first: Mapping[str, Any], second: Mapping[str, Any], ran: Collection[str]) -> dict[str, Any]:
    """Return the file of results of both. Of a model that was trained again for further runs the first row is told, and
    in `retrained_otherwise` its name where it came out otherwise: on another machine it may, and then its runs do not
    all begin from the same weights. The cost is that of all that was done. `environment` is the second's.

    Args:
        ran: labels of the cells behind the second; what failed of them before is forgotten.
    """
    before = [*first.get("environments_before", ()), first["environment"]]
    others = {digest(e): e for e in before if e != second["environment"]}
    tuned_again = {_place(row) for row in second["tuned"]}
    trained = {row["run"]: row for row in first["trainings"]}
    otherwise = {r["run"] for r in second["trainings"] if r["run"] in trained and not _same(r, trained[r["run"]])}
    joined = {
        **second,
        "designs": sorted({*first["designs"], *second["designs"]}),
        "left_out": sorted({*first["left_out"], *second["left_out"]}),
        "cost": {kind: _added(first, second, kind) for kind in dict.fromkeys((*first["cost"], *second["cost"]))},
        "trainings": [*first["trainings"], *(row for row in second["trainings"] if row["run"] not in trained)],
        "censored": sorted({*first["censored"], *second["censored"]}),
        "unreached": sorted({*first["unreached"], *second["unreached"]}),
        "errors": {label: why for label, why in first["errors"].items() if label not in ran} | second["errors"],
        "digests": {**first["digests"], **second["digests"]},
        "outcomes": pack([*unpack(first["outcomes"]), *unpack(second["outcomes"])]),
        "retrained_otherwise": sorted({*first.get("retrained_otherwise", ()), *otherwise}),
    }
    for table in ("tuned", "trials"):
        joined[table] = [*(row for row in first[table] if _place(row) not in tuned_again), *second[table]]
    return {**joined, "environments_before": list(others.values())} if others else joined


def _place(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("scenario", "checkpoint", "method"))


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(row[key] == other[key] for key in (*MARKS, "steps"))


def progress_of(study: StudyConfig, content: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many trials of tuning and how many runs of a study a file of results holds and how they ended, and how
    many have `not run yet`; those that tuning found no settings for do not count.
    """
    choices = choices_in(content, "results")
    held, lacking = Held(choices=choices), Held(choices=[c for c in choices if c.setting is None])
    labels = [w.label for w in wanted(study) if not lacking.tuned(w)]
    ok, censored, failed = (sum(x in content[key] for x in labels) for key in ("digests", "unreached", "errors"))
    trials = [cell.spec for cell in plan_tuning(study) if cell.kind == "tune"]
    places = [Wanted(s["seed"], s["scenario"], s["checkpoint"], s["method"]) for s in trials]
    tried, ended = sum(map(held.tuned, places)), sum(len(row["seeds"]) for row in content["trials"])
    return {
        "tuning": _counted(ok=ended, without_result=tried - ended, not_run_yet=len(trials) - tried),
        "measured": _counted(ok=ok, censored=censored, failed=failed, not_run_yet=len(labels) - ok - censored - failed),
    }


def _counted(**numbers: int) -> dict[str, int]:
    return {how.replace("_", " "): n for how, n in numbers.items() if n or how == "ok"}


def _added(first: Mapping[str, Any], second: Mapping[str, Any], kind: str) -> dict[str, float]:
    found = [part["cost"][kind] for part in (first, second) if kind in part["cost"]]
    return {key: round(sum(part[key] for part in found), 1) for key in found[0]}
