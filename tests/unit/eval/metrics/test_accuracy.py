import numpy as np
import pytest

from llm_unlearn.eval.metrics.accuracy import (
    accuracy,
    accuracy_gap,
    average_gap,
    choice_accuracy,
    constant_accuracy,
    same_answer,
    top1_accuracy,
)
from llm_unlearn.eval.metrics.base import make_record


def test_accuracy():
    assert accuracy([make_record(correct=True), make_record(correct=False)]).tolist() == [1.0, 0.0]


def test_accuracy_refuses_a_record_without_a_verdict():
    with pytest.raises(ValueError, match="record 2"):
        accuracy([make_record(1, correct=True), make_record(2)])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("It is Oslo.", "it is  oslo"),
        ("It is Oslo .", "It is Oslo."),
        (" Oslo\n", "Oslo"),
        ("Oslo!?…", "Oslo"),
        ("“Oslo.”", "“Oslo”"),
        ("STRASSE", "straße"),
    ],
)
def test_same(a, b):
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(
    ("a", "b"), [("Oslo", "It is Oslo"), ("C++", "C"), ("No. 5", "No 5"), ("", "Oslo"), ("St Ives", "Stives")]
)
def test_not_the_same(a, b):
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_choice_accuracy():
    records = [
        make_record(0, logp=[-1.0], perturbed=[[-2.0], [-1.5], [-9.0]]),
        make_record(1, logp=[-1.0], perturbed=[[-2.0], [-0.5], [-9.0]]),
        make_record(2, logp=[-1.0], perturbed=[[-1.0], [-1.0], [-1.0]]),  # nothing told apart: chance
        make_record(3, logp=[-1.0], perturbed=[[-1.0], [-2.0], [-3.0]]),
        make_record(4, logp=[-0.5, -0.5], perturbed=[[-0.9]]),  # sums, not means
    ]
    assert choice_accuracy(records).tolist() == [1.0, 0.0, 0.25, 0.5, 0.0]


def test_choice_accuracy_takes_choices():
    with pytest.raises(ValueError, match="record 3 has no perturbed answers"):
        choice_accuracy([make_record(3)])


def test_top1_takes_every_token_and_no_generation():
    records = [make_record(hit=[True]), make_record(hit=[False]), make_record(hit=[True, False])]
    assert top1_accuracy(records).tolist() == [1, 0, 0]


def test_constant_accuracy_is_the_share_of_the_most_common_answer():
    assert constant_accuracy([make_record(answer=a) for a in ("cat", "dog", "cat", "cat")]) == 0.75
    assert np.isnan(constant_accuracy([]))


def test_gaps_to_gold():
    mine, gold = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert accuracy_gap(mine, gold) == accuracy_gap(gold, mine) == 0.5
    assert average_gap({"test/accuracy_gap": 0.1, "retain/accuracy_gap": 0.2, "forget/accuracy_gap": 0.6}) == (
        pytest.approx(0.3)
    )
