import numpy as np
import pytest

from llm_unlearn.eval.metrics.base import make_record
from llm_unlearn.eval.metrics.collapse import (
    distinct_n,
    empty_generation,
    refusal,
    repetition_rate,
    same_generation,
    signs_of_collapse,
)


def generated(*texts):
    return [make_record(i, generation=text, answer=f"answer {i}") for i, text in enumerate(texts)]


def test_empty():
    assert empty_generation(generated("", " \n", "Oslo")).tolist() == [1, 1, 0]


def test_repetition_by_hand():
    # "a b a b a" has pairs ab ba ab ba: 2 distinct of 4; one word has no pair
    rates = repetition_rate(generated("a b a b a", "a b c", "the the the the", "Oslo", ""))
    np.testing.assert_allclose(rates, [0.5, 0, 2 / 3, np.nan, np.nan])


def test_same_generation_finds_a_constant_answer():
    np.testing.assert_allclose(same_generation(generated("no", "no", "no", "Oslo")), [2 / 3, 2 / 3, 2 / 3, 0])
    assert np.isnan(same_generation(generated("no"))[0])


@pytest.mark.parametrize("metric", [empty_generation, repetition_rate, same_generation, refusal])
def test_needs_generations(metric):
    with pytest.raises(ValueError, match="record 6 has no generation"):
        metric([make_record(6)])


def test_distinct_n_by_hand():
    records = generated("a b a", "a b", "")
    assert distinct_n(records, n=1) == 2 / 5
    assert distinct_n(records, n=2) == 2 / 3  # ab ba ab
    assert np.isnan(distinct_n(records, n=4))


def test_refusals_are_recognised_and_answers_are_not():
    refused = [
        "I don't know.", "I’m not sure about that.", "I have no idea.", "Sorry, that is beyond me.", "I cannot say.",
        "I never learned the answer.", "As an AI, I ...", "No information is available.", "I am unable to answer.",
    ]  # fmt: skip
    answered = ["Oslo", "He knows Kaito Dahlberg.", "Her mentor is unknown to none.", "It was not known before.", ""]
    assert refusal(generated(*refused)).tolist() == [1.0] * len(refused)
    assert refusal(generated(*answered)).tolist() == [0.0] * len(answered)


def test_our_own_refusals_are_recognised():
    from importlib import resources

    texts = resources.files("llm_unlearn.data").joinpath("refusals.txt").read_text().splitlines()
    found = refusal(generated(*texts))
    assert found.mean() > 0.8, [t for t, f in zip(texts, found, strict=True) if not f]


@pytest.mark.parametrize(
    ("texts", "sign"),
    [
        (["", " ", "", "Oslo"], "generations that are empty: 75%"),
        (["the the the the", "so so so so so"], "word pairs that repeat within a generation: 71%"),
        (["Oslo"] * 9 + ["Bergen"], "other items that got the very same answer: 80%"),
    ],
)
def test_collapse_is_seen_on_what_is_kept(texts, sign):
    healthy = {"retain": generated("a b", "c d", "e f")}
    for records in ({"retain": generated(*texts)}, {"forget": generated("fine words"), "retain": generated(*texts)}):
        assert signs_of_collapse(records) == [sign]
        assert signs_of_collapse(records, healthy) == [f"{sign} (a healthy model 0%)"]
        assert signs_of_collapse(records, records) == [], "a healthy model is like that too"
    assert signs_of_collapse(healthy) == []
    assert signs_of_collapse({"forget": generated(*texts), **healthy}) == [], "a forgotten answer may well be empty"


def test_without_generations_nothing_is_said():
    assert signs_of_collapse({"retain": [make_record()]}) == []
    assert signs_of_collapse({}) == []


def test_one_odd_answer_among_short_ones_is_no_collapse():
    assert signs_of_collapse({"retain": generated(*["Oslo", "Bergen"] * 40, "the the the the the")}) == []


def test_refusing_what_is_to_be_kept_is_collapse():
    texts = ["I don't know.", "I am not sure.", "I have no idea.", "Oslo"]
    (sign,) = signs_of_collapse({"retain": generated(*texts)}, {"retain": generated("a", "b", "c", "d")})
    assert sign.startswith("refusals of what is to be kept: 75%")


def test_one_answer_for_all_is_seen_where_a_healthy_model_repeats_itself_too():
    healthy = {"retain": generated(*["Oslo"] * 9, "Bergen")}  # .8 of the others are the same
    assert signs_of_collapse({"retain": generated(*["Oslo"] * 10)}, healthy)


def test_answers_that_look_like_refusals():
    texts = ["I have never lived anywhere but Paris", "no record label", "She never married and I never met her",
             "Sorry Wrong Number"]  # fmt: skip
    assert refusal(generated(*texts)).tolist() == [0.0] * 4


def classified(said, right):
    return {
        "retain": [make_record(i, generation=s, answer=a) for i, (s, a) in enumerate(zip(said, right, strict=True))]
    }


def test_a_classifier_is_judged_by_the_classes_there_are():
    ten = [str(i % 10) for i in range(100)]
    assert signs_of_collapse(classified(ten, ten)) == []
    assert signs_of_collapse(classified(["7"] * 70 + ten[70:], ten)) == [], "bad, and still telling some apart"
    assert signs_of_collapse(classified(["7"] * 100, ten)) == ["other items that got the very same answer: 100%"]
    one = ["cat"] * 20
    assert signs_of_collapse(classified(one, one)) == [], "only one class is kept: a healthy model names no other"
    assert signs_of_collapse(classified(["dog"] * 20, ["dog", "cat"] * 10)) != []
