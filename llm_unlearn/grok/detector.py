"""When did a run memorise, when did it generalise, and is that grokking? Pure functions of the evaluation curve.

All marks are causal: once decided on a prefix of the curve they never change when evaluations are added.
  t_fit      decided when `hold` evaluations are in
  t_gen      first hold whose stability window succeeded or is still open; decided together with `stable_at`
             (a window that fails re-arms t_gen for a later hold and leaves an "unstable" event)
  stable_at  the evaluation that completes the stability window
  early      moves until the first t_gen candidate appears (`jump`), then stays
  post       first evaluation at or after 2 * t_gen and after `stable_at`
`first_crossing`, `t_half`, `phase` and `events` describe the curve seen so far and may change with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.grok.curve import PRESETS, Point, Thresholds, normalise
from llm_unlearn.grok.facts import FactTimes, per_fact
from llm_unlearn.grok.phases import GROKKED, Event, Marks, Series, find_events, phase_of, rolling

__all__ = [
    "GROKKED",
    "KINDS",
    "PRESETS",
    "Event",
    "FactTimes",
    "Point",
    "Report",
    "Thresholds",
    "detect",
    "kinds",
    "needed_snapshots",
    "normalise",
    "per_fact",
]


KINDS = {"early": "early", "fit": "t_fit", "grok": "stable_at", "post": "post"}
"""Checkpoint kind -> the field of `Report` that is its step."""


@dataclass(frozen=True)
class Report:
    """What `detect` found; steps are None where not (yet) found, numbers where they need a missing step."""

    t_fit: int | None
    t_gen: int | None
    first_crossing: int | None
    """First single evaluation at or above the level of t_gen, stable or not."""
    t_half: int | None
    """First `hold` evaluations whose mean reaches half of the best such mean."""
    stable_at: int | None
    early: int | None
    post: int | None
    gap_at_fit: float | None
    ratio: float | None
    level: float | None
    """Held-out accuracy that t_gen stands for."""
    loss_ok: bool | None
    phase: str
    events: tuple[Event, ...]

    @property
    def grokked(self) -> bool:
        return self.phase in GROKKED


def detect(curve: Sequence[Point], thresholds: Thresholds = PRESETS["language"]) -> Report:
    """Find the marks of grokking on an evaluation curve (any prefix of a run; see the module's text).

    hold(x, level): `hold` evaluations in a row with x >= level and std <= hold_std; its step is the first of them.
    t_fit = hold(train accuracy, fit). t_gen = hold(held-out accuracy, level) whose every evaluation up to the current
    one has held-out accuracy >= the window's floor and train accuracy >= stable_train. The window ends at the first
    evaluation that is `stable_evals` evaluations and `stable_share * t_gen` steps after t_gen.
    With `absolute`, level = gen and floor = stable_acc. Otherwise level = acc(t_fit) + gen * rise with rise = best so
    far - acc(t_fit) >= min_rise, floor = level - stable_margin; the level follows the best value until the window
    completes and is then frozen (a later, clearly higher plateau is reported as "late rise").

    early = lowest held-out loss among evaluations with train accuracy >= early_train, up to the held-out loss peak;
    the peak is the highest held-out loss among evaluations with train accuracy >= stable_train (so that a collapse is
    no peak) from t_fit to the evaluation that completes the first t_gen candidate. Without such a range (fit comes
    after the jump, or never) early looks up to that evaluation. Where the loss still falls when training data is
    memorised (its lowest is t_fit's, so that nothing was there to stop early at), early = the first evaluation before
    t_fit with train accuracy >= early_train, if there is one: a model that has not memorised yet.

    Raises ValueError if steps are negative or do not increase strictly.
    """
    th = thresholds
    s, m = _marks(curve, th)
    n = len(s.step)

    def at(index: int | None) -> int | None:
        return None if index is None else int(s.step[index])

    crossing = None
    if m.level is not None:
        crossing = _first(s.acc >= m.level, 0 if th.absolute or m.fit is None else m.fit)
    half = None
    if n >= th.hold:
        means = rolling(s.acc, th.hold).mean(axis=1)
        half = _first(means >= 0.5 * np.nanmax(means)) if np.isfinite(means).any() and np.nanmax(means) > 0 else None
    return Report(
        t_fit=at(m.fit),
        t_gen=at(m.gen),
        first_crossing=at(crossing),
        t_half=at(half),
        stable_at=at(m.stable),
        early=at(_early(s, m, th)),
        post=at(m.post),
        gap_at_fit=m.gap,
        ratio=m.ratio,
        level=None if m.level is None else float(m.level),
        loss_ok=m.loss_ok,
        phase=phase_of(s, m, th),
        events=tuple(find_events(s, m, th)),
    )


def kinds(report: Report) -> dict[str, int]:
    """Checkpoint kinds decided so far -> step. `fit`, `grok` and `post` never move; `early` may until the jump."""
    found = {kind: getattr(report, mark) for kind, mark in KINDS.items()}
    return {kind: step for kind, step in found.items() if step is not None}


def needed_snapshots(curve: Sequence[Point], thresholds: Thresholds = PRESETS["language"]) -> set[int]:
    """Steps whose weights must be kept now so that no kind is ever missed: at most 3 early + `hold` + 3 kinds.

    Keep a snapshot of the current evaluation, call this, drop every snapshot that is not in the answer.
    `grok` and `post` are always the current evaluation at the moment they are decided, so only `fit` (the first of the
    last `hold` evaluations) and `early` look back.
    """
    th = thresholds
    s, m = _marks(curve, th)
    last = len(s.step) - 1
    keep = {_early(s, m, th), m.fit, m.stable, m.post}
    if m.jump is None:
        keep.add(_half_fitted(s, m, th))
    if m.fit is None:
        keep |= set(range(max(0, last - th.hold + 1), last + 1))
        keep.add(_lowest_loss(s, th, 0, last - th.hold))
    elif m.jump is None:  # a new loss peak would bring in what lies after the present one
        keep.add(_lowest_loss(s, th, _loss_peak(s, m.fit, last, th) + 1, last))
    return {int(s.step[i]) for i in keep if i is not None}


def _marks(curve: Sequence[Point], th: Thresholds) -> tuple[Series, Marks]:
    s = Series(*(np.array([getattr(p, f) for p in curve], dtype=np.float64) for f in Series._fields))
    if len(s.step) and (s.step[0] < 0 or (np.diff(s.step) <= 0).any()):
        raise ValueError(f"detect: steps must be >= 0 and increase strictly, got {[p.step for p in curve][:10]} ...")
    m = Marks()
    if len(s.step) >= th.hold:
        windows = rolling(s.train_acc, th.hold)
        m.fit = _first((windows.min(axis=1) >= th.fit) & (windows.std(axis=1) <= th.hold_std))
        _find_jump(s, m, th)
    if m.fit is not None:
        m.gap = float(s.train_acc[m.fit] - s.acc[m.fit])
    if m.fit is not None and m.gen is not None:
        m.ratio = float(s.step[m.gen] / max(s.step[m.fit], 1.0))
        if m.gen >= m.fit:
            peak = s.loss[_loss_peak(s, m.fit, m.gen, th)]
            m.loss_ok = bool(np.isfinite(peak) and s.loss[m.gen] <= th.loss_share * peak)
    if m.stable is not None and m.gen is not None:
        m.post = _first(s.step >= 2 * s.step[m.gen], m.stable + 1)
    return s, m


def _find_jump(s: Series, m: Marks, th: Thresholds) -> None:
    """Walk through the evaluations as they came; fill in m.gen, m.level, m.jump, m.stable, m.failed."""
    if not th.absolute and m.fit is None:
        return
    start_at = 0 if th.absolute or m.fit is None else m.fit
    windows = rolling(s.acc, th.hold)
    low, calm = windows.min(axis=1), windows.std(axis=1) <= th.hold_std
    best = np.fmax.accumulate(s.acc[start_at:])
    lo = start_at  # no candidate can start before this evaluation
    for now in range(start_at + th.hold - 1, len(s.step)):
        m.level, floor = th.gen, th.stable_acc
        if not th.absolute:
            rise = best[now - start_at] - s.acc[start_at]
            m.level, floor = s.acc[start_at] + th.gen * rise, s.acc[start_at] + th.gen * rise - th.stable_margin
            if not rise >= th.min_rise:
                m.level = None
                continue
        good = (s.acc[lo : now + 1] >= floor) & (s.train_acc[lo : now + 1] >= th.stable_train)
        if m.gen is not None and not good[-1]:
            m.failed.append((m.gen, now))
        lo += 0 if good.all() else len(good) - int(np.argmin(good[::-1]))
        m.gen = _first((low >= m.level) & calm, lo, now - th.hold + 2)
        if m.gen is None:
            continue
        m.jump = now if m.jump is None else m.jump
        lo = m.gen
        if now - m.gen >= th.stable_evals and s.step[now] >= s.step[m.gen] * (1 + th.stable_share):
            m.stable = now
            return


def _early(s: Series, m: Marks, th: Thresholds) -> int | None:
    last = len(s.step) - 1 if m.jump is None else m.jump
    if m.fit is not None and m.fit <= last:
        last = _loss_peak(s, m.fit, last, th)
    found = _lowest_loss(s, th, 0, last)
    if m.fit is not None and m.fit <= last == found:  # it falls all the way to fit
        before = _half_fitted(s, m, th)
        return found if before is None else before
    return found


def _half_fitted(s: Series, m: Marks, th: Thresholds) -> int | None:
    return _first((s.train_acc >= th.early_train) & np.isfinite(s.loss), 0, m.fit)


def _lowest_loss(s: Series, th: Thresholds, first: int, last: int) -> int | None:
    part = slice(first, last + 1)
    loss = np.where((s.train_acc[part] >= th.early_train) & np.isfinite(s.loss[part]), s.loss[part], np.inf)
    return first + int(np.argmin(loss)) if last >= first and np.isfinite(loss).any() else None


def _loss_peak(s: Series, first: int, last: int, th: Thresholds) -> int:
    part = slice(first, last + 1)
    loss = np.where((s.train_acc[part] >= th.stable_train) & np.isfinite(s.loss[part]), s.loss[part], -np.inf)
    return first + int(np.argmax(loss))


def _first(mask: np.ndarray, start: int = 0, stop: int | None = None) -> int | None:
    hits = np.flatnonzero(mask[start:stop])
    return start + int(hits[0]) if len(hits) else None
