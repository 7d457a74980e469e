"""Do the statistics keep their promises? 1,000 simulated studies with the clustering that was measured on real ones.

    python benchmarks/stats_simulation.py --out benchmarks/results/stats_simulation.json
    python benchmarks/stats_simulation.py --measure studies/prepost    # prints the clustering of a study's records

A study is 10 seeds x (grok, fit, easy) x 3 methods; a cell is an accuracy over forgotten questions, 20 of each of 4
authors. Cells of a seed are correlated (a Gaussian copula over Beta marginals), authors within a cell differ (Beta), an
answer is right or wrong (Bernoulli). What is tested are the very functions that a study is judged with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtr, stdtrit

from llm_unlearn.eval.primary import Paired, Primary, judge
from llm_unlearn.eval.reach import Time, log_rank, restricted_difference
from llm_unlearn.resampling import cluster_bootstrap, combined_bootstrap
from llm_unlearn.stats import (
    detectable_effect,
    equivalence,
    mean_interval,
    paired_difference,
    wilson,
)

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS, METHODS = ("grok", "fit", "easy"), ("a", "b", "c")


@dataclass(frozen=True)
class Clustering:
    """What is simulated: `mean` accuracy of a cell, its standard deviation over seeds `seed_sd`, the `correlation` of
    two cells of a seed, the share of an answer's variance within a cell that lies between authors, of forgotten and of
    kept questions, and the updates to a level (log-normal).
    """

    mean: float
    seed_sd: float
    correlation: float
    author_share: float
    retain_mean: float
    retain_author_share: float
    updates: float
    updates_log_sd: float


MEASURED = Clustering(0.105, 0.0794, 0.281, 0.228, 0.892, 0.241, 27.0, 0.34)
SEEDS, AUTHORS, QUESTIONS, RETAIN = 10, 4, 20, (36, 6)
BUDGET, EVERY = 40, 2  # a third of the slower runs never get there


def shapes(mean: float | np.ndarray, share: float) -> tuple[Any, Any]:
    """Return the (a, b) of a Beta with a mean and a variance of share * mean * (1 - mean)."""
    size = 1 / share - 1
    return mean * size, (1 - mean) * size


def author_hits(draw: np.random.Generator, p: np.ndarray, share: float, n_authors: int, n_items: int) -> np.ndarray:
    """Return right answers out of n_items, (*p.shape, n_authors), of authors around cells' accuracies p."""
    a, b = shapes(np.clip(p, 1e-3, 1 - 1e-3)[..., None], share)
    return draw.binomial(n_items, draw.beta(a, b, size=(*p.shape, n_authors)))


def cells(draw: np.random.Generator, c: Clustering, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies without author and answer noise, and measured ones, each (n studies, seeds, checkpoints,
    methods); `shift` is added to what `grok` has, by moving its Beta's mean.
    """
    shape = (n, SEEDS, len(CHECKPOINTS), len(METHODS))
    common = draw.standard_normal((n, SEEDS, 1, 1))
    z = np.sqrt(c.correlation) * common + np.sqrt(1 - c.correlation) * draw.standard_normal(shape)
    means = np.array([c.mean + shift, c.mean, c.mean])[:, None]
    a, b = shapes(means, c.seed_sd**2 / (c.mean * (1 - c.mean)))
    p = betaincinv(a, b, ndtr(z))
    measured = author_hits(draw, p, c.author_share, AUTHORS, QUESTIONS).sum(-1) / (AUTHORS * QUESTIONS)
    return p, measured


def difference_sd(draw: np.random.Generator, c: Clustering) -> float:
    """Return the standard deviation of a paired difference, by a large draw."""
    y = cells(draw, c, 4_000)[1]
    return float((y[:, :, 0] - y[:, :, 1]).std())


def primary_of(bound: float) -> Primary:
    """The primary contrast of a study: 3 methods, grok against fit and against easy."""
    return Primary(measure="forget_acc", methods=METHODS, contrasts=(("grok", "fit"), ("grok", "easy")), bound=bound)


def judged(y: np.ndarray, bound: float) -> list[Any]:
    """Return the contrasts of one study, (seeds, checkpoints, methods)."""

    def paired(method: str, group: str, baseline: str) -> Paired:
        m, g, b = METHODS.index(method), CHECKPOINTS.index(group), CHECKPOINTS.index(baseline)
        return Paired(y[:, g, m], y[:, b, m], 1 / (AUTHORS * QUESTIONS), SEEDS)

    return list(judge(primary_of(bound), paired).contrasts)


def share(hits: list[bool], low: float | None, high: float | None, what: str) -> dict[str, Any]:
    """Return a rate with its Wilson interval, the bar, and whether the rate keeps it."""
    interval = wilson(sum(hits), len(hits))
    kept = (low is None or interval.mean >= low) and (high is None or interval.mean <= high)
    return {"what": what, "rate": interval.mean, "wilson_95": [interval.lo, interval.hi], "n": len(hits),
            "bar": [low, high], "kept": bool(kept)}  # fmt: skip


def primary_checks(seed: int, n: int, c: Clustering) -> dict[str, Any]:
    """False positives of the primary's family, coverage of its intervals, equivalence and power."""
    draw = np.random.default_rng((seed, 1))
    sd, k = difference_sd(draw, c), len(METHODS) * 2
    resolution = 1 / (AUTHORS * QUESTIONS)
    null = cells(draw, c, n)[1]
    families = [judged(y, 0.1) for y in null]
    single = [paired_difference(y[:, 0, 0], y[:, 1, 0], resolution=resolution) for y in null]
    moved = cells(draw, c, n, 0.1)[1]
    covered = [paired_difference(y[:, 0, 0], y[:, 1, 0], resolution=resolution) for y in moved]
    bound = 0.1  # the true difference lies on it: calling that equivalent is the error
    edge = [equivalence(y[:, 0, 0], y[:, 1, 0], bound, resolution=resolution) for y in moved]
    alone, in_family = (detectable_effect(sd, SEEDS, alpha) for alpha in (0.05, 0.05 / k))
    found = [paired_difference(y[:, 0, 0], y[:, 1, 0]).p <= 0.05 for y in shifted(draw, c, n, alone)]
    found_holm = [judged(y, bound)[0].verdict == "differs" for y in shifted(draw, c, n, in_family)]
    return {
        "family_wise_error": share([any(x.verdict == "differs" for x in f) for f in families], None, 0.07,
                                   f"any of the {k} Holm-corrected contrasts, all true differences 0"),
        "single_test_error": share([d.p <= 0.05 for d in single], 0.03, 0.07, "one paired test, true difference 0"),
        "paired_coverage": share([d.lo <= 0.1 <= d.hi for d in covered], 0.93, 0.97,
                                 "95 % interval of a paired difference whose truth is .1"),
        "equivalence_error": share([d.p <= 0.05 for d in edge], None, 0.07, "equivalent, true difference on the bound"),
        "power": share(found, 0.75, 0.85, f"one paired test, true difference {alone:.3f} as detectable_effect has it"),
        "power_holm": share(found_holm, 0.75, None, f"one of {k} after Holm, true difference {in_family:.3f}"),
        "difference_sd": sd,
    }  # fmt: skip


def shifted(draw: np.random.Generator, c: Clustering, n: int, by: float) -> np.ndarray:
    """Null cells with `by` added to every number of grok: the spread stays what the detectable effect reckons with."""
    y = cells(draw, c, n)[1]
    y[:, :, 0] += by
    return y


def interval_checks(seed: int, n: int, c: Clustering) -> dict[str, Any]:
    """Coverage of the mean over seeds, and of the author-clustered bootstrap within a cell."""
    draw = np.random.default_rng((seed, 2))
    y = cells(draw, c, n)[1]
    means = [mean_interval(study[:, 0, 0]) for study in y]
    out = {"mean_coverage": share([i.lo <= c.mean <= i.hi for i in means], 0.93, 0.97, "mean accuracy over 10 seeds")}
    for name, p, part, n_authors, n_items in (
        ("forget", c.mean, c.author_share, AUTHORS, QUESTIONS),
        ("forget_8", c.mean, c.author_share, 8, QUESTIONS),
        ("half", 0.5, c.author_share, AUTHORS, QUESTIONS),
        ("retain", c.retain_mean, c.retain_author_share, *RETAIN),
    ):
        hits = author_hits(draw, np.full(n, p), part, n_authors, n_items)
        authors = np.repeat(np.arange(n_authors), n_items)
        inside = []
        for k, row in enumerate(hits):
            items = np.concatenate([np.arange(n_items) < h for h in row]).astype(float)
            interval = cluster_bootstrap(items, authors, n_boot=500, seed=k)
            inside.append(interval.lo <= p <= interval.hi)
        out[f"bootstrap_{name}"] = share(
            inside, 0.93, 0.97, f"cell of {n_authors} authors x {n_items}, true accuracy {p:.2f}"
        )
    return out


def utility_checks(seed: int, n: int, c: Clustering) -> dict[str, Any]:
    """Coverage of the interval of model utility: a harmonic mean of two scores of each of three sets of questions."""
    draw = np.random.default_rng((seed, 4))
    p = 0.4  # far from 1, where a harmonic mean bends most
    out = {}
    for name, sizes in (("tofu", ((40, 10), (100, 1), (117, 1))), ("few", ((8, 10), (20, 1), (20, 1)))):
        inside = []
        for k in range(n):
            strata = []
            for n_authors, n_items in sizes:
                hits = author_hits(draw, np.full(2, p), c.author_share, n_authors, n_items)
                items = (np.arange(n_items) < hits[..., None]).reshape(2, -1).T.astype(float)
                strata.append((items, np.repeat(np.arange(n_authors), n_items)))
            interval = combined_bootstrap(strata, lambda m: 6 / np.sum(1 / np.maximum(m, 1e-12)), n_boot=500, seed=k)
            assert interval is not None
            inside.append(interval.lo <= p <= interval.hi)
        words = " and ".join(f"{a} authors x {b}" if b > 1 else f"{a} questions" for a, b in sizes)
        out[f"utility_{name}"] = share(inside, 0.93, 0.97, f"model utility of {words}, true score {p:.2f}")
    return out


def time_checks(seed: int, n: int, c: Clustering) -> dict[str, Any]:
    """Updates to a level, some never reached within the budget: error and coverage of the restricted difference, and
    the log-rank test's error.
    """
    draw = np.random.default_rng((seed, 3))

    def times(scale: float) -> tuple[np.ndarray, list[list[list[Time]]]]:
        z = np.sqrt(c.correlation) * draw.standard_normal((n, SEEDS, 1))
        z = z + np.sqrt(1 - c.correlation) * draw.standard_normal((n, SEEDS, 2))
        at = c.updates * np.exp(c.updates_log_sd * z) * np.array([scale, 1.0])
        at = np.ceil(at / EVERY) * EVERY
        return at, [[[Time(min(t, BUDGET), t <= BUDGET) for t in side] for side in study.T] for study in at]

    _, null = times(1.0)
    tests = [restricted_difference(a, b, resolution=EVERY) for a, b in null]
    raw, moved = times(1.4)
    truth = float(np.minimum(raw, BUDGET).mean((0, 1)) @ [1, -1])
    intervals = [restricted_difference(a, b, resolution=EVERY) for a, b in moved]
    ranks = [p for p in (log_rank(a, b) for a, b in null) if np.isfinite(p)]
    return {
        "restricted_error": share([d.p <= 0.05 for d in tests], 0.03, 0.07, "restricted mean updates, no difference"),
        "restricted_coverage": share([d.lo <= truth <= d.hi for d in intervals], 0.93, 0.97,
                                     f"restricted mean updates, true difference {truth:.2f}"),
        "log_rank_error": share([p <= 0.05 for p in ranks], None, 0.07, "log-rank, not knowing the pairs"),
        "censored": float((raw > BUDGET).mean()),
    }  # fmt: skip


CHECKS: dict[str, Callable[[int, int, Clustering], dict[str, Any]]] = {
    "primary": primary_checks, "intervals": interval_checks, "utility": utility_checks, "times": time_checks,
}  # fmt: skip


def simulate(n: int, seed: int = 0, clustering: Clustering = MEASURED) -> dict[str, Any]:
    """Return every check over n simulated studies."""
    return {name: check(seed, n, clustering) for name, check in CHECKS.items()}


def measure(study: Path, comparison: Path) -> Clustering:
    """Return the clustering of a study's unlearned cells: between authors from its records, between seeds from its
    comparison (benchmarks/prepost.py).
    """
    import pyarrow.parquet as pq

    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(study.rglob("unlearn/*/*/eval-*/records.parquet")):
        checkpoint, method = path.parts[-4:-2]
        rows = pq.read_table(path, columns=["split", "author", "scored"]).to_pylist()
        for split in ("forget", "retain"):
            mine = [row for row in rows if row["split"] == split]
            hits = np.array([float(all(row["scored"]["hit"])) for row in mine])
            found[f"{path.parts[-6]}", f"{checkpoint}/{method}", split] = {
                "mean": hits.mean(), "var": author_share(hits, [row["author"] for row in mine]),
            }  # fmt: skip
    seeds, places = (sorted({key[i] for key in found}) for i in (0, 1))
    table = np.array([[found[s, place, "forget"]["mean"] for place in places] for s in seeds])
    parts = {
        split: np.sum([v["var"] for key, v in found.items() if key[2] == split], 0) for split in ("forget", "retain")
    }
    spread = float(np.sqrt(table.var(0, ddof=1).mean()))
    common = float(table.mean(1).var(ddof=1)) * len(places) - spread**2  # of k cells with one correlation
    told = json.loads(comparison.read_text())["comparison"]["cells"]
    updates = [u for cell in told if (u := cell["measures"].get("updates_to_target")) and u["hi"] is not None]

    logs = [(u["hi"] - u["mean"]) * np.sqrt(u["n"]) / stdtrit(u["n"] - 1, 0.975) / u["mean"] for u in updates]
    return Clustering(
        float(table.mean()), spread, float(np.clip(common / (len(places) - 1) / spread**2, 0, 0.95)),
        float(parts["forget"][0] / parts["forget"].sum()),
        float(np.mean([v["mean"] for key, v in found.items() if key[2] == "retain"])),
        float(parts["retain"][0] / parts["retain"].sum()),
        float(np.mean([u["mean"] for u in updates])), float(np.sqrt(np.mean(np.square(logs)))),
    )  # fmt: skip


def author_share(hits: np.ndarray, authors: list[str]) -> np.ndarray:
    """Return the variances between and within authors, by analysis of variance: (2,)."""
    names, member = np.unique(authors, return_inverse=True)
    sizes = np.bincount(member)
    means = np.bincount(member, hits) / sizes
    within = ((hits - means[member]) ** 2).sum() / (len(hits) - len(names))
    between = (sizes * (means - hits.mean()) ** 2).sum() / (len(names) - 1)
    usual = (len(hits) - (sizes**2).sum() / len(hits)) / (len(names) - 1)
    return np.array([max(0.0, (between - within) / usual), within])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=Path, help="print the clustering of this study's records instead")
    parser.add_argument("--comparison", type=Path, default=ROOT / "benchmarks/results/prepost_short40.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stats_simulation.json"))
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measure(args.measure, args.comparison)), indent=1))
        return
    from llm_unlearn.study.store import environment

    started = time.perf_counter()
    content = {
        "what": "error rates, coverage and power of the statistics on simulated studies",
        "command": f"python benchmarks/stats_simulation.py --studies {args.studies} --seed {args.seed}",
        "studies": args.studies,
        "seeds": SEEDS,
        "clustering": {**asdict(MEASURED), "from": "records of studies/prepost (3 seeds x 4 checkpoints x 4 methods)"},
        "checks": simulate(args.studies, args.seed),
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for group in content["checks"].values():
        for name, found in group.items():
            if isinstance(found, dict):
                print(f"{'kept  ' if found['kept'] else 'MISSED'} {name:22} {found['rate']:.3f}  {found['what']}")


if __name__ == "__main__":
    main()
