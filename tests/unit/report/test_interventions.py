"""Interventions on gradients: beside their shams, and what a projection does to what is between two checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from llm_unlearn.report.findings import findings, markdown
from llm_unlearn.report.interventions import Gap, gap, projected_methods, projection_grid, shrinks
from llm_unlearn.report.probe_table import moved_grid
from llm_unlearn.report.results import INTERVENTIONS, ProbeRow, read_results
from llm_unlearn.report.text import DASH
from llm_unlearn.stats import Difference
from tests.unit.report import findings_data as made

PAIRS = (("apart", "apart_sham"), ("together", "together_sham"))
PRIMARY = made.primary(methods=["npo"], contrasts=[list(pair) for pair in PAIRS])
METHODS = {"npo": {}, "npo_gru": {"method": {"name": "npo", "gradient": "gru"}}}
KEPT = {  # checkpoint -> what NPO keeps, and NPO projected; by seed give or take .01
    "fit": (0.6, 0.79),
    "grok": (0.8, 0.8),
    "apart": (0.9, None),
    "apart_sham": (0.7, None),
    "together": (0.7, None),
    "together_sham": (0.7, None),
}


def runs(seeds: int = 6) -> list:
    out = []
    for seed in range(seeds):
        noise = np.random.default_rng(seed)
        for kind, values in KEPT.items():
            for method, kept in zip(METHODS, values, strict=True):
                if kept is not None:
                    o = made.outcome(seed, kind, method, kept + 0.01 * float(noise.standard_normal()))
                    out.append(replace(o, primary=PRIMARY))
    return out


def content(found, **changes):
    study = {"seeds": sorted({o.seed for o in found}), "checkpoints": ["fit", "grok"], "methods": METHODS,
             "extra": [{"checkpoints": [k for pair in PAIRS for k in pair], "methods": ["npo"]}],
             "scenarios": {"author": {}}, "grid_scenarios": [], "primary": PRIMARY}  # fmt: skip
    return made.content(found, **{"study": study, "probes": [], **changes})


def section_of(folder):
    page = findings(read_results(folder))
    return next((part for part in page.sections if part.title == "Interventions on gradients"), None)


def test_the_section_says_what_was_put_in(tmp_path):
    part = section_of(made.write(tmp_path, interventions=content(runs())))
    assert "`apart` keeps, beside `apart_sham`: more with npo." in part.text
    assert "`together` keeps, beside `together_sham`: the same within 0.05 with npo." in part.text
    assert "Projected, what is between `grok` and `fit` (kept at the forget level): shrinks with npo." in part.text
    titles = [grid.title for grid in part.grids]
    assert titles[:3] == ["Primary contrast: kept_at_level", "Runs behind it", "Start models"]
    assert "Projecting the gradients while forgetting" in titles
    assert "What was changed in the models" not in titles, "nothing was probed"
    behind = next(grid for grid in part.grids if grid.title == "Runs behind it")
    assert {row.cells[1]: row.cells[2:4] for row in behind.rows} == {k: ("6", "6") for pair in PAIRS for k in pair}


def test_what_could_not_be_judged_is_said_with_its_reason(tmp_path):
    def collapsed(o):
        return replace(o, metrics={**o.metrics, "retain_acc": {**o.metrics["retain_acc"], "value": 0.01}})

    where = (0, "together", "npo")
    broken = [collapsed(o) if (o.seed, o.checkpoint, o.method) == where else o for o in runs()]
    part = section_of(made.write(tmp_path / "a", interventions=content(broken)))
    (said,) = [text for text in part.text if text.startswith("`together`")]
    assert "not testable (" in said
    assert "collapsed" in said
    other = [replace(o, primary=made.primary(measure="retain_acc")) if o.seed == 1 else o for o in runs()]
    part = section_of(made.write(tmp_path / "b", interventions=content(other)))
    assert any(text.startswith("The declared contrasts were not judged: ") for text in part.text)
    assert not any("keeps, beside" in text for text in part.text)


def test_a_page_without_them_says_so_and_with_them_does_not(tmp_path):
    without = made.write(tmp_path / "a", language=made.content(made.outcomes({}, 3)))
    assert section_of(without) is None
    main, again = INTERVENTIONS
    assert main.command in markdown(findings(read_results(without)), "f")
    assert {main, again} <= set(read_results(without).missing)
    found = read_results(made.write(tmp_path / "b", interventions=content(runs())))
    assert main not in found.missing
    assert again in found.missing, "the second design is another file"
    page = findings(found)
    assert "not run yet" in page.answer[0], "they answer another question than the language study"


def test_the_second_design_has_a_section_of_its_own_without_what_it_did_not_run(tmp_path):
    pair = PAIRS[0]
    primary = made.primary(methods=["npo"], contrasts=[list(pair)])
    found = [replace(o, seed=o.seed + 10, primary=primary) for o in runs() if o.checkpoint in pair]
    study = {"seeds": sorted({o.seed for o in found}), "checkpoints": list(pair), "methods": {"npo": {}}, "extra": [],
             "scenarios": {"author": {}}, "grid_scenarios": [], "primary": primary}  # fmt: skip
    probes = [{"seed": s, "checkpoint": k, "lines": {"norms, all: norm": [float(s + (k == "apart")), None, None]}}
              for s in range(3) for k in pair]  # fmt: skip
    again = content(found, study=study, probes=probes)
    again["trainings"] = [{**row, "run": f"apart/{row['run']}"} for row in again["trainings"]]
    page = findings(read_results(made.write(tmp_path, interventions=content(runs()), interventions_apart=again)))
    first, second = (part for part in page.sections if part.title.startswith("Interventions"))
    assert second.title == "Interventions on gradients: apart, on other seeds"
    assert "`apart` keeps, beside `apart_sham`: more with npo." in second.text
    assert not any("Projected" in text for text in second.text)
    assert any(" models grokked" in text for text in first.text)
    assert not any(" models grokked" in text for text in second.text), "all its trainings are of arms"
    changed = next(grid for grid in second.grids if grid.title == "What was changed in the models")
    assert changed.columns == ("probe", "apart / apart_sham", "apart minus apart_sham")
    assert all("grok minus fit" not in grid.columns for grid in second.grids)
    assert any("grok minus fit" in grid.columns for grid in first.grids)


def test_a_gap_by_hand_is_over_the_seeds_that_have_all_four_runs():
    found = [o for o in runs(4) if not (o.seed == 3 and (o.checkpoint, o.method) == ("fit", "npo_gru"))]
    kept = {(o.seed, o.checkpoint, o.method): o.number("kept_at_level") for o in found}
    g = gap(found, "npo", "npo_gru", "kept_at_level")
    plain, projected = ([kept[s, "grok", m] - kept[s, "fit", m] for s in range(3)] for m in METHODS)
    assert (g.plain.n, g.projected.n, g.added.n) == (3, 3, 3)
    assert g.plain.mean == pytest.approx(np.mean(plain))
    assert g.projected.mean == pytest.approx(np.mean(projected))
    assert g.added.mean == pytest.approx(np.mean(projected) - np.mean(plain))
    half = 4.302653 * np.std(np.subtract(projected, plain), ddof=1) / math.sqrt(3)
    assert g.added.hi - g.added.mean == pytest.approx(half, rel=1e-6)
    assert gap([o for o in found if o.seed < 2], "npo", "npo_gru", "kept_at_level") is None


@pytest.mark.parametrize(
    ("plain", "projected", "added", "told"),
    [
        ((0.10, 0.05, 0.15), (0.02, -0.02, 0.06), (-0.08, -0.12, -0.04), "shrinks"),
        ((-0.10, -0.15, -0.05), (-0.02, -0.06, 0.02), (0.08, 0.04, 0.12), "shrinks"),
        ((0.10, 0.05, 0.15), (-0.01, -0.05, 0.03), (-0.11, -0.15, -0.07), "shrinks"),
        ((0.10, 0.05, 0.15), (-0.30, -0.35, -0.25), (-0.40, -0.45, -0.35), "turns round"),
        ((-0.10, -0.15, -0.05), (0.30, 0.25, 0.35), (0.40, 0.35, 0.45), "turns round"),
        ((0.10, 0.05, 0.15), (0.18, 0.1, 0.2), (0.08, 0.04, 0.12), "grows"),
        ((0.10, 0.05, 0.15), (0.02, -0.02, 0.06), (-0.08, -0.20, 0.04), "cannot tell"),
        ((0.02, -0.05, 0.09), (0.0, -0.1, 0.1), (-0.08, -0.12, -0.04), "cannot tell whether there is anything between"),
    ],
)
def test_whether_a_projection_shrinks_a_gap_is_decided_by_the_intervals(plain, projected, added, told):
    found = Gap(*(Difference(mean, lo, hi, 5, 0.5) for mean, lo, hi in (plain, projected, added)))
    assert shrinks(found) in (told, f"{told} them")


def test_projected_methods_are_those_beside_the_same_without(tmp_path):
    extra = {**METHODS, "graddiff_gru": {"method": {"name": "graddiff", "gradient": "gru"}}, "ga": None}
    made.write(tmp_path, interventions=content(runs(3), study={
        "seeds": [0], "checkpoints": [], "methods": extra, "scenarios": {}, "primary": PRIMARY}))  # fmt: skip
    file = read_results(tmp_path).interventions[0]
    assert projected_methods(file) == [("npo", "npo_gru", "gru")], "no graddiff to set the other beside"
    two = projection_grid(file, [o for o in runs(2) if o.scenario == "author"])
    assert {cell for row in two.rows if row.kind != "section" for cell in row.cells[1:]} == {DASH}
    assert projection_grid(file.__class__(file.path, file.content.model_copy(update={
        "study": file.content.study.model_copy(update={"methods": {"npo": {}}})}), ()), []) is None  # fmt: skip


def test_what_was_changed_in_the_models_by_hand():
    line = "alignment, ce: cos(all forget, all retain)"
    by = {"apart": (0.1, 0.2, 0.3), "apart_sham": (0.4, 0.4, 0.4), "fit": (0.5, 0.5, 0.5)}
    rows = [ProbeRow(seed=s, checkpoint=k, lines={line: [v, None, None], "not asked for": [1.0, None, None]})
            for k, values in by.items() for s, v in enumerate(values)]  # fmt: skip
    grid = moved_grid(rows, [*PAIRS, ("grok", "fit")])
    assert grid.columns == ("probe", "apart / apart_sham", "apart minus apart_sham"), "no other pair was probed"
    (row,) = grid.rows
    assert row.cells[0] == line
    assert row.cells[1].startswith("0.2 [")
    assert row.cells[2].startswith("-0.2 [-0.448, +0.0484]"), "4.303 x .1 / sqrt(3)"
    assert moved_grid(rows, [("grok", "fit")]) is None
    assert moved_grid([], PAIRS) is None
