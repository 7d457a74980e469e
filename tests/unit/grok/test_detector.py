"""Made curves with known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llm_unlearn.grok.detector import PRESETS, Point, detect, kinds, needed_snapshots, normalise
from llm_unlearn.grok.schedule import eval_steps

STEPS = eval_steps(12_000)
LANG = PRESETS["language"]
VISION = PRESETS["vision"]


def smooth(step, at, width=0.08):
    """0 -> 1 around log(at)."""
    return 1 / (1 + np.exp(-(np.log(step) - np.log(at)) / width))


def grok_curve(fit=300, gen=2500, plateau=0.35, top=1.0, steps=STEPS):
    """Memorises near `fit`, stays at `plateau`, jumps near `gen`; held-out loss dips, peaks, falls with the jump."""
    points = []
    for s in steps:
        up, down = smooth(s, fit * 0.7), smooth(s, gen / 1.22)
        train = 0.2 + 0.8 * smooth(s, fit * 0.7)
        acc = plateau * up + (top - plateau) * down
        loss = 3.0 - 1.5 * smooth(s, fit * 0.6) + 3.0 * smooth(s, fit * 2, 0.2) * (1 - down) - 1.45 * down
        points.append(Point(s, train, acc, 1 - train, loss))
    return points


def edit(curve, where, **values):
    """Replace fields of the points for which where(step)."""
    return [replace(p, **values) if where(p.step) else p for p in curve]


def index_of(curve, step):
    return [p.step for p in curve].index(step)


def after(curve, step, k):
    return curve[index_of(curve, step) + k].step


def event_kinds(report):
    return [e.kind for e in report.events]


@pytest.fixture(scope="module")
def clean():
    return grok_curve()


def test_clean_grok(clean):
    r = detect(clean)
    acc = {p.step: p.acc for p in clean}
    train = {p.step: p.train_acc for p in clean}
    assert r.t_fit is not None
    assert r.t_gen is not None
    assert r.stable_at is not None
    assert r.post is not None
    assert train[r.t_fit] >= 0.99 > train[after(clean, r.t_fit, -1)]
    assert acc[r.t_gen] >= 0.95
    assert r.first_crossing is not None
    assert r.t_half is not None
    assert r.t_half < r.t_gen
    assert r.ratio == r.t_gen / r.t_fit
    assert 5 <= r.ratio < 10
    assert r.phase == "grok"
    assert r.grokked
    assert r.loss_ok
    assert r.events == ()
    # the window: at least 5 evaluations and 20 % of t_gen, and no longer than that
    assert r.stable_at >= 1.2 * r.t_gen
    assert index_of(clean, r.stable_at) - index_of(clean, r.t_gen) >= 5
    before = after(clean, r.stable_at, -1)
    assert before < 1.2 * r.t_gen or index_of(clean, before) - index_of(clean, r.t_gen) < 5
    assert after(clean, r.post, -1) < 2 * r.t_gen <= r.post


def test_early_is_the_loss_dip_before_the_peak_not_the_low_loss_after_the_jump(clean):
    r = detect(clean)
    assert r.early is not None
    assert r.t_gen is not None
    ok = [p for p in clean if p.train_acc >= 0.8]
    peak = max((p for p in ok if p.step < r.t_gen), key=lambda p: p.loss)
    assert r.early == min((p for p in ok if p.step <= peak.step), key=lambda p: p.loss).step
    assert r.early < peak.step < r.t_gen
    assert min(clean, key=lambda p: p.loss).step > r.t_gen


def test_early_is_the_same_after_a_transient_collapse_before_the_jump(clean):
    collapsed = edit(clean, lambda s: 1400 <= s <= 1500, train_acc=0.3, acc=0.1, loss=20.0)
    assert any(p.loss == 20.0 for p in collapsed)
    r = detect(collapsed)
    assert r.early == detect(clean).early
    assert event_kinds(r) == ["transient collapse"]
    assert r.phase == "grok"


def test_early_has_not_memorised_where_the_loss_falls_all_the_way(clean):
    """A net initialised many times too large: what it says of unseen images is ever less wrong."""
    falling = [replace(p, loss=100.0 / p.step) for p in clean]
    r = detect(falling)
    assert r.t_fit == detect(clean).t_fit
    first = next(p for p in falling if p.train_acc >= 0.8)
    assert r.early == first.step < r.t_fit
    for n in range(1, len(falling) + 1):
        early = detect(falling[:n]).early
        assert early is None or early in needed_snapshots(falling[:n])
    at_once = [p for p in falling if p.train_acc < 0.8 or p.train_acc >= 0.99]
    assert detect(at_once).early == detect(at_once).t_fit, "nothing between: what there is"


def test_kinds_are_the_four_checkpoints(clean):
    r = detect(clean)
    assert kinds(r) == {"early": r.early, "fit": r.t_fit, "grok": r.stable_at, "post": r.post}
    assert set(kinds(r).values()) == needed_snapshots(clean)
    assert kinds(detect(clean[:3])) == {}


@pytest.mark.parametrize(
    ("gen", "phase"), [(450, "comprehension"), (1100, "grok-weak"), (2500, "grok"), (5500, "grok-strong")]
)
def test_phase_follows_the_delay_ratio(gen, phase):
    assert detect(grok_curve(gen=gen)).phase == phase


def test_spike_is_neither_generalisation_nor_fit(clean):
    at = next(p.step for p in clean if p.step > 900)
    spiked = edit(clean, lambda s: s == at, acc=0.97)
    r, base = detect(spiked), detect(clean)
    assert (r.t_gen, r.stable_at) == (base.t_gen, base.stable_at)
    assert r.first_crossing == at < base.t_gen
    assert [(e.kind, e.step, e.value) for e in r.events] == [("spike", at, 0.97)]
    fit_spike = edit(clean, lambda s: s == 100, train_acc=1.0)
    assert detect(fit_spike).t_fit == base.t_fit


def test_unstable_jump_is_rearmed(clean):
    base = detect(clean)
    dip = after(clean, base.t_gen, 4)
    r = detect(edit(clean, lambda s: s == dip, train_acc=0.68, acc=0.5))
    assert r.t_gen == after(clean, base.t_gen, 5)
    assert r.stable_at is not None
    assert r.stable_at > base.stable_at
    assert [(e.kind, e.step, e.last) for e in r.events if e.kind == "unstable"] == [("unstable", base.t_gen, dip)]
    assert "transient collapse" in event_kinds(r)
    assert r.early == base.early
    assert r.grokked


def test_dip_of_held_out_accuracy_within_bounds_is_stable(clean):
    """.98 -> .94 after the jump was measured; the rule allows down to .90."""
    base = detect(clean)
    dip = after(clean, base.t_gen, 4)
    assert detect(edit(clean, lambda s: s == dip, acc=0.91)).stable_at == base.stable_at
    assert detect(edit(clean, lambda s: s == dip, acc=0.89)).stable_at != base.stable_at


def test_collapse_after_stable_and_late_collapse_are_events_not_a_change_of_marks(clean):
    base = detect(clean)
    start = after(clean, base.stable_at, 1)
    r = detect(edit(clean, lambda s: start <= s < base.post, train_acc=0.21, acc=0.1, loss=9.0))
    assert replace(r, events=(), t_half=None) == replace(base, t_half=None)
    assert [(e.kind, e.step, e.value) for e in r.events] == [("collapse", start, 0.21)]
    r = detect(edit(clean, lambda s: s > base.post, train_acc=0.21, acc=0.1, loss=9.0))
    assert event_kinds(r) == ["late collapse"]
    assert r.events[0].step == after(clean, base.post, 1)
    assert r.events[0].last == clean[-1].step
    assert r.phase == "grok"


def test_anti_grok_needs_the_train_set_to_stay_fitted(clean):
    base = detect(clean)
    lost = edit(clean, lambda s: s > base.post, acc=0.6)
    assert event_kinds(detect(lost)) == ["anti-grok"]
    assert detect(lost).phase == "grok"
    assert detect(edit(clean, lambda s: s > base.post, acc=0.8)).events == ()


def test_never_fits(clean):
    r = detect([replace(p, train_acc=min(p.train_acc, 0.98)) for p in clean])
    assert r.phase == "confusion"
    assert r.t_fit is None
    assert r.ratio is None
    assert r.gap_at_fit is None
    assert not r.grokked


def test_never_groks():
    r = detect(grok_curve(gen=1e9))
    assert r.phase == "memorised"
    assert r.t_gen is None
    assert r.stable_at is None
    assert r.loss_ok is None
    assert set(kinds(r)) == {"early", "fit"}


def test_budget_ended_while_rising_is_undecided(clean):
    base = detect(clean)
    assert detect(clean[: index_of(clean, base.t_gen) - 1]).phase == "undecided"
    assert detect(clean[: index_of(clean, base.stable_at)]).phase == "undecided"  # window still open
    assert detect(clean[: index_of(clean, base.t_fit) + 3]).phase == "undecided"


def test_comprehension_no_delay():
    points = [Point(s, v := float(smooth(s, 300)), v, 1 - v, 3 * (1 - v)) for s in STEPS]
    r = detect(points)
    assert r.phase == "comprehension"
    assert r.t_gen is not None
    assert r.ratio is not None
    assert r.ratio <= 1
    assert r.early is not None


def test_no_gap_is_comprehension_whatever_the_delay():
    assert detect(grok_curve(plateau=0.75)).phase == "comprehension"


def test_semi_grok():
    r = detect(grok_curve(top=0.75, gen=1500))
    assert r.phase == "semi-grok"
    assert r.t_gen is None
    assert not r.grokked


def test_noisy_hold_is_no_hold():
    """Three in a row above the level but jumping about are not a hold; calm ones are."""
    wide = replace(LANG, gen=0.90)
    acc = [0.3] * 20 + [0.90, 0.99, 0.90, 0.99, 0.90, 0.99] + [0.96] * 20
    curve = [Point(s, 1.0, a, 0.0, 3.0 if a < 0.5 else 0.1) for s, a in zip(STEPS, acc, strict=False)]
    assert np.std([0.90, 0.99, 0.90]) > wide.hold_std
    assert detect(curve, wide).t_gen == curve[25].step  # .99 .96 .96: std .014
    assert detect(curve, replace(wide, hold_std=1.0)).t_gen == curve[20].step


def test_threshold_artefact_fails_the_loss_guard(clean):
    """Accuracy jumps while the held-out loss only drifts down: not grokking (Kumar et al. 2310.06110)."""
    drift = [replace(p, loss=2.0 - 0.1 * np.log10(p.step)) for p in clean]
    r = detect(drift)
    assert r.stable_at is not None
    assert r.loss_ok is False
    assert r.phase == "semi-grok"
    assert not r.grokked
    assert detect([replace(p, loss=float("nan")) for p in clean]).loss_ok is False


def vision_curve(dip=0.93):
    """ResNet-like: fit at ~150, held-out .66 -> .94 around 1500, train accuracy dips during the jump."""
    points = []
    for s in eval_steps(8000):
        down = smooth(s, 1500, 0.2)
        train = 0.3 + 0.7 * smooth(s, 90) - (1 - dip) * 4 * down * (1 - down)
        acc = 0.66 * smooth(s, 60) + 0.28 * down
        points.append(Point(s, train, acc, 1 - train, 1.5 + smooth(s, 300) * (1 - down) * 2 - 1.2 * down))
    return points


def test_vision_survives_a_train_dip():
    curve = vision_curve()
    r = detect(curve, VISION)
    acc = {p.step: p.acc for p in curve}
    assert min(p.train_acc for p in curve if p.step > 1000) < 0.94
    assert r.phase in ("grok", "grok-strong")
    assert r.events == ()
    assert r.t_fit is not None
    assert r.t_gen is not None
    assert r.level is not None
    assert acc[r.t_gen] >= r.level
    # 90 % of the whole rise, up to the tail that came after the window
    full = acc[r.t_fit] + 0.9 * (max(acc.values()) - acc[r.t_fit])
    assert full - VISION.stable_margin <= r.level <= full
    assert not detect(curve, LANG).grokked  # .94 never reaches .95


def test_vision_deep_dip_breaks_the_window():
    curve = vision_curve()
    base = detect(curve, VISION)
    dip = after(curve, base.t_gen, 2)
    assert detect(edit(curve, lambda s: s == dip, train_acc=0.91), VISION).t_gen == base.t_gen
    r = detect(edit(curve, lambda s: s == dip, train_acc=0.89), VISION)
    assert r.t_gen is not None
    assert r.t_gen > dip
    assert r.stable_at > base.stable_at
    assert "transient collapse" in event_kinds(r)


def test_vision_small_rise_is_memorised():
    assert detect([replace(p, acc=min(p.acc, 0.70)) for p in vision_curve()], VISION).phase == "memorised"


def test_vision_late_rise_is_reported_and_does_not_move_the_marks():
    curve = vision_curve()
    base = detect(curve, VISION)
    later = detect(edit(curve, lambda s: s > 7000, acc=0.999), VISION)
    assert (later.t_gen, later.stable_at, later.level) == (base.t_gen, base.stable_at, base.level)
    assert event_kinds(later) == ["late rise"]


def test_empty_and_short_curves():
    assert detect([]).phase == "confusion"
    assert needed_snapshots([]) == set()
    one = [Point(25, 1.0, 1.0, 0.0, 0.0)]
    assert detect(one).phase == "confusion"
    assert needed_snapshots(one) == {25}


def test_steps_must_increase():
    p = Point(25, 1.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="increase strictly"):
        detect([p, p])


def test_normalise():
    assert normalise(0.25, 0.25) == 0
    assert normalise(1.0, 0.25) == 1
    assert normalise(0.0, 0.5) == -1
    with pytest.raises(ValueError, match="chance"):
        normalise(0.5, 1.0)
