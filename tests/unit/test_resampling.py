import numpy as np
import pytest
from scipy.special import ndtr

from llm_unlearn.resampling import auc_draws, cluster_bootstrap, combined_bootstrap


def clustered(rng, n_clusters, size, icc):
    cluster = np.repeat(np.arange(n_clusters), size)
    shared, own = rng.normal(size=n_clusters)[cluster], rng.normal(size=len(cluster))
    return np.sqrt(icc) * shared + np.sqrt(1 - icc) * own, cluster


def test_cluster_bootstrap_covers_where_the_naive_one_does_not():
    rng = np.random.default_rng(1)
    ours, naive = [], []
    for run in range(300):
        items, cluster = clustered(rng, n_clusters=40, size=10, icc=0.3)
        for found, labels in ((ours, cluster), (naive, np.arange(len(items)))):
            interval = cluster_bootstrap(items, labels, n_boot=300, seed=run)
            found.append(interval.lo <= 0 <= interval.hi)
    assert 0.90 <= np.mean(ours) <= 0.98
    assert np.mean(naive) < 0.80  # design effect 1 + 9 * .3 = 3.7: .95 becomes about .69


def test_cluster_bootstrap_of_any_statistic_matches_the_fast_mean():
    items, cluster = clustered(np.random.default_rng(2), 6, 3, 0.5)
    fast = cluster_bootstrap(items, cluster, n_boot=200, seed=3)
    slow = cluster_bootstrap(items, cluster, lambda x: float(np.mean(x)), n_boot=200, seed=3)
    assert (fast.lo, fast.hi) == pytest.approx((slow.lo, slow.hi))
    assert fast.n == 6
    median = cluster_bootstrap(items, cluster, np.median, n_boot=200)
    assert median.mean == np.median(items)
    assert median.lo <= median.mean <= median.hi


def test_cluster_bootstrap_with_unequal_clusters_by_hand():
    # two clusters: the three possible resamples are {a, a}, {a, b}, {b, b}
    found = cluster_bootstrap([0, 0, 0, 4], ["a", "a", "a", "b"], n_boot=2000, level=0.99)
    widened = 2**0.5 * 63.6567 / 2.575829  # sqrt(2 / 1) * t_1 / z at .995
    assert (found.mean, found.n) == (1.0, 2)
    assert (found.lo, found.hi) == pytest.approx((1 - widened, 1 + 3 * widened), rel=1e-5)


def test_cluster_bootstrap_covers_with_a_handful_of_clusters():
    rng, inside = np.random.default_rng(7), []
    for run in range(400):
        items, cluster = clustered(rng, n_clusters=4, size=10, icc=0.3)
        interval = cluster_bootstrap(items, cluster, n_boot=200, seed=run)
        inside.append(interval.lo <= 0 <= interval.hi)
    assert 0.91 <= np.mean(inside) <= 0.98  # percentiles as they are: .80


def test_cluster_bootstrap_leaves_out_what_does_not_apply_and_repeats_exactly():
    with_nan = cluster_bootstrap([1, 2, np.nan, 3], ["a", "b", "c", "d"], seed=5)
    assert with_nan == cluster_bootstrap([1, 2, 3], ["a", "b", "d"], seed=5)
    assert with_nan.n == 3
    assert with_nan == cluster_bootstrap([1, 2, 3], ["a", "b", "d"], seed=5)
    assert with_nan != cluster_bootstrap([1, 2, 3.1], ["a", "b", "d"], seed=5)


def test_combined_bootstrap_of_one_mean_is_the_cluster_bootstrap():
    items, cluster = clustered(np.random.default_rng(2), 6, 3, 0.5)
    alone = cluster_bootstrap(items, cluster, n_boot=4000)
    combined = combined_bootstrap([(items[:, None], cluster)], lambda means: float(means[0]), n_boot=4000)
    assert (combined.mean, combined.n) == (pytest.approx(alone.mean), alone.n)
    # but for the correction, which is small where nothing is bent
    assert [combined.lo, combined.hi] == pytest.approx([alone.lo, alone.hi], abs=0.05 * (alone.hi - alone.lo))
    # scores of one author stay together: what is in both cancels in their difference
    twice = np.stack([items, items + 1], axis=1)
    difference = combined_bootstrap([(twice, cluster)], lambda means: float(means[1] - means[0]), n_boot=200)
    assert (difference.lo, difference.hi) == pytest.approx((1, 1))


def test_combined_bootstrap_covers_a_harmonic_mean_of_three_sets():
    rng, held = np.random.default_rng(4), 0
    for run in range(300):
        strata = []
        for n_clusters, size in ((20, 10), (80, 1), (80, 1)):
            x, cluster = clustered(rng, n_clusters, size, icc=0.3)
            strata.append((np.stack([x > 0.5, rng.random(len(x)) < 0.6], axis=1).astype(float), cluster))
        truth = 6 / (3 / float(ndtr(-0.5)) + 3 / 0.6)
        found = combined_bootstrap(strata, lambda means: float(6 / np.sum(1 / means)), n_boot=200, seed=run)
        held += found.lo <= truth <= found.hi
    assert 0.92 <= held / 300 <= 0.98


def test_combined_bootstrap_draws_strata_apart():
    # of the same clusters drawn alike the sum of a score and its opposite would never vary
    x = np.arange(8.0)[:, None]
    found = combined_bootstrap([(x, np.arange(8)), (-x, np.arange(8))], lambda means: float(means.sum()), n_boot=400)
    one = combined_bootstrap([(x, np.arange(8))], lambda means: float(means[0]), n_boot=400)
    assert found.hi - found.lo > 1.2 * (one.hi - one.lo)


def test_combined_bootstrap_leaves_out_what_does_not_apply_and_refuses():
    sparse = np.full((10, 1), np.nan)
    sparse[[1, 4, 7], 0] = [0.2, 0.5, 0.8]
    alone = cluster_bootstrap(sparse[:, 0], np.arange(10), n_boot=20_000)
    found = combined_bootstrap([(sparse, np.arange(10))], lambda means: float(means[0]), n_boot=20_000)
    assert (found.mean, found.n) == (0.5, 3), "the clusters a score applies to count, not all there are"
    assert [found.lo, found.hi] == [max(0.0, alone.lo), min(1.0, alone.hi)] == [0, 1]
    with pytest.raises(ValueError, match="n_boot must be >= 1"):
        combined_bootstrap([(sparse, np.arange(10))], np.sum, n_boot=0)
    one, two = ([[1.0, np.nan], [3.0, 4.0], [5.0, 8.0]], "abc"), ([[2.0], [2.0]], "ab")
    found = combined_bootstrap([(a, list(b)) for a, b in (one, two)], lambda means: float(means.sum()), n_boot=50)
    assert found.mean == 3 + 6 + 2
    assert found.n == 2
    assert combined_bootstrap([([[1.0], [2.0]], ["a", "a"])], np.sum) is None, "one author has no spread"
    with pytest.raises(ValueError, match="one cluster label per item"):
        combined_bootstrap([([[1.0]], ["a", "b"])], np.sum)
    with pytest.raises(ValueError, match="finite"):
        combined_bootstrap([([[1.0], [np.inf]], ["a", "b"])], np.sum)


def test_auc_draws_of_the_same_clusters_are_paired():
    rng = np.random.default_rng(1)
    low, high, names = rng.normal(size=30), rng.normal(1, size=30), np.repeat(np.arange(10), 3)
    draws = auc_draws(low, high, names, names, seed=7)
    np.testing.assert_array_equal(draws, auc_draws(10 * low, 10 * high, names, names, seed=7))
    value = (high[:, None] > low).mean()
    assert np.quantile(draws, 0.025) < value < np.quantile(draws, 0.975)
    assert abs(draws.mean() - value) < 0.02
    assert auc_draws([0.0, 1.0], [2.0], ["a", "b"], ["c"]) is None, "one author on a side has no spread"
    with pytest.raises(ValueError, match="one cluster label per item"):
        auc_draws([0.0], [2.0], ["a", "b"], ["c"])


def test_cluster_bootstrap_refusals():
    with pytest.raises(ValueError, match="2 clusters needed, got 1"):
        cluster_bootstrap([1, 2], ["a", "a"])
    with pytest.raises(ValueError, match="one cluster label per item"):
        cluster_bootstrap([1, 2], ["a"])
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap([1, np.inf], ["a", "b"])
    with pytest.raises(ValueError, match="n_boot"):
        cluster_bootstrap([1, 2], ["a", "b"], n_boot=0)
