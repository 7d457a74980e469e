"""Forgetting against damage in one number: the published score, and one that stays within [0, 1].

Both are functions of accuracies (shares of items) before and after; what they are computed from is on `Accuracies`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Shares in [0, 1] of right answers.

    Attributes:
        test: TA, held-out items of what was not to be forgotten.
        retain: RA, trained items to be kept.
        forget: UA, items to be forgotten.
    """

    test: float
    retain: float
    forget: float

    def __post_init__(self) -> None:
        for name in ("test", "retain", "forget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Accuracies: {name} is {getattr(self, name)}; a share lies in [0, 1]")


@dataclass(frozen=True, slots=True)
class Score:
    """A score, or None with the reason why there is none."""

    value: float | None
    reason: str = ""


def unlearning_efficiency(start: Accuracies, model: Accuracies) -> Score:
    """UES as published (arXiv:2512.03437), in accuracies of percent, so its unit is 1 / percentage point.

        UES = (UA_o - UA_u) / ((TA_o - TA_u) (RA_o - RA_u)),  o: before, u: after unlearning

    It has no bounds: without damage on one side it divides by zero (None, with the reason), next to none decides the
    number alone, and a side that rose turns its sign (two that rose turn it back). `reason` says so where it happens.
    """
    drops = {"test": 100 * (start.test - model.test), "retain": 100 * (start.retain - model.retain)}
    if still := [name for name, drop in drops.items() if drop == 0]:
        return Score(None, f"divides by zero: {' and '.join(still)} accuracy did not change")
    value = 100 * (start.forget - model.forget) / (drops["test"] * drops["retain"])
    risen = [name for name, drop in drops.items() if drop < 0]
    return Score(float(value), f"sign means nothing: {' and '.join(risen)} accuracy rose" if risen else "")


def forgotten_share(start: Accuracies, model: Accuracies, gold: Accuracies) -> Score:
    """How far the forget accuracy came from the start's to gold's, cut to [0, 1]: 1 at gold's level or below.

    Forgetting more than gold is neither rewarded nor punished here: the gap to gold, which stands beside it, is.
    None where gold answers as much as doing nothing, since then there is nothing to forget.
    """
    way = start.forget - gold.forget
    if way <= 0:
        return Score(None, "nothing to forget: gold answers as many of the forgotten items as doing nothing")
    return Score(float(np.clip((start.forget - model.forget) / way, 0, 1)))


def kept_share(start: float, model: float, chance: float = 0.0) -> Score:
    """Share of an accuracy above chance that is left, cut to [0, 1].

    Args:
        start, model: accuracy before and after.
        chance: accuracy of a model that tells nothing apart.
    """
    if start <= chance:
        return Score(None, f"nothing to keep: doing nothing scores {start:.2f}, chance {chance:.2f}")
    return Score(float(np.clip((model - chance) / (start - chance), 0, 1)))


def unlearning_balance(
    start: Accuracies, model: Accuracies, gold: Accuracies, chance: tuple[float, float] = (0.0, 0.0)
) -> Score:
    """Harmonic mean of `forgotten_share` and the `kept_share` of test and of retain accuracy.

        B = 3 / (1 / forgotten + 1 / kept_test + 1 / kept_retain), and 0 if any part is 0

    In [0, 1], and never falls when a part rises: 1 is gold's forget level without damage; 0 is nothing forgotten, or
    test or retain accuracy down to chance. Parts set between the start model and gold and joined by a harmonic mean
    are what OpenUnlearning ranks by (arXiv:2506.12618, section 5); theirs are memorisation, privacy and utility.

    Args:
        start, model, gold: accuracies before unlearning, after it, and of the model trained without the forget set.
        chance: of test and of retain, see `kept_share`.

    Returns:
        The score, or None with the reason where a part has none.
    """
    parts = (
        forgotten_share(start, model, gold),
        kept_share(start.test, model.test, chance[0]),
        kept_share(start.retain, model.retain, chance[1]),
    )
    if missing := [part.reason for part in parts if part.value is None]:
        return Score(None, "; ".join(missing))
    return Score(harmonic_mean(np.array([part.value for part in parts], dtype=np.float64)))


def harmonic_mean(values: np.ndarray) -> float:
    """n / sum 1 / v of (n,) values in [0, 1]; 0 if any is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return float(len(values) / np.sum(1 / values))
