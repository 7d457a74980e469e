"""Running one cell of a committed study again, from its file of results alone, and telling whether every number is the
same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.files import read_json
from llm_unlearn.study.arms import wanted
from llm_unlearn.study.collect import ELSEWHERE, choices_in, result_digest
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.runner import run_missing
from llm_unlearn.study.store import Store, environment
from llm_unlearn.study.tune import write_tuned


@dataclass(frozen=True)
class Reproduced:
    """A cell that was run again: `status` of the run, digests (`study.collect.result_digest`) as committed and as found
    ("" where it did not end), and both machines.
    """

    label: str
    status: str
    committed: str
    found: str
    environments: tuple[Mapping[str, Any], Mapping[str, Any]]

    @property
    def identical(self) -> bool:
        """Whether every number came again to the last bit."""
        return self.committed == self.found


def reproduce(results: Path, label: str, out: Path, jobs: int = 1, data_path: str | None = None) -> Reproduced:
    """Run a cell of a study, and the trainings it begins from, in the folder `out` with the settings that tuning chose,
    all as `results` (what study.collect writes) says; what is finished there is not run again.

    Args:
        data_path: where the study's data lies here, if it was given as files.

    Raises UserError for a file that is no such results or was made before they held digests, for an unknown cell, and
    for a `data_path` that is lacking or that the study has no use for.
    """
    content = read_json(results)
    digests = content.get("digests") if isinstance(content, dict) else None
    if not isinstance(digests, dict) or not isinstance(content.get("study"), dict):
        raise UserError(f"{results}: holds no digests of cells; run the program that made it again (it runs no cell)")
    if label not in digests:
        raise UserError(f"{results}: no finished cell '{label}'{suggest(label, digests)}")
    study = build_config(StudyConfig, {**content["study"], "out": str(out)}, f"{results}: study")
    study = _with_data(study, data_path, results)
    study = _with_tuned(study, content, out / "tuned.yaml", results)
    asked = [w for w in wanted(study) if w.label == label]
    if not asked:
        raise UserError(f"{results}: its study plans no cell '{label}'; the file does not fit together, make it again")
    cells = plan(study, asked)  # alone: a study that was not run to its end has no settings for the others
    cell = cells[-1]
    run_missing(out, cells, jobs)
    record = Store(out).read(cell)
    status = "waiting" if record is None else record["status"]
    found = result_digest(record) if record is not None and status == "ok" else ""
    return Reproduced(label, status, digests[label], found, (content.get("environment") or {}, environment()))


def _with_data(study: StudyConfig, path: str | None, results: Path) -> StudyConfig:
    given = study.grok.data.path
    if path is None and given != ELSEWHERE:
        return study
    if path is None:
        raise UserError(f"{results}: its data was given as files; say where they lie here with --data-path")
    if given is None:
        raise UserError(f"--data-path {path}: the data of {results} was not given as files; leave it out")
    data = study.grok.data.model_copy(update={"path": path})
    return study.model_copy(update={"grok": study.grok.model_copy(update={"data": data})})


def _with_tuned(study: StudyConfig, content: Mapping[str, Any], path: Path, results: Path) -> StudyConfig:
    """Return the study with the settings its cells had, written to `path` again."""
    choices = choices_in(content, str(results))
    if not choices:
        return study
    write_tuned(path, study, choices)
    return study.model_copy(update={"tuned": str(path)})
