"""What must hold for any records: ranges, order, and the relations between metrics."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.eval.metrics.base import make_record, mean_of_items
from llm_unlearn.eval.metrics.model_utility import PARTS, model_utility
from llm_unlearn.eval.metrics.table import METRICS

WORDS = st.lists(st.sampled_from(["oslo", "Bergen", "it", "is", "."]), max_size=6).map(" ".join)
LOGPS = st.lists(st.floats(-60, 0), min_size=1, max_size=6)
MIGHT_EXCEED_1 = {"truth_ratio", "truth_ratio_arithmetic", "loss", "zlib_loss", "min_k", "grad_norm"}
OF_THE_ITEMS_UNIT = {"forget_wasserstein", "accuracy_gap"}  # distances that are as large as the items let them
MIGHT_BE_NEGATIVE = {"min_k_plus_plus"}
ITEM = [metric for metric in METRICS.values() if metric.kind == "item"]
VERSUS = [metric for metric in METRICS.values() if metric.kind == "versus"]


@st.composite
def record(draw):
    logp = draw(LOGPS)
    return make_record(
        logp=logp,
        hit=draw(st.lists(st.booleans(), min_size=len(logp), max_size=len(logp))),
        has_eos=draw(st.booleans()),
        paraphrase=draw(LOGPS),
        perturbed=draw(st.lists(LOGPS, min_size=1, max_size=3)),
        answer=draw(WORDS),
        generation=draw(WORDS),
        correct=draw(st.booleans()),
        grad_norm=draw(st.floats(0, 10)),
        vocabulary=([-3.0] * len(logp), draw(st.lists(st.floats(0, 4), min_size=len(logp), max_size=len(logp)))),
    )


RECORDS = st.lists(record(), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_item_scores_are_in_range(records):
    for metric in ITEM:
        items = metric.fn(records)
        known = items[~np.isnan(items)]
        top = math.inf if metric.name in MIGHT_EXCEED_1 | MIGHT_BE_NEGATIVE else 1 + 1e-12
        assert ((known >= (-math.inf if metric.name in MIGHT_BE_NEGATIVE else 0)) & (known <= top)).all(), metric.name


@settings(max_examples=40, deadline=None)
@given(RECORDS, st.randoms(use_true_random=False))
def test_order_of_records_changes_nothing(records, random):
    order = list(range(len(records)))
    random.shuffle(order)
    for metric in ITEM:
        items = metric.fn(records)
        shuffled = metric.fn([records[i] for i in order])
        np.testing.assert_array_equal(shuffled, items[order], err_msg=metric.name)
        np.testing.assert_allclose(mean_of_items(shuffled), mean_of_items(items), rtol=1e-12, err_msg=metric.name)


@settings(max_examples=40, deadline=None)
@given(RECORDS)
def test_relations_between_metrics(records):
    value = {metric.name: metric.fn(records) for metric in ITEM}
    assert (value["probability_with_options"] <= 1).all()
    # the arithmetic mean of wrong probabilities is never below the geometric one
    assert (value["truth_ratio"] <= value["truth_ratio_arithmetic"] * (1 + 1e-12)).all()
    assert (value["rougeL_recall"] <= value["rouge1_recall"] + 1e-12).all()
    strength, exact = value["extraction_strength"], value["exact_memorization"]
    applies = ~np.isnan(strength)
    assert (applies == ~np.isnan(exact)).all()
    assert (strength[applies] <= exact[applies] + 1e-12).all()
    assert (strength[applies] <= value["extraction_strength_openunlearning"][applies]).all()


SAMPLES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(0, 100), min_size=n, max_size=n) for _ in range(2)))
)


@pytest.mark.filterwarnings("ignore:ks_2samp")  # scipy rounds a p of 1 to just above it at n = 5, and says so
@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.randoms(use_true_random=False))
def test_distance_from_gold_is_symmetric_in_range_and_blind_to_order(samples, random):
    model, gold = (np.array(sample) for sample in samples)
    shuffled = list(model)
    random.shuffle(shuffled)
    for metric in VERSUS:
        there, back = metric.fn(model, gold), metric.fn(gold, model)
        np.testing.assert_allclose(metric.fn(np.array(shuffled), gold), there, rtol=1e-9, atol=1e-12)
        if metric.name == "forget_effect_size":
            np.testing.assert_allclose(there, -back, rtol=1e-9)
        else:
            np.testing.assert_allclose(there, back, rtol=1e-9)
            assert 0 <= there <= (100 if metric.name in OF_THE_ITEMS_UNIT else 1)


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_utility_lies_between_the_worst_part_and_the_mean(values):
    utility = model_utility(dict(zip(PARTS, values, strict=True)))
    assert 0 <= utility <= np.mean(values) + 1e-12
    assert utility >= min(values) * (1 - 1e-12) - 1e-300  # the inverse of a subnormal part overflows
