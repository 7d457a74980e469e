"""The statistics on 200 simulated studies; benchmarks/stats_simulation.py is the same with 1,000."""

from __future__ import annotations

import numpy as np
import pytest

STUDIES = 200
SKEWED = {"bootstrap_forget": 0.75, "bootstrap_forget_8": 0.78}  # few authors near 0: known to cover less, see stats.py


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("stats_simulation")


@pytest.mark.parametrize("group", ["primary", "intervals", "utility", "times"])
def test_rates_are_within_their_bars(program, group):
    found = program.CHECKS[group](3, STUDIES, program.MEASURED)
    checks = {name: check for name, check in found.items() if isinstance(check, dict)}
    assert checks
    for name, check in checks.items():
        low, high = check["bar"]
        if name in SKEWED:
            low, high = SKEWED[name], None
        # three standard errors of a rate at the bar, from so few studies
        low, high = (None if b is None else b + side * 3 * np.sqrt(b * (1 - b) / STUDIES)
                     for b, side in ((low, -1), (high, 1)))  # fmt: skip
        assert low is None or check["rate"] >= low, (name, check)
        assert high is None or check["rate"] <= high, (name, check)


def test_a_test_that_takes_answers_for_independent_is_caught(program):
    """The bars can be missed: pooled answers as if no author and no seed tied them together."""
    draw = np.random.default_rng(0)
    _, y = program.cells(draw, program.MEASURED, STUDIES)
    n = program.SEEDS * program.AUTHORS * program.QUESTIONS
    a, b = y[:, :, 0, 0].mean(1), y[:, :, 1, 0].mean(1)
    pooled = (a + b) / 2
    naive = np.abs(a - b) / np.sqrt(2 * pooled * (1 - pooled) / n) > 1.96
    assert naive.mean() > 0.15


def test_what_is_simulated_has_the_clustering_asked_for(program):
    c = program.Clustering(0.3, 0.1, 0.4, 0.25, 0.9, 0.2, 20.0, 0.3)
    p, y = program.cells(np.random.default_rng(1), c, 4000)
    assert p.mean() == pytest.approx(0.3, abs=0.005)
    assert p.std() == pytest.approx(0.1, abs=0.005)
    pairs = np.corrcoef(p[:, :, 0, 0].ravel(), p[:, :, 1, 1].ravel())[0, 1]
    assert pairs == pytest.approx(0.4, abs=0.03), "of the copula, a little less of the accuracies"
    assert y.mean() == pytest.approx(0.3, abs=0.005)
    hits = program.author_hits(np.random.default_rng(2), np.full(3000, 0.3), 0.25, 4, 20)
    rows = [(np.concatenate([np.arange(20) < h for h in row]).astype(float)) for row in hits]
    between, within = np.sum([program.author_share(r, [str(i // 20) for i in range(80)]) for r in rows], 0)
    assert between / (between + within) == pytest.approx(0.25, abs=0.02)


def test_clustering_is_read_off_records(program, tmp_path):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    for s, means in (("seed0", (0.0, 0.5)), ("seed1", (0.5, 1.0))):
        for method, mean in zip(("ga", "npo"), means, strict=True):
            folder = tmp_path / "runs" / s / "unlearn" / "fit" / method / "eval-x"
            folder.mkdir(parents=True)
            rows = [{"split": split, "author": f"a{i % 2}", "scored": {"hit": [i < 8 * mean]}}
                    for split in ("forget", "retain") for i in range(8)]  # fmt: skip
            pq.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")
    updates = ({"mean": 10.0, "hi": 14.303, "n": 3}, {"mean": 3.0, "hi": None, "n": 1})
    told = {"comparison": {"cells": [{"measures": {"updates_to_target": u}} for u in updates]}}
    (tmp_path / "c.json").write_text(json.dumps(told))
    found = program.measure(tmp_path, tmp_path / "c.json")
    assert found.mean == 0.5
    assert found.seed_sd == pytest.approx(0.125**0.5)
    assert found.correlation == pytest.approx(0.95), "both cells move together: 1, held below it"
    assert found.author_share == 0
    assert found.updates == 10
    assert found.updates_log_sd == pytest.approx(4.303 * 3**0.5 / 4.3027 / 10, rel=1e-3)
