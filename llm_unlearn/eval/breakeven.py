"""From how many requests on a dearer training pays for itself by cheaper forgetting. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NEVER = float("inf")
MIN_SEEDS = 3
N_BOOT = 2000


@dataclass(frozen=True)
class BreakEven:
    """Requests from which on the dearer training has cost less in all.

    Attributes:
        extra: what its training costs more, mean over seeds.
        saved: what it saves per request, mean over seeds; below 0 where it loses.
        requests: extra / saved; 0 where the training costs nothing more, inf where nothing is saved: never.
        lo, hi: 95 % limits of it, inf for never; None below 3 seeds.
        never: share of the resamples in which nothing is saved.
        n: seeds.
    """

    extra: float
    saved: float
    requests: float
    lo: float | None
    hi: float | None
    never: float
    n: int


def break_even(extra: ArrayLike, saved: ArrayLike, *, seed: int = 0, n_boot: int = N_BOOT) -> BreakEven:
    """Return the number of requests r from which on r * saved exceeds the extra cost of training.

        r = max(0, mean(extra) / mean(saved)) where mean(saved) > 0, else never

    A ratio of means, not a mean of ratios: of a single seed the saving may be near 0 or below. The interval resamples
    whole seeds, both their numbers together (percentile bootstrap; Efron and Tibshirani 1993, sec. 13.3), and takes
    limits among the values found, since between a number and never there is nothing.

    Args:
        extra: (n,) cost of the dearer training less that of the cheaper, one number a seed, in any unit.
        saved: (n,) cost of a request from the cheaper model less that from the dearer, same seeds, same unit.
        seed: of the bootstrap.
        n_boot: resamples.

    Raises:
        ValueError: no seeds, unequal lengths, or numbers that are not finite.
    """
    x, y = (np.asarray(side, dtype=np.float64) for side in (extra, saved))
    if x.shape != y.shape or x.ndim != 1 or not len(x) or not np.isfinite([x, y]).all():
        raise ValueError(f"break_even: wants one finite extra and one saving a seed, got {extra!r} and {saved!r}")
    means = float(x.mean()), float(y.mean())
    picks = np.random.default_rng(seed).integers(len(x), size=(n_boot, len(x)))
    drawn = _requests(x[picks].mean(1), y[picks].mean(1))
    known = len(x) >= MIN_SEEDS
    lo, hi = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf") if known else (None, None)
    return BreakEven(
        *means,
        requests=float(_requests(np.array(means[:1]), np.array(means[1:]))[0]),
        lo=None if lo is None else float(lo),
        hi=None if hi is None else float(hi),
        never=float(np.isinf(drawn).mean()),
        n=len(x),
    )


def _requests(extra: np.ndarray, saved: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(saved > 0, np.maximum(extra / saved, 0.0), NEVER)
