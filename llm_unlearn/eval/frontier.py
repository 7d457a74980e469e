"""Forgetting against keeping: which points nobody beats on both, and how much lies below them (numpy only)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike


def points(lines: Iterable[Mapping[str, float]], forget: str, kept: str, relative: bool = False) -> np.ndarray:
    """Return (n, 2) points (forget level, kept level) of lines that have both: those of a run's trajectory, or the kept
    lines of many settings of a method.

    Args:
        lines: evaluations, the start model's first.
        forget, kept: keys, such as "forget_acc" and "retain_acc".
        relative: the kept level as a share of the first line's, for start models of different accuracy.

    Raises:
        ValueError: relative, and the first line keeps nothing.
    """
    both = [(line[forget], line[kept]) for line in lines if forget in line and kept in line]
    found = np.array(both, dtype=np.float64).reshape(-1, 2)
    if relative and len(found):
        if found[0, 1] <= 0:
            raise ValueError(f"frontier: the start model's {kept} is {found[0, 1]:g}, nothing can be relative to it")
        found[:, 1] /= found[0, 1]
    return found


def non_dominated(points_N2: ArrayLike) -> np.ndarray:
    """Return the (k, 2) points that no other one beats: forgets as much and keeps more, or keeps as much and forgets
    more; by forget level ascending, so kept level ascends too. Of equal points one is returned.
    """
    p = _checked(points_N2)
    p = p[np.lexsort((-p[:, 1], p[:, 0]))]  # of one forget level the best first
    best = np.maximum.accumulate(np.concatenate([[-np.inf], p[:, 1]]))[:-1]
    return p[p[:, 1] > best]


def area(points_N2: ArrayLike, forget: tuple[float, float], kept: tuple[float, float] = (0.0, 1.0)) -> float:
    """Mean over forget levels x of the best kept level among points that forget down to x or further.

        A = 1 / (hi - lo) integral_lo^hi max {r_i : f_i <= x} dx,  r cut to `kept` and scaled to [0, 1], 0 of no point

    The share of the box `forget` x `kept` that the points dominate: the hypervolume of Zitzler and Thiele (1999) with
    its reference point at (hi, kept[0]), divided by the box. Nothing is interpolated: between two settings nothing is
    known. 1 is all kept at the lowest forget level; a further point never lowers it, a dominated one changes nothing.

    Args:
        points_N2: (n, 2) forget and kept levels.
        forget: (lo, hi), the same for everything that is compared, such as the lowest gold and the lowest start level.
        kept: (floor, top) of the kept level, such as chance and 1.

    Returns:
        In [0, 1]; 0 without points.

    Raises:
        ValueError: limits that leave no room, or points that are not finite.
    """
    p, (lo, hi), (floor, top) = _checked(points_N2), forget, kept
    if not (lo < hi and floor < top):
        raise ValueError(f"frontier: limits leave no room: forget {lo:g} to {hi:g}, kept {floor:g} to {top:g}")
    best = non_dominated(p)
    level = np.clip((best[:, 1] - floor) / (top - floor), 0, 1)
    edges = np.clip(np.concatenate([best[:, 0], [np.inf]]), lo, hi)
    return float(np.clip((np.diff(edges) * level).sum() / (hi - lo), 0, 1))


def _checked(points_N2: ArrayLike) -> np.ndarray:
    p = np.asarray(points_N2, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(p).all():
        raise ValueError("frontier: want finite points (forget level, kept level)")
    return p
