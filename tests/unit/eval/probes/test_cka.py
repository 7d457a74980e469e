"""CKA: the estimator's bias, its invariances, and the peer's two implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.cka import cka, cka_biased, cka_paper, hsic1, matched_rows, shuffle_null


def normal(n, h, seed):
    return torch.randn(n, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unrelated_rows_have_none_and_the_biased_one_does_not_see_that():
    values = np.array([cka(normal(32, 20, 2 * k), normal(32, 20, 2 * k + 1)) for k in range(400)])
    error = values.std(ddof=1) / 400**0.5
    assert abs(values.mean()) < 2 * error, "unbiased numerator: 0 within two standard errors"
    biased = np.array([cka_biased(normal(32, 20, 2 * k), normal(32, 20, 2 * k + 1)) for k in range(100)])
    assert biased.mean() > 0.3
    assert biased.mean() > 20 * biased.std() / 10


def test_hsic_is_the_sum_over_quadruples_of_different_rows():
    """Song et al. 2012, eq. 4: the U-statistic, written out for 6 rows."""
    from itertools import permutations

    k, l = (f @ f.T for f in (normal(6, 3, 0), normal(6, 2, 1)))  # noqa: E741
    total = 0.0
    for i, j, q, r in permutations(range(6), 4):
        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
    assert float(hsic1(k, l)) == pytest.approx(total / (6 * 5 * 4 * 3), rel=1e-10)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(4, 40), h=st.integers(1, 12), seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_it_does_not_mind_rotations_scales_and_shifts(n, h, seed, scale):
    x, y = normal(n, h, seed), normal(n, 5, seed + 1)
    turn, _ = torch.linalg.qr(normal(h, h, seed + 2))
    moved = scale * x @ turn + normal(1, h, seed + 3)
    for value in (cka, cka_biased):
        assert value(moved, y) == pytest.approx(value(x, y), rel=1e-6, abs=1e-8, nan_ok=True)
        assert value(x, y) == pytest.approx(value(y, x), rel=1e-9, abs=1e-12, nan_ok=True)
    assert cka(moved, x) == pytest.approx(1, abs=1e-6, nan_ok=True)
    assert cka_biased(moved, x) == pytest.approx(1, abs=1e-6)


def test_it_minds_another_linear_map():
    x = normal(60, 4, 0)
    assert cka(x, x @ torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64))) < 0.8


def test_batches_average_the_terms_before_the_ratio():
    x = normal(50, 6, 0)
    y = x + normal(50, 6, 1)
    parts = [slice(0, 16), slice(16, 32), slice(32, 50)]  # the last two rows make no batch of their own
    terms = [[float(hsic1(*pair)) for pair in ((x[p] @ x[p].T, y[p] @ y[p].T), (x[p] @ x[p].T,) * 2,
              (y[p] @ y[p].T,) * 2)] for p in parts]  # fmt: skip
    kl, kk, ll = np.mean(terms, 0)
    assert cka(x, y, batch=16) == pytest.approx(kl / np.sqrt(kk * ll), rel=1e-10)
    assert cka(x, y, batch=16) == pytest.approx(cka(x, y), abs=0.1)


def test_the_paper_s_number_lies_in_its_null_for_unrelated_rows():
    found = cka_paper(normal(30, 16, 0), normal(45, 16, 1))
    low, _, high = found["null_quantiles"]
    assert found["n"] == 30
    assert found["value"] != cka_biased(normal(30, 16, 0), normal(45, 16, 1)[:30]), "the first rows are no sample"
    assert found["value"] != cka_paper(normal(30, 16, 0), normal(45, 16, 1), seed=1)["value"]
    assert cka_paper(normal(30, 16, 0), normal(30, 16, 1))["value"] == cka_biased(normal(30, 16, 0), normal(30, 16, 1))
    assert 0.2 < low < found["null_mean"] < high < 0.5, "a third, of nothing"
    assert low - 0.02 < found["value"] < high + 0.02


def test_a_shuffle_takes_the_likeness_of_pairs_away():
    x = normal(40, 6, 0)
    low, middle, high = shuffle_null(x, x + 0.1 * normal(40, 6, 1))
    assert low < 0 < high < 0.5 < cka(x, x + 0.1 * normal(40, 6, 1))
    assert abs(middle) < 0.1


def test_rows_are_paired_within_relation_and_wording():
    forget = [QARow(f"f{i}", "a", relation=r, template="w") for i, r in enumerate("xxyz")]
    retain = [QARow(f"r{i}", "a", relation=r, template="w") for i, r in enumerate("yxxxq")]
    mine, theirs = matched_rows(forget, retain, 0)
    assert mine == [0, 1, 2]
    assert len(set(theirs)) == 3
    assert [retain[j].relation for j in theirs] == ["x", "x", "y"]


def test_bad_use_is_told():
    with pytest.raises(UserError, match="at least 4 rows, got 3"):
        cka(normal(3, 2, 0), normal(3, 2, 1))
    with pytest.raises(UserError, match="at least 4 rows, got 3"):
        cka_paper(normal(3, 2, 0), normal(9, 2, 1))
    with pytest.raises(UserError, match="at least 4 rows, got 0"):
        cka(normal(0, 2, 0), normal(0, 2, 1))
    with pytest.raises(UserError, match="got 5 and 6"):
        cka(normal(5, 2, 0), normal(6, 2, 1))
    with pytest.raises(UserError, match="batches of at least 4"):
        cka(normal(9, 2, 0), normal(9, 2, 1), batch=3)
    assert np.isnan(cka(torch.ones(5, 2), normal(5, 2, 0)))
