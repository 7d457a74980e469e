"""The suite of classifiers on records made by hand: an image is a row whose answer is one token."""

import numpy as np
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.compute import compute, values
from llm_unlearn.eval.metrics.base import make_record
from llm_unlearn.eval.metrics.mia import auc, reference_loss
from llm_unlearn.eval.sources import RecordSource
from llm_unlearn.eval.suite import load_suite

N = 10
NAMES = ("test", "retain", "forget", "holdout", "bystander")
P = {"model": 0.6, "gold": 0.5}


def records(split, right, p, names=("cat", "dog")):
    """N images, the first `right` of them classified rightly; each its own cluster."""
    return [
        make_record(
            i, logp=[np.log(p * (i + 1) / N)], hit=[i < right], answer=names[i % len(names)], author=f"{split}/{i}"
        )
        for i in range(N)
    ]


def source(label, **right):
    return RecordSource({name: records(name, right[name], P[label]) for name in NAMES}, label)


MODEL = {"test": 6, "retain": 9, "forget": 2, "holdout": 1, "bystander": 7}
GOLD = {"test": 8, "retain": 10, "forget": 4, "holdout": 4, "bystander": 8}


@pytest.fixture(scope="module")
def suite():
    return load_suite("vision")


@pytest.fixture(scope="module")
def lines(suite):
    return compute(suite, source("model", **MODEL), source("gold", **GOLD))


def test_accuracies_probabilities_and_losses(lines):
    assert {name: lines[f"{name}_acc"]["value"] for name in NAMES} == {name: n / N for name, n in MODEL.items()}
    assert lines["forget_acc"]["direction"] == "gold"
    assert lines["test_acc"]["direction"] == lines["bystander_acc"]["direction"] == "up"
    assert lines["test_acc"]["ci"][0] < 0.6 < lines["test_acc"]["ci"][1]
    assert lines["forget_Q_A_Prob"]["value"] == pytest.approx(0.6 * 0.55)
    assert lines["test_loss"]["value"] == pytest.approx(-np.log(0.6 * np.arange(1, 11) / 10).mean())
    assert lines["test_chance"]["value"] == lines["retain_chance"]["value"] == 0.5


def test_gaps_to_gold_and_their_mean(lines):
    gaps = {"test": 0.2, "retain": 0.1, "forget": 0.2}
    for name, gap in gaps.items():
        assert lines[f"{name}_gap"]["value"] == pytest.approx(gap)
        assert (lines[f"{name}_gap"]["direction"], lines[f"{name}_gap"]["n"]) == ("down", N)
    assert lines["average_gap"]["value"] == pytest.approx(np.mean(list(gaps.values())))
    assert lines["average_gap"]["n"] == 3


def test_gold_has_no_gap_and_without_gold_there_is_none(suite):
    gold = source("gold", **GOLD)
    names = ("test_gap", "retain_gap", "forget_gap", "average_gap")
    assert [values(suite, gold, gold)[name] for name in names] == [0, 0, 0, 0]
    alone = compute(suite, gold)
    assert [alone[name]["value"] for name in (*names, "mia_reference", "mia_rmia")] == [None] * 6
    assert alone["mia_loss"]["value"] == 0.5


def test_attacks_on_one_token(suite):
    mine, gold = source("model", **MODEL), source("gold", **GOLD)
    mine.records = {**mine.records, "forget": records("forget", 2, 0.9)}
    found = compute(suite, mine, gold)
    losses = [-np.log(p * np.arange(1, 11) / 10) for p in (0.9, 0.6)]
    assert found["mia_loss"]["value"] == pytest.approx(auc(losses[0], losses[1]))
    assert found["mia_loss"]["value"] > 0.5, "forgotten images are likelier than held-out ones"
    theirs = -np.log(0.5 * np.arange(1, 11) / 10)
    pairs = reference_loss((losses[0], theirs), (losses[1], theirs))
    assert found["mia_reference"]["value"] == auc(*pairs) == 1


def test_average_gap_refuses_a_gold_of_other_images(suite):
    other = source("gold", **GOLD)
    other.records = {**other.records, "test": records("test", 8, 0.5, names=("cat", "owl"))}
    with pytest.raises(UserError, match="other rows than"):
        compute(suite, source("model", **MODEL), other)
