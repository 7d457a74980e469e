"""A report of images speaks of images everywhere, and one of texts of questions."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from llm_unlearn.eval.compare import compare
from llm_unlearn.report.collect import ReportData, report_data
from llm_unlearn.report.grids import grids
from llm_unlearn.report.html import training_grid
from llm_unlearn.report.plots import training_curves
from llm_unlearn.report.tables import before_after, markdown
from llm_unlearn.report.verdict import verdict
from llm_unlearn.report.words import IMAGE, TEXT, words_of, words_of_training


@pytest.fixture
def of_images(make_study):
    """Three seeds at two checkpoints, with what the suite of images measures."""
    gone = ("forget_inf_acc", "forget_trained_inf_acc", "retain_inf_acc", "model_utility")
    return [
        replace(o, data="image", metrics={name: line for name, line in o.metrics.items() if name not in gone})
        for o in make_study([0, 1, 2], ("fit", "grok"))
    ]


@pytest.fixture
def run_of_images(tmp_path, grok_folder):
    grok_folder(tmp_path / "a", grokked=False)
    (run,) = report_data([tmp_path]).runs
    return replace(run, config={**run.config, "data": {"kind": "digits"}, "watch": {"until": "grok"}})


def said(outcomes, runs=()) -> str:
    return " ".join(verdict(ReportData(tuple(runs), tuple(outcomes), compare(outcomes), {}, {}, (), ())))


def printed(table) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_the_verdict_and_the_tables_of_images_know_no_questions(of_images):
    text = said(of_images) + markdown(compare(of_images)) + printed(before_after(of_images))
    assert "it still recognises 15% of the forgotten images" in text
    assert "the gap to gold on forgotten images: smaller" in text
    assert "Gap to gold on forgotten images (less is better)" in text
    assert "forget acc: forgotten images still recognised; " in text
    assert "retain acc: the same for what is kept" in text
    for word in ("question", "hop", "ROUGE", "answered"):
        assert word not in text


def test_texts_are_spoken_of_as_before(make_study):
    runs = make_study([0, 1, 2], ("fit", "grok"))
    text = said(runs) + markdown(compare(runs))
    assert "it still answers 15% of the forgotten questions" in text
    assert "forget acc: forgotten questions still answered; " in text
    assert "retain acc, retain two-hop: the same for what is kept" in text
    assert "image" not in text


def test_the_words_are_chosen_by_the_data(of_images, make_outcome):
    assert words_of(of_images) is IMAGE
    assert words_of([*of_images, make_outcome()]) is TEXT
    assert words_of([]) is TEXT
    assert words_of_training({"data": {"kind": "cifar10"}}) is IMAGE
    assert words_of_training({"data": {"kind": "world"}}) is TEXT
    assert words_of_training({}) is TEXT


def test_results_without_answers_say_what_to_do(of_images, make_outcome):
    assert "ROUGE" in printed(before_after([make_outcome(texts={})]))
    assert "do not say which classes" in printed(before_after([replace(o, answers={}) for o in of_images]))


def test_curves_of_images_are_named_so(run_of_images):
    (svg,) = training_curves([run_of_images]).values()
    assert "trained images" in svg
    assert "held-out images" in svg
    assert "hops" not in svg


def test_a_kind_the_training_was_not_to_reach_is_not_missed(of_images, run_of_images):
    """`until: grok` never comes to `post`, which nobody asked for then."""
    fit = [o for o in of_images if o.checkpoint == "fit"]
    assert "Nothing was unlearned from early and grok: no model" in said(fit, [run_of_images])
    whole = replace(run_of_images, config={**run_of_images.config, "watch": {"until": "post"}})
    assert "Nothing was unlearned from early, grok and post: no model" in said(fit, [whole])


def test_a_model_that_generalised_at_once_is_not_called_one_that_never_did(of_images, run_of_images):
    assert "never generalised within 1,600 steps" in said(of_images, [run_of_images])
    easy = replace(run_of_images, report={**run_of_images.report, "phase": "comprehension"})
    assert "never generalised" not in said(of_images, [easy])
    assert training_grid([run_of_images]).rows[0].cells[2] == "not in 1,600"
    assert training_grid([easy]).rows[0].cells[2] == "no jump"


def test_no_grid_of_images_is_empty(of_images):
    assert all(grid.rows and len(grid.columns) > 1 for grid in grids(compare(of_images)))
