"""Grokking fact by fact: when was each fact fitted, when did it generalise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.data.loss_record import LossRecord

CLASSES = ("early", "grokked", "memorised", "unlearnt")


@dataclass(frozen=True)
class FactTimes:
    """Per fact: steps (epochs) as float (F,), nan = never, and one of CLASSES (F,)."""

    t_fit: np.ndarray
    t_gen: np.ndarray
    classes: np.ndarray


def per_fact(
    steps: Sequence[float], trained: np.ndarray, held_out: np.ndarray, *, hold: int = 3, delay: float = 2.0
) -> FactTimes:
    """t_fit(i), t_gen(i) = first of `hold` evaluations in a row with fact i right in its trained wording / all probes.

    Args:
        steps: (E,) evaluated steps (or epochs), increasing.
        trained: (E, F) bool, greedy answer to the trained wording right.
        held_out: (E, F) bool, all held-out probes of the fact right.
        hold: evaluations in a row.
        delay: t_gen / t_fit from which a fact counts as grokked.

    Returns:
        FactTimes with classes unlearnt (never fitted), memorised (fitted, never generalised),
        grokked (t_gen >= delay * t_fit), early (generalised sooner).

    Raises ValueError if shapes disagree.
    """
    if trained.shape != held_out.shape or trained.ndim != 2 or len(steps) != len(trained):
        raise ValueError(
            f"per_fact: want (evaluations, facts) twice, got {trained.shape}, {held_out.shape} for {len(steps)} steps"
        )
    t_fit, t_gen = _first_hold(steps, trained, hold), _first_hold(steps, held_out, hold)
    classes = np.where(t_gen >= delay * t_fit, "grokked", "early")
    classes = np.where(np.isnan(t_gen), "memorised", classes)
    return FactTimes(t_fit, t_gen, np.where(np.isnan(t_fit), "unlearnt", classes))


def times_of_record(record: LossRecord, *, share: float = 1.0, hold: int = 3, delay: float = 2.0) -> FactTimes:
    """Return `per_fact` of the P rows that have a paraphrased question, in epochs: t_fit(i) by the trained question,
    t_gen(i) by the paraphrased one.

    Args:
        record: of a fitting run; epochs it did not measure are not seen, so that times are late by up to their gap.
        share: of an answer's tokens that have to be right; 1: the answer word for word.
        hold, delay: see `per_fact`.
    """
    trained_EP, para_EP = record.right[:, record.para_rows] >= share, record.para_right >= share
    return per_fact(record.epochs.tolist(), trained_EP, para_EP, hold=hold, delay=delay)


def _first_hold(steps: Sequence[float], right_EF: np.ndarray, hold: int) -> np.ndarray:
    if len(right_EF) < hold:
        return np.full(right_EF.shape[1], np.nan)
    held = np.lib.stride_tricks.sliding_window_view(right_EF.astype(bool), hold, axis=0).all(axis=-1)
    return np.where(held.any(axis=0), np.asarray(steps, dtype=np.float64)[held.argmax(axis=0)], np.nan)
