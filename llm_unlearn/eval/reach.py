"""How long it took to forget enough: times to a level, some of which were never reached (censored)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import CensoredData, ecdf, logrank

from llm_unlearn.stats import Difference, paired_difference


@dataclass(frozen=True, slots=True)
class Time:
    """When a level was first seen to be reached, or until when it was not. The unit is the caller's (updates, seconds).

    Attributes:
        at: time of the first evaluation at or below the level, or the last one if none was.
        reached: which of the two.
        ended: whether the run was stopped before its budget was used up (collapse, floor, divergence). Such a run would
            not have got there later on: it stays unreached for ever instead of being censored at its end.
    """

    at: float
    reached: bool
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Reached:
    """Times to a level over seeds.

    Attributes:
        median: of the Kaplan-Meier curve; None where half of the runs never got there.
        restricted_mean: mean time until the level or until `horizon`, whichever is first: the area below that curve.
        horizon: the time up to which every run was watched.
        reached, n: runs that got there, and all.
    """

    median: float | None
    restricted_mean: float
    horizon: float
    reached: int
    n: int


def first_at(lines: Sequence[Mapping[str, float]], key: str, level: float) -> Mapping[str, float] | None:
    """Return the first line of a trajectory whose `key` is at or below a level; None if there is none."""
    return next((line for line in lines if key in line and line[key] <= level), None)


def time_to(
    lines: Sequence[Mapping[str, float]], key: str, level: float, per_update: float, ended: bool
) -> Time | None:
    """Return the time of `first_at`, `per_update` being the cost of an update; None without an evaluation of `key`."""
    known = [line for line in lines if key in line]
    if not known:
        return None
    hit = first_at(known, key, level)
    return Time(per_update * (hit or known[-1])["step"], hit is not None, hit is None and ended)


def horizon_of(times: Sequence[Time]) -> float:
    """Return the time up to which every run was watched: the least at which one that might still get there was given
    up; the last time there is where no run was.
    """
    given_up = [t.at for t in times if not t.reached and not t.ended]
    return min(given_up, default=max((t.at for t in times), default=0.0))


def survival(times: Sequence[Time], horizon: float | None = None) -> Reached:
    """Return the Kaplan-Meier median and the mean time restricted to `horizon` (default: `horizon_of`) over seeds.

        restricted mean = integral from 0 to horizon of S(t) dt,  S: share of runs that have not got there by t

    (Kaplan and Meier 1958; Royston and Parmar 2013). A run that ended before its budget counts as one that never gets
    there, as in a cumulative incidence with a competing event (Fine and Gray 1999), and not as one of which nothing
    more is known.

    Raises:
        ValueError: no times, or a horizon that is not above 0.
    """
    limit = horizon_of(times) if horizon is None else horizon
    if not times or limit <= 0:
        raise ValueError(f"survival: wants times and a horizon above 0, got {len(times)} times and {limit:g}")
    curve = ecdf(_censored(times, limit)).sf
    at, share = curve.quantiles, curve.probabilities
    edges = np.concatenate([[0.0], at[at < limit], [limit]])
    levels = np.concatenate([[1.0], share[at < limit]])
    below = at[share <= 0.5 + 1e-9]  # a product of fractions: 9/10 * 8/9 * ... * 5/6 is above 1/2 by rounding
    return Reached(
        median=float(below[0]) if len(below) else None,
        restricted_mean=float((np.diff(edges) * levels).sum()),
        horizon=limit,
        reached=sum(t.reached for t in times),
        n=len(times),
    )


def restricted_difference(a: Sequence[Time], b: Sequence[Time], resolution: float = 0.0) -> Difference:
    """Paired difference (a - b) of the times until the level or the horizon both sides share, with Student t interval.

    As every run was watched until then, the mean of min(time, horizon) is the restricted mean of `survival`, and seeds
    can be paired, which a log-rank test cannot do. A run that never got there counts with the horizon, so what is said
    is about the budget and not about what more of it would have shown. No seed is left out.

    Args:
        a, b: times of the same seeds, in the same order.
        resolution: interval of the evaluations, in the unit of the times.

    Raises:
        ValueError: as `stats.paired_difference`.
    """
    limit = horizon_of([*a, *b])
    x, y = ([min(t.at if t.reached else limit, limit) for t in side] for side in (a, b))
    return paired_difference(x, y, resolution=resolution)


def log_rank(a: Sequence[Time], b: Sequence[Time]) -> float:
    """Return the two-sided p-value of the log-rank test (Mantel 1966) that two sets of runs take equally long. It does
    not know which runs share a seed, and is a large-sample test: a second opinion at best; NaN where nobody got there,
    or all did at once.
    """
    if not any(t.reached for t in (*a, *b)):
        return float("nan")
    last = max(t.at for t in (*a, *b)) + 1
    with np.errstate(invalid="ignore"):  # no spread: 0 / 0
        return float(logrank(_censored(a, last), _censored(b, last)).pvalue)


def _censored(times: Sequence[Time], last: float) -> CensoredData:
    at = np.array([t.at if t.reached else max(last, t.at) if t.ended else t.at for t in times], dtype=np.float64)
    return CensoredData.right_censored(at, np.array([not t.reached for t in times]))
