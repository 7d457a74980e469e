import numpy as np
import pytest
from scipy import stats as scipy_stats

from llm_unlearn.stats import (
    detectable_effect,
    deviation_interval,
    equivalence,
    holm,
    mean_interval,
    paired_difference,
    paired_spread,
    variance_ratio,
    wilson,
)


def test_mean_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])  # sd 1; with 2 degrees of freedom t has a closed form: 4.302653
    t = 0.95 * np.sqrt(2 / (1 - 0.95**2))
    assert (found.mean, found.n) == (2.0, 3)
    assert found.hi - found.mean == pytest.approx(t / np.sqrt(3), rel=1e-12)
    assert found.mean - found.lo == pytest.approx(found.hi - found.mean)


def test_paired_difference_agrees_with_scipy():
    a, b = [0.9, 0.7, 0.8, 0.95], [0.5, 0.65, 0.6, 0.55]
    found, reference = paired_difference(a, b, level=0.9), scipy_stats.ttest_rel(a, b)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-12)
    assert (found.lo, found.hi) == pytest.approx(tuple(reference.confidence_interval(0.9)), rel=1e-12)
    assert found.mean == pytest.approx(0.2625)


def test_paired_difference_without_spread():
    assert paired_difference([1, 1, 1], [1, 1, 1]).p == 1
    found = paired_difference([2, 2, 2], [1, 1, 1])
    assert (found.lo, found.hi, found.p) == (1, 1, 0.25), "three heads or three tails of a fair coin"
    assert paired_difference([2] * 6, [1] * 6).p == 2 / 2**6
    # in binary .3 - .1 and 1.2 - 1 are not the same number
    assert paired_difference([0.3, 1.2, 2.2], [0.1, 1.0, 2.0]).p == 0.25


def test_numbers_on_a_grid_are_never_surer_than_their_rounding():
    step = 0.1 * np.sqrt(18)  # rounding of both: sd step * sqrt(2 / 12), standard error over 3 pairs step / sqrt(18)
    found = paired_difference([2, 2, 2], [1, 1, 1], resolution=step)
    t = 0.95 * np.sqrt(2 / (1 - 0.95**2))  # 2 degrees of freedom have closed forms
    assert (found.mean, found.lo, found.hi) == pytest.approx((1, 1 - 0.1 * t, 1 + 0.1 * t))
    assert found.p == pytest.approx(1 - 10 / np.sqrt(2 + 10**2))
    assert paired_difference([1, 1, 1], [1, 1, 1], resolution=step).p == 1
    wide = [0.9, 0.7, 0.8], [0.5, 0.65, 0.6]
    assert paired_difference(*wide, resolution=0.01) == paired_difference(*wide), "spread beyond rounding counts alone"


def test_paired_difference_refusals():
    with pytest.raises(ValueError, match="3 seeds needed, got 2"):
        paired_difference([1, 2], [1, 2])
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        paired_difference([1, 2, np.nan], [1, 2, 3])
    with pytest.raises(ValueError, match="level"):
        paired_difference([1, 2, 3], [1, 2, 4], level=95)
    with pytest.raises(ValueError, match="2 seeds"):
        mean_interval([1])


A, B = [0.9, 0.7, 0.8, 0.95, 0.6], [0.85, 0.72, 0.8, 0.9, 0.63]


@pytest.mark.parametrize("bound", [0.05, 0.1, 0.005])
def test_equivalence_agrees_with_two_one_sided_tests_of_scipy(bound):
    found = equivalence(A, B, bound)
    d = np.subtract(A, B)
    above = scipy_stats.ttest_1samp(d, -bound, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(d, bound, alternative="less").pvalue
    assert found.p == pytest.approx(max(above, below), rel=1e-10)
    assert equivalence(B, A, bound).p == pytest.approx(found.p), "whichever is taken from which"
    reference = scipy_stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert (found.lo, found.hi, found.n) == (pytest.approx(reference.low), pytest.approx(reference.high), 5)
    assert (found.p < 0.05) == (-bound < found.lo and found.hi < bound)


def test_equivalence_outside_the_bounds_and_without_spread():
    assert equivalence([2.0, 2.1, 1.9], [1, 1, 1], 0.5).p > 0.5
    assert equivalence([1, 1, 1], [1, 1, 1], 0.1).p == 0.125, "three heads"
    assert equivalence([2, 2, 2], [1, 1, 1], 1.0).p == 1
    step = 0.1 * np.sqrt(18)  # a standard error of .1
    t = 0.5 / 0.1
    assert equivalence([1, 1, 1], [1, 1, 1], 0.5, resolution=step).p == pytest.approx(0.5 - t / np.sqrt(2 + t * t) / 2)


def test_equivalence_keeps_its_level_at_the_bound():
    rng = np.random.default_rng(3)
    found = [equivalence(rng.normal(0.5, 0.2, 8), np.zeros(8), 0.5).p <= 0.05 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.05, abs=0.014)  # 4 standard errors


@pytest.mark.parametrize(
    ("bound", "alpha", "said"), [(0.0, 0.05, "above 0"), (np.inf, 0.05, "above 0"), (0.1, 0.5, "alpha")]
)
def test_equivalence_refusals(bound, alpha, said):
    with pytest.raises(ValueError, match=said):
        equivalence(A, B, bound, alpha)


@pytest.mark.parametrize(
    ("n", "alpha", "power"), [(3, 0.05, 0.8), (5, 0.05 / 6, 0.8), (10, 0.05, 0.9), (40, 0.01, 0.8)]
)
def test_a_detectable_effect_is_found_with_its_power(n, alpha, power):
    effect = detectable_effect(2.0, n, alpha, power)
    shift, critical = effect / 2.0 * np.sqrt(n), scipy_stats.t.ppf(1 - alpha / 2, n - 1)
    assert scipy_stats.nct.sf(critical, n - 1, shift) == pytest.approx(power, abs=1e-6)
    assert detectable_effect(1.0, n, alpha, power) == pytest.approx(effect / 2)


def test_a_detectable_effect_in_simulated_studies():
    effect, rng = detectable_effect(1.0, 10), np.random.default_rng(5)
    found = [paired_difference(rng.normal(effect, 1, 10), np.zeros(10)).p <= 0.05 for _ in range(3000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)  # 4 standard errors


@pytest.mark.parametrize("values", [(-1.0, 5), (np.nan, 5), (1.0, 1), (1.0, 5, 0.9, 0.8), (1.0, 5, 0.05, 1.0)])
def test_detectable_effect_refusals(values):
    with pytest.raises(ValueError, match="detectable_effect"):
        detectable_effect(*values)


def test_the_spread_is_that_of_the_differences_and_not_below_the_rounding():
    assert paired_spread(A, B) == pytest.approx(np.subtract(A, B).std(ddof=1))
    assert paired_spread([1, 1, 1], [1, 1, 1], resolution=0.6) == pytest.approx(0.6 * np.sqrt(1 / 6))


def test_paired_interval_covers_and_p_is_level_at_five_seeds():
    rng = np.random.default_rng(0)
    runs = 2000
    found = []
    for _ in range(runs):
        shared = rng.normal(0, 5, 5)  # the seed's own level: pairing takes it out
        found.append(paired_difference(shared + rng.normal(0.3, 1, 5), shared + rng.normal(0, 1, 5)))
    covered = np.mean([d.lo <= 0.3 <= d.hi for d in found])
    assert covered == pytest.approx(0.95, abs=0.02)  # 4 standard errors
    assert np.mean([(d.p <= 0.05) == (d.lo > 0 or d.hi < 0) for d in found]) == 1


def test_wilson_matches_scipy_and_stays_inside():
    for successes, n in ((0, 10), (3, 10), (10, 10), (81, 263)):
        found = wilson(successes, n)
        reference = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (found.lo, found.hi) == pytest.approx((reference.low, reference.high), abs=1e-12)
        assert 0 <= found.lo <= found.mean <= found.hi <= 1
    assert (wilson(0, 10).lo, wilson(10, 10).hi) == (0, 1)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refusals(successes, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(successes, n)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, then the running maximum
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([]).shape == (0,)


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.1, 1.2])
    with pytest.raises(ValueError, match="finite"):
        holm([0.1, np.nan])


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(4)
    rejected = [(holm(rng.uniform(size=8)) <= 0.05).any() for _ in range(4000)]
    assert np.mean(rejected) <= 0.065  # bound .05 + 4 standard errors


def test_a_deviation_and_a_ratio_of_variances_by_hand():
    x = np.array([0.0, 1.0, 2.0, 5.0])
    logs = np.log([np.delete(x, i).var(ddof=1) for i in range(4)])
    pseudo = 4 * np.log(x.var(ddof=1)) - 3 * logs
    half = scipy_stats.t.ppf(0.975, 3) * pseudo.std(ddof=1) / 2
    found = deviation_interval(x)
    assert (found.mean, found.n) == (pytest.approx(x.std(ddof=1)), 4)
    assert (found.lo, found.hi) == pytest.approx(tuple(np.exp((pseudo.mean() + np.array([-half, half])) / 2)))
    ratio = variance_ratio(3 * x, x)
    assert (ratio.mean, ratio.lo, ratio.hi) == pytest.approx((9, 9, 9)), "pairs: the same seeds, three times as far"
    assert ratio.p < 1e-9
    other = [1.0, 0.0, 4.0, 2.0]
    there, back = variance_ratio(x, other), variance_ratio(other, x)
    assert (back.mean, back.lo, back.hi, back.p) == pytest.approx((1 / there.mean, 1 / there.hi, 1 / there.lo, there.p))
    assert variance_ratio(x, x[::-1]).mean == pytest.approx(1)
    both = variance_ratio(np.stack([x, 2 * x], 1), np.stack([other, other], 1))
    assert both.mean == pytest.approx(2 * there.mean), "geometric mean of r and 4 r"
    assert (both.lo, both.hi, both.p < there.p) == (pytest.approx(2 * there.lo), pytest.approx(2 * there.hi), True)


def test_spread_below_the_grid_is_the_grids():
    same = [1.0, 1.0, 1.0, 1.0]
    found = deviation_interval(same, resolution=0.1)
    assert (found.mean, found.lo, found.hi) == pytest.approx((0.1 / np.sqrt(12),) * 3)
    wide = [1.0, 3.0, 2.0, 5.0]
    assert variance_ratio(wide, same, resolution=0.1).mean == pytest.approx(np.var(wide, ddof=1) / (0.01 / 12) + 1)
    assert variance_ratio(wide, wide, resolution=0.1).p == 1
    with pytest.raises(ValueError, match="neither side varies"):
        variance_ratio(same, [1.0, 1.1, 1.0, 1.1], resolution=0.1)
    for call in (lambda: deviation_interval(same), lambda: variance_ratio([1, 2, 3, 4], same)):
        with pytest.raises(ValueError, match="say on which grid"):
            call()


def test_refusals_of_spread():
    with pytest.raises(ValueError, match="at least 4 seeds needed, got 3"):
        deviation_interval([1, 2, 3])
    with pytest.raises(ValueError, match="match them by seed"):
        variance_ratio([1, 2, 3, 4], [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="level"):
        variance_ratio([1, 2, 3, 4], [1, 2, 3, 5], level=1)
    with pytest.raises(ValueError, match="finite"):
        deviation_interval([1, 2, np.inf, 3])


@pytest.mark.parametrize(
    ("draw", "sd", "least"),
    [
        (lambda rng, size: rng.normal(size=size), 1.0, (0.93, 0.93)),
        (lambda rng, size: rng.standard_t(5, size), np.sqrt(5 / 3), (0.90, 0.91)),
        (lambda rng, size: rng.exponential(size=size), 1.0, (0.86, 0.88)),  # as the docstrings say: not quite
    ],
    ids=["normal", "t5", "exponential"],
)
def test_intervals_of_spread_cover_at_five_seeds(draw, sd, least):
    rng, runs = np.random.default_rng(3), 1500
    ones, ratios, levels = [], [], []
    for _ in range(runs):
        x, y = draw(rng, (2, 5))
        y = 0.6 * x + 0.8 * y  # seeds move both sides
        one, ratio = deviation_interval(x), variance_ratio(2 * x, y)
        ones.append(one.lo <= sd <= one.hi)
        ratios.append(ratio.lo <= 4 <= ratio.hi)
        levels.append((ratio.p <= 0.05) == (ratio.lo > 1 or ratio.hi < 1))
    assert least[0] <= np.mean(ones) <= 0.98
    assert least[1] <= np.mean(ratios) <= 0.98
    assert all(levels)


@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0])
def test_equal_spreads_on_a_grid_are_seldom_told_apart(sd):
    rng, runs = np.random.default_rng(4), 600
    told = 0
    for _ in range(runs):
        a, b = np.round(rng.uniform(-0.5, 0.5, (2, 1)) + sd * rng.normal(size=(2, 5)))
        try:
            told += variance_ratio(a, b, resolution=1.0).p <= 0.05
        except ValueError:
            continue  # below the grid nothing is said
    assert told / runs <= 0.08
