"""The page of all tables of the vision studies, made from their committed files and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_unlearn.eval.compare import compare
from llm_unlearn.report.claims import claims, claims_grid
from llm_unlearn.report.design import primary, starts
from llm_unlearn.report.grid import Grid
from llm_unlearn.report.paper import paper
from llm_unlearn.report.paper_table import by_place, checkpoints, differences
from llm_unlearn.report.probe_table import probe_grids
from llm_unlearn.report.results import AT_LEVEL, StudyFile, vision_files
from llm_unlearn.report.tables import grids_markdown
from llm_unlearn.report.told import told

LATE = {"main": "grok", "retuned": "grok", "schedule": "grok", "published": "annealed"}
"""Arm -> the checkpoint that stands for the late one."""
WORDS = {
    "main": "",
    "retuned": "the primary contrast tuned on three seeds, after the results above had been seen: ",
    "schedule": "one schedule for all: ",
    "published": "one schedule, published optimiser: ",
}
HEAD = """# Forgetting images, before and after grokking

Made by `python benchmarks/vision.py --tables` from the JSON files beside it. Seeds are the unit of every interval; the
primary contrast was declared in the config before the runs, all else is exploratory.
"""


def vision_tables(results: Path) -> str:
    """Return the page about every vision study with a file in the folder of results."""
    files, parts = vision_files(results), [HEAD]
    for data in dict.fromkeys(f.content.data for f in files):
        for arm in LATE:
            mine = [f for f in files if (f.content.data, f.content.arm) == (data, arm)]
            parts += [_section(data, arm, mine)] if mine else []
    return "\n".join(parts)


def _section(data: str, arm: str, files: Sequence[StudyFile]) -> str:
    """Return the page's part on one data set: the published table of all nets, then what each net has besides."""
    outcomes = [o for f in files for o in f.outcomes]
    lines = [f"## {data}, {WORDS[arm]}{', '.join(f.content.arch for f in files)}\n"]
    lines += [text + "\n" for f in files for text in told(f)]
    grids: list[Grid] = []
    for f in files:
        if mine := f.of(f.scenario):
            comparison = compare(mine)
            grids += [*primary(comparison), *starts(comparison, checkpoints(mine))]
        grids += probe_grids(f.content.probes, f.content.arch, LATE[arm])
    if arm in AT_LEVEL:
        return "\n".join([*lines, grids_markdown(grids + paper(outcomes))])
    late, others = LATE[arm], ("early", "fit", "fit_scaled", "easy")
    grids += [grid for grid in paper(outcomes) if grid.title.startswith("Table 1")]
    for place, runs in by_place(outcomes).items():
        found = differences(runs, [(late, other) for other in others], place.words)
        judged = claims(runs, late, others, at_level=False)
        grids += [*([found] if found else []), *([claims_grid(judged, place.words)] if judged else [])]
    return "\n".join([*lines, grids_markdown(grids)])
