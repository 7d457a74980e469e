"""Suites: the shipped ones, what they ask to be scored, and their identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.table import METRICS
from llm_unlearn.eval.suite import load_suite, suite_names

BOTH = frozenset({"perturbed", "generation"})
GENERATION = frozenset({"generation"})
WHITE_BOX = frozenset({"gradient", "vocabulary"})
PARTS = {"retain": BOTH, "real_authors": BOTH, "world_facts": BOTH}
SPLITS = {
    "quick": {"forget": GENERATION, "retain": GENERATION},
    "tofu": {"forget": BOTH | WHITE_BOX, "holdout": WHITE_BOX, **PARTS},
    "tofu_world": {
        "forget": BOTH, **PARTS, "forget_para": GENERATION, "forget_inf": GENERATION,
        "forget_trained_inf": GENERATION, "retain_inf": GENERATION,
    },
    "language_study": {
        "forget": BOTH, **PARTS, **{f"forget_{part}": GENERATION for part in ("para", "inf", "trained_inf", "about",
        "through", "inverse")}, "retain_inf": GENERATION, "retain_inverse": GENERATION, "neighbour": GENERATION,
    },
    "muse": {
        "forget_verbmem": GENERATION, "forget_knowmem": GENERATION, "retain_knowmem": GENERATION,
        "forget_text": frozenset({"vocabulary"}), "holdout_text": frozenset({"vocabulary"}),
    },
    "vision": dict.fromkeys(("test", "retain", "forget", "holdout", "bystander"), frozenset()),
    "wmdp": {f"forget_{subject}": frozenset({"perturbed"}) for subject in ("bio", "cyber", "chem")},
}  # fmt: skip


def written(folder: Path, metrics: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\nmetrics: {metrics}\n")
    return str(path)


def test_every_shipped_suite_asks_for_the_splits_it_reads():
    assert {name: load_suite(name).splits() for name in suite_names()} == SPLITS
    assert all(load_suite(name).config.name == name for name in suite_names())


def test_needs_come_from_the_metrics_alone(tmp_path):
    suite = load_suite(written(tmp_path, "{a: {metric: probability, split: forget}, q: {metric: forget_ks, split: x}}"))
    assert suite.splits() == {"forget": frozenset(), "x": frozenset({"perturbed"})}


def test_a_split_may_be_generated_its_own_way():
    suite, turns = load_suite("muse"), ("\n\n", "\nQuestion", "Question:")
    assert suite.generation("forget_verbmem") == (128, ())
    assert suite.generation("forget_knowmem") == suite.generation("retain_knowmem") == (32, turns)
    assert load_suite("tofu").generation("forget") == (200, ())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            "{a: {metric: probability, split: forget}}\ngeneration: {forgot: {stop: [x]}}",
            "no metric reads split 'forgot'",
        ),
        ("{a: {metric: probability, split: forget}}\ndata: wmpd", "data"),
        ("{a: {metric: probabilty, split: forget}}", "a: unknown metric 'probabilty'; did you mean 'probability'"),
        ("{a: {metric: probability}}", "metric 'probability' needs a split"),
        ("{a: {metric: probability, splitt: forget}}", "unknown key 'metrics.a.splitt'"),
    ],
)
def test_a_bad_file_is_refused(metrics, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        load_suite(written(tmp_path, metrics))
    assert "mine.yaml" in str(error.value)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tofu_world'"):
        load_suite("tofu_wrld")
    with pytest.raises(UserError, match="no such file"):
        load_suite(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize(
    ("metrics", "raised"),
    [
        ("{a: {metric: probability, split: forget}}", "probability"),
        ("{q: {metric: forget_quality, split: forget}}", "truth_ratio"),  # what it is computed from
        ("{u: {metric: model_utility}}", "rougeL_recall"),  # one of its parts
    ],
)
def test_the_digest_follows_the_versions_of_its_metrics(metrics, raised, tmp_path, monkeypatch):
    suite = load_suite(written(tmp_path, metrics))
    before = suite.digest
    monkeypatch.setitem(METRICS, "repetition_rate", replace(METRICS["repetition_rate"], version=9))
    assert suite.digest == before, "a metric the suite does not use"
    monkeypatch.setitem(METRICS, raised, replace(METRICS[raised], version=9))
    assert suite.digest != before


def test_the_digest_follows_the_file(tmp_path):
    one = load_suite(written(tmp_path, "{a: {metric: probability, split: forget}}")).digest
    assert load_suite(written(tmp_path, "{a: {metric: probability, split: forget}}")).digest == one
    assert load_suite(written(tmp_path, "{a: {metric: probability, split: retain}}")).digest != one


def test_an_optional_metric_is_left_out_where_its_split_is_not():
    suite = load_suite("vision")
    with_it, without = suite.on(suite.splits()), suite.on(suite.splits().keys() - {"bystander"})
    assert with_it.digest == suite.digest
    assert suite.config.metrics.keys() - without.config.metrics.keys() == {"bystander_acc"}
    assert "bystander" not in without.splits()
    assert without.digest != suite.digest
    assert suite.on(()).config.metrics.keys() == without.config.metrics.keys(), "what is not optional stays"
