"""Which number from a model's insides predicts how well it can be unlearned, across seeds and checkpoints? Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from llm_unlearn.stats import Interval, holm

MIN_SEEDS = 4
N_BOOT, N_FLIPS = 1000, 2000
Key = tuple[int, str]  # seed, checkpoint


class Cell(NamedTuple):
    """One outcome: what unlearning with a method led to, from a checkpoint of a seed."""

    seed: int
    checkpoint: str
    method: str


@dataclass(frozen=True)
class Predicted:
    """How well one probe predicts the outcome.

    Attributes:
        probe: its name.
        rank: mean over seeds (and methods) of Spearman's correlation within a seed, over checkpoints.
        r2: share of the squared error of the checkpoint-blind mean that the probe removes in seeds left out.
        beyond_kind: share of the squared error of the checkpoint's own mean that the probe, added to it, removes there.
        p: that the rank correlation is 0, by flipping the signs of whole seeds; p_holm: over all probes.
        p_beyond, p_beyond_holm: the same of what is left of probe and outcome once each checkpoint's mean is off.
        cells, seeds: how many there are.
    """

    probe: str
    rank: Interval
    r2: Interval
    beyond_kind: Interval
    p: float
    p_holm: float
    p_beyond: float
    p_beyond_holm: float
    cells: int
    seeds: int


def predict(
    probes: Mapping[str, Mapping[Key, float]], outcomes: Mapping[Cell, float], *, seed: int = 0
) -> list[Predicted]:
    """Judge every probe by how it predicts one outcome; the seed is the unit throughout.

        r2 = 1 - sum (y - yhat)^2 / sum (y - ymean_method)^2,   yhat, ymean from the other seeds alone

    yhat is least squares on the probe's value, with an intercept per method and a common slope; for `beyond_kind` the
    intercept is per method and checkpoint, in the denominator too. Below 0: worse than not knowing the probe. Values
    and outcomes enter as they are: put heavy-tailed ones on a log scale beforehand. Between few checkpoints almost
    anything that grows with training has a high rank and r2; `beyond_kind` says whether a probe is more than the
    checkpoint's name.

    Args:
        probes: probe -> (seed, checkpoint) -> value.
        outcomes: cell -> what is to be predicted. A probe is judged on the cells it has a finite value for.
        seed: of bootstrap and sign flips.

    Returns:
        One line a probe, largest `beyond_kind` first, with 95 % percentile intervals of a bootstrap of whole seeds (the
        left-out errors are not computed anew in it, so they are intervals for the given fits).

    Raises:
        ValueError: fewer than 4 seeds or 2 checkpoints for a probe, or values without any spread.
    """
    tables = {name: _table(name, values, outcomes) for name, values in probes.items()}
    found = [_judge(name, table, np.random.default_rng(seed)) for name, table in tables.items()]
    p, beyond = (holm([x[which] for x in found]) if found else [] for which in ("p", "p_beyond"))
    lines = [Predicted(**x, p_holm=float(a), p_beyond_holm=float(b)) for x, a, b in zip(found, p, beyond, strict=True)]
    return sorted(lines, key=lambda line: -line.beyond_kind.mean)


@dataclass(frozen=True)
class _Table:
    """N cells: value, outcome, and the numbers of seed, method, and (method, checkpoint)."""

    x_N: np.ndarray
    y_N: np.ndarray
    seed_N: np.ndarray
    method_N: np.ndarray
    kind_N: np.ndarray


def _table(name: str, values: Mapping[Key, float], outcomes: Mapping[Cell, float]) -> _Table:
    rows = [
        (values[cell.seed, cell.checkpoint], y, cell)
        for cell, y in sorted(outcomes.items())
        if np.isfinite(y) and np.isfinite(values.get((cell.seed, cell.checkpoint), np.nan))
    ]
    seeds, kinds = {c.seed for *_, c in rows}, {c.checkpoint for *_, c in rows}
    if len(seeds) < MIN_SEEDS or len(kinds) < 2:
        raise ValueError(
            f"predict: '{name}' has values and outcomes of {len(seeds)} seeds and {len(kinds)} checkpoints; "
            f"{MIN_SEEDS} seeds and 2 checkpoints are needed"
        )
    x, y = (np.array([row[i] for row in rows], dtype=np.float64) for i in (0, 1))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError(f"predict: '{name}' or its outcome is the same in every cell")
    method = [cell.method for *_, cell in rows]
    kind = [f"{cell.method}@{cell.checkpoint}" for *_, cell in rows]
    return _Table(x, y, *(_numbers(labels) for labels in ([c.seed for *_, c in rows], method, kind)))


def _numbers(labels: Sequence[object]) -> np.ndarray:
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def _judge(name: str, t: _Table, draw: np.random.Generator) -> dict[str, Any]:
    n_seeds = int(t.seed_N.max()) + 1
    rank_S = _rank_by_seed(t)
    errors_S4 = np.stack([_left_out(t, s) for s in range(n_seeds)])
    centred = (_centred(v, t.kind_N) for v in (t.x_N, t.y_N))
    shared_S = np.bincount(t.seed_N, np.multiply(*centred))
    picks = draw.integers(n_seeds, size=(N_BOOT, n_seeds))
    whole, drawn = errors_S4.sum(0), errors_S4[picks].sum(1)
    known = np.isfinite(rank_S)
    ranks = np.array([np.nanmean(rank_S[p]) if known[p].any() else np.nan for p in picks])

    def interval(value: Any, values: np.ndarray) -> Interval:
        lo, hi = np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
        return Interval(float(value), float(lo), float(hi), n_seeds)

    def gain(e: np.ndarray, model: int, null: int) -> np.ndarray:
        return 1 - e[..., model] / np.where(e[..., null] > 0, e[..., null], np.nan)

    return {
        "probe": name,
        "rank": interval(float(np.nanmean(rank_S)) if known.any() else np.nan, ranks),
        "r2": interval(gain(whole, 1, 0), gain(drawn, 1, 0)),
        "beyond_kind": interval(gain(whole, 3, 2), gain(drawn, 3, 2)),
        "p": _flipped(rank_S[known], draw),
        "p_beyond": _flipped(shared_S, draw),
        "cells": len(t.x_N),
        "seeds": n_seeds,
    }


def _rank_by_seed(t: _Table) -> np.ndarray:
    """Return Spearman's correlation over checkpoints, by seed, mean over methods; nan where nothing varies."""
    out = np.full(int(t.seed_N.max()) + 1, np.nan)
    for s in range(len(out)):
        found = []
        for m in np.unique(t.method_N):
            at = (t.seed_N == s) & (t.method_N == m)
            if at.sum() > 1 and np.ptp(t.x_N[at]) > 0 and np.ptp(t.y_N[at]) > 0:
                found.append(np.corrcoef(rankdata(t.x_N[at]), rankdata(t.y_N[at]))[0, 1])
        if found:
            out[s] = np.mean(found)
    return out


def _left_out(t: _Table, seed: int) -> np.ndarray:
    """Return summed squared errors on a seed of what the others say: method mean, with the probe, mean of method and
    checkpoint, with the probe: (4,).
    """
    test, errors = t.seed_N == seed, []
    for group_N in (t.method_N, t.kind_N):
        # a group that no other seed has says nothing about this one
        use = test & np.isin(group_N, group_N[~test])
        mean_x, mean_y = (_means(v, group_N, ~test) for v in (t.x_N, t.y_N))
        x, y = t.x_N - mean_x[group_N], t.y_N - mean_y[group_N]
        square = (x[~test] ** 2).sum()
        slope = (x[~test] * y[~test]).sum() / square if square > 1e-12 * max(1.0, (t.x_N**2).sum()) else 0.0
        errors += [(y[use] ** 2).sum(), ((y[use] - slope * x[use]) ** 2).sum()]
    return np.array(errors)


def _means(values_N: np.ndarray, group_N: np.ndarray, use_N: np.ndarray) -> np.ndarray:
    n = int(group_N.max()) + 1
    sums, counts = (np.bincount(group_N[use_N], w, n) for w in (values_N[use_N], None))
    return sums / np.maximum(counts, 1)


def _centred(values_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    return values_N - _means(values_N, group_N, np.ones(len(values_N), dtype=bool))[group_N]


def _flipped(values_S: np.ndarray, draw: np.random.Generator) -> float:
    """Two-sided p of "their mean is 0" by random flips of sign (all 2^S of them up to 10 seeds)."""
    n = len(values_S)
    if n == 0:
        return 1.0
    if n <= 10:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs, extra = 1 - 2 * draw.integers(2, size=(N_FLIPS, n)), 1
    tail = (np.abs(signs @ values_S) >= abs(values_S.sum()) * (1 - 1e-9)).sum()
    return float((tail + extra) / (len(signs) + extra))
