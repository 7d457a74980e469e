"""What a study declared beforehand, and what its checkpoints were to begin with, as it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llm_unlearn.eval.compare import MAIN, ORDER, compare
from llm_unlearn.report.answers import pick_run
from llm_unlearn.report.collect import ReportData, missing_kinds, report_data
from llm_unlearn.report.design import digits_for, starts
from llm_unlearn.report.grids import KIND_WORDS, grids, same_model_notes
from llm_unlearn.report.html import render
from llm_unlearn.report.plots import COLOURS, MARKERS
from llm_unlearn.report.tables import as_json, markdown
from llm_unlearn.report.verdict import verdict

PRIMARY = {
    "measure": "forget_acc~gold",
    "methods": ["npo"],
    "contrasts": [["grok", "fit"], ["grok", "easy"]],
    "bound": 0.1,
}
HELD_OUT = {"fit": 0.30, "grok": 0.97, "easy": 0.95}


@pytest.fixture
def arms(make_study):
    """Three seeds; of ga at grok in seed 1 nothing is left."""
    return [
        replace(
            o,
            control=o.checkpoint == "easy",
            match="grok" if o.checkpoint == "easy" else None,
            start_step=400,
            start_train_acc=1.0,
            start_held_out_acc=HELD_OUT[o.checkpoint] + 0.01 * o.seed * (o.checkpoint == "easy"),
            primary=PRIMARY,
        )
        for o in make_study([0, 1, 2], ("fit", "grok", "easy"))
    ]


def data(outcomes, runs=()) -> ReportData:
    return ReportData(tuple(runs), tuple(outcomes), compare(outcomes), {}, {}, (), ())


def test_the_primary_contrast_has_a_table_of_its_own_and_the_rest_is_exploratory(arms):
    text = markdown(compare(arms))
    part = text.split("### Primary contrast: forget_acc~gold")[1].split("###")[0]
    # the shift is the same on every seed, so the spread is that of 20 rows: .05 * sqrt(2 / 12)
    told = "-0.15 [-0.20, -0.10] | [-0.22, -0.08] | p = 0.012 | p = 1.000 | 0.09 | differs |"
    # simultaneous: t of 2 degrees at .05 / 2 contrasts, 6.205 * .05 * sqrt(2 / 12) / sqrt(3) = .073
    assert f"| npo | grok minus fit | 3 | {told}" in part
    assert (
        "Declared before the runs: forget_acc~gold, grok against fit and grok against easy, with npo; bound 0.1" in part
    )
    assert "Everything else is exploratory." in part
    assert "### Paired differences against fit, exploratory" in text
    told = " ".join(verdict(data(arms)))
    assert "Primary contrast, declared beforehand, forget_acc~gold: grok against fit with npo: differs (-0.15;" in told
    assert "detectable 0.09)" in told
    assert "Exploratory: From grok rather than fit" in told
    plain = [replace(o, primary=None) for o in arms]
    assert "xploratory" not in markdown(compare(plain)) + " ".join(verdict(data(plain)))


def test_cells_of_different_seeds_are_no_means_over_all_of_them(arms):
    assert "Means over 3 seeds;" in markdown(compare(arms))
    fewer = [o for o in arms if (o.method, o.seed) != ("ga", 2)]
    assert "Means over 2 to 3 seeds, not all in every cell;" in markdown(compare(fewer))


def test_what_could_not_be_judged_is_said(arms):
    mixed = [replace(o, primary=None) if o.seed == 0 else o for o in arms]
    problem = "3 of its runs were made before it was declared, or for another one"
    assert f"Not judged: {problem}." in markdown(compare(mixed))
    assert f"The primary contrast (forget_acc~gold) is not judged: {problem}." in verdict(data(mixed))
    broken = [replace(o, signs=("gibberish",)) if o.checkpoint == "easy" and o.seed == 2 else o for o in arms]
    assert "not testable: collapsed in seed 2" in markdown(compare(broken))
    assert "grok against easy with npo: not testable: collapsed in seed 2." in " ".join(verdict(data(broken)))


def test_start_models_that_training_did_not_look_at_stand_with_what_evaluation_found(arms):
    found = {"fit": 0.40, "grok": 0.96, "easy": 0.90}

    def evaluated(o):
        lines = {
            "retain_acc": {"value": 0.5, "start": 1.0, "n": 20},
            "retain_inf_acc": {"value": 0.1, "n": 20, "start": found[o.checkpoint]},
        }
        return replace(o, metrics={**o.metrics, **lines})

    late = {"easy": {"start_train_acc": None, "start_held_out_acc": None}}
    unseen = [replace(evaluated(o), **late.get(o.checkpoint, {})) for o in arms]
    (grid,) = starts(compare(unseen), ("fit", "easy", "grok"))
    rows = {row.cells[0]: row.cells for row in grid.rows}
    assert grid.columns[5:] == ("kept facts", "kept two-hop", "kept two-hop less that of its match")
    assert rows["easy"][3:5] == ("–", "–")
    assert rows["easy"][5:7] == ("1.000 ±0.000", "0.900 ±0.000")
    assert rows["easy"][7] == "-0.060 [-0.060, -0.060] (grok)"
    (grid,) = starts(compare([evaluated(o) for o in arms]), ("fit", "easy", "grok"))
    assert "kept facts" not in grid.columns, "every training looked at its own model"
    nobody = [replace(o, start_train_acc=None, start_held_out_acc=None) for o in unseen]
    (grid,) = starts(compare(nobody), ("easy", "grok"))
    assert grid.rows[0].cells[3:] == ("–", "–", "1.000 ±0.000", "0.900 ±0.000", "-0.060 [-0.060, -0.060] (grok)")


def test_start_models_stand_with_their_accuracies_and_controls_beside_their_match(arms):
    (grid,) = starts(compare(arms), ("fit", "grok", "easy"))
    rows = {row.cells[0]: row.cells[1:] for row in grid.rows}
    assert rows["fit"] == ("3", "400", "1.000 ±0.000", "0.300 ±0.000", "")
    # .95 .96 .97 against .97: -.01, sd .01, and t = 4.3027 for 3 seeds
    assert rows["easy"] == ("3", "400", "1.000 ±0.000", "0.960 ±0.025", "-0.010 [-0.035, +0.015] (grok)")
    two = [o for o in arms if o.seed < 2]
    (short,) = starts(compare(two), ("grok", "easy"))
    assert short.rows[-1].cells[-1] == "-0.015 (grok)"
    untold = [replace(o, start_held_out_acc=None, metrics={"forget_acc": o.metrics["forget_acc"]}) for o in arms]
    assert starts(compare(untold), ("fit",)) == []
    (plain,) = starts(compare([replace(o, match=None) for o in arms]), ("fit", "easy"))
    assert plain.columns == ("checkpoint", "seeds", "step", "train acc", "held-out acc")
    assert not any("data of" in note for note in grid.notes)
    own = [replace(o, request="other" if o.control else "usual") for o in arms]
    assert any("easy: trained on data of its own" in note for note in starts(compare(own), ("easy",))[0].notes)


def test_the_page_and_the_json_show_both(arms):
    page = render(data(arms))
    assert "Primary contrast: forget_acc~gold" in page
    assert "Start models" in page
    told = json.loads(json.dumps(as_json(compare(arms))))
    assert told["primary"]["declared"]["bound"] == 0.1
    assert [x["verdict"] for x in told["primary"]["contrasts"]] == ["differs", "differs"]
    easy = told["starts"][-1]
    assert (easy["checkpoint"], easy["match"], easy["models"][1]["start_held_out_acc"]) == ("easy", "grok", 0.96)
    assert as_json(compare([replace(o, primary=None) for o in arms]))["primary"] is None


@pytest.mark.parametrize(("bound", "digits"), [(30.0, 2), (0.1, 2), (0.05, 3), (0.01, 3), (0.002, 4)])
def test_numbers_are_as_fine_as_the_bound_asks(bound, digits):
    assert digits_for(bound) == digits


def test_another_training_at_the_same_step_is_no_same_model(arms):
    assert same_model_notes(compare([o for o in arms if o.checkpoint != "grok"])) == []
    scaled = [replace(o, checkpoint="fit_scaled", control=False) if o.control else o for o in arms]
    assert same_model_notes(compare([o for o in scaled if o.checkpoint != "grok"])) == []
    assert same_model_notes(compare(arms)), "fit and grok at one step are"


def test_the_run_worth_showing_is_of_the_main_run(make_study):
    runs = make_study([0], ("fit", "post", "twin"))
    chosen = pick_run(runs)
    assert chosen is not None
    assert chosen.checkpoint == "post"
    alone = pick_run([o for o in runs if o.checkpoint == "twin"])
    assert alone is not None
    assert alone.checkpoint == "twin"


def test_controls_are_told_apart_from_the_main_run(tmp_path, grok_folder, make_study):
    for run, place in (("seed0", "runs"), ("seed0", "controls/easy"), ("seed1", "controls/easy")):
        grok_folder(tmp_path / place / run, seed=int(run[-1]), grokked=place != "runs")
        grok_folder(tmp_path / place / f"{run}-gold", seed=int(run[-1]), gold=True, grokked=place != "runs")
    runs = report_data([tmp_path]).runs
    assert {(r.control, r.folder.name) for r in runs if not r.gold} == {
        (None, "seed0"), ("easy", "seed0"), ("easy", "seed1"),
    }  # fmt: skip
    told = data(make_study([0], ("fit", "easy")), runs)
    text = " ".join(verdict(told))
    assert "The model did not grok" in text
    assert "Controls, by what the detector calls their training (models): easy: grok-weak (2)." in text
    assert missing_kinds(told) == ("early", "grok", "post"), "a kind nobody asked a control for is not missing"
    assert "Nothing was unlearned from grok and post: no model reached it together with its gold" in text
    only = [r for r in runs if r.control]
    assert "did not grok" not in " ".join(verdict(data(make_study([0], ("easy",)), only)))


def test_every_known_checkpoint_has_a_colour_a_marker_and_words():
    assert set(ORDER) <= COLOURS.keys() & MARKERS.keys() & KIND_WORDS.keys()
    assert len({COLOURS[kind] for kind in ORDER}) == len({MARKERS[kind] for kind in ORDER}) == len(ORDER)
    assert ORDER[: len(MAIN)] == MAIN


def test_the_order_of_the_grids(arms):
    titles = [grid.title.split(":")[0] for grid in grids(compare(arms))]
    assert titles[1:5] == [
        "Primary contrast",
        "Start models",
        "Unlearning from fit (memorised)",
        "Unlearning from grok (grokked)",
    ]
    assert titles[5].startswith("Unlearning from easy (control")
