"""The published study's tables in our numbers, and the verdicts on its claims, on runs made by hand."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.eval.compare import compare
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report import published
from llm_unlearn.report.claims import Claim, claims, claims_grid, judge, published_claims
from llm_unlearn.report.collect import ReportData
from llm_unlearn.report.course import frontier_areas, frontier_grid, frontier_limits, one_level, spread_grid, times_grid
from llm_unlearn.report.html import render
from llm_unlearn.report.paper import paper
from llm_unlearn.report.paper_table import Place, by_place, differences, layout
from llm_unlearn.report.tables import grids_markdown
from llm_unlearn.stats import Interval

N = 100
START, GOLD = (
    {"test_acc": 0.8, "retain_acc": 1.0, "forget_acc": 1.0},
    {"test_acc": 0.8, "retain_acc": 1.0, "forget_acc": 0.4},
)


def run(
    checkpoint="fit", seed=0, method="ga", forget=(1.0, 0.7, 0.4), kept=(1.0, 0.9, 0.8), stop="max_steps", **acc
) -> Outcome:
    values = {"test_acc": 0.7, "retain_acc": 0.9, "forget_acc": 0.5, **acc}
    metrics = {k: {"value": v, "start": START[k], "gold": GOLD[k], "n": N} for k, v in values.items()}
    gap = float(np.mean([abs(values[k] - GOLD[k]) for k in values]))
    metrics["average_gap"] = {"value": gap, "start": 0.2, "gold": 0.0, "n": 3}
    path = [
        {"step": 5 * i, "forget_acc": f, "retain_acc": r} for i, (f, r) in enumerate(zip(forget, kept, strict=True))
    ]
    cost = {"updates": 10, "train_seconds": 5.0}
    folder = Path(f"{method}-{checkpoint}-{seed}")
    return Outcome(folder, method, checkpoint, seed, metrics, path, None, cost, {}, stop=stop)


def study(seeds=5, methods=("ga",), **by_kind):
    """by_kind: checkpoint -> values of each seed, {measure: (..)}."""
    return [
        run(kind, s, m, **{name: values[s] for name, values in measures.items()})
        for kind, measures in by_kind.items()
        for m in methods
        for s in range(seeds)
    ]


EARLY = {"test_acc": (0.6, 0.62, 0.64, 0.6, 0.64), "forget_acc": (0.5, 0.8, 0.6, 0.9, 0.7)}
GROK = {"test_acc": (0.71, 0.72, 0.75, 0.7, 0.72), "forget_acc": (0.52, 0.5, 0.55, 0.48, 0.5)}


def cells(grid, first, second=None):
    return next(r.cells for r in grid.rows if r.cells[0] == first and (second is None or r.cells[1:3] == second))


def test_layout_has_originals_golds_and_methods_in_percent():
    grid = layout(by_place(study(early=EARLY, grok=GROK)))
    assert grid.columns[:7] == ("architecture", "method", "checkpoint", "seeds", "TA", "RA", "UA")
    assert [r.kind for r in grid.rows] == ["start", "start", "gold", "gold", "method", "method"]
    assert [r.cells[1:3] for r in grid.rows][::2] == [
        ("original", "early"),
        ("gold (retrained)", "early"),
        ("ga", "early"),
    ]
    assert cells(grid, "–", ("gold (retrained)", "grok"))[6] == "40.0 ± 0.0 [40.0, 40.0]"
    values = 100 * np.array(EARLY["test_acc"])
    half = 2.7764451051977987 * values.std(ddof=1) / np.sqrt(5)
    told = f"62.0 ± 2.0 [{62 - half:.1f}, {62 + half:.1f}]"
    assert cells(grid, "–", ("ga", "early"))[3:5] == ("5", told)


def test_a_seed_alone_has_no_interval_and_a_missing_number_is_a_dash():
    lone = run("grok")
    grid = layout(by_place([replace(lone, metrics={k: v for k, v in lone.metrics.items() if k != "retain_acc"})]))
    assert cells(grid, "–", ("ga", "grok"))[4:7] == ("70.0", "–", "50.0")


def test_collapsed_runs_are_marked_and_not_contrasted():
    runs = [*study(early=EARLY, grok=GROK)]
    broken = run("grok", 0, retain_acc=0.05, forget_acc=0.0)
    runs = [broken if (o.checkpoint, o.seed) == ("grok", 0) else o for o in runs]
    grid = layout(by_place(runs))
    row = next(r for r in grid.rows if r.kind == "collapsed")
    assert row.cells[1:3] == ("ga †1/5", "grok")
    assert "collapsed" in grid.notes[-1]
    assert differences(runs) is None


def test_scenarios_and_architectures_are_kept_apart():
    runs = [
        replace(o, scenario=s, architecture=a)
        for s in ("class", "random")
        for a in ("cnn", "resnet")
        for o in study(early=EARLY, grok=GROK)
    ]
    assert list(by_place(runs)) == [Place(s, a) for s in ("class", "random") for a in ("cnn", "resnet")]
    titles = [g.title for g in paper(runs)]
    assert titles[0] == "Table 1: accuracies after unlearning, forget class"
    assert [t for t in titles if t.startswith("Paired")] == [
        f"Paired differences: {a}, forget {s}" for s in ("class", "random") for a in ("cnn", "resnet")
    ]
    one = next(g for g in paper(runs) if g.title.startswith("Table 1"))
    assert [r.cells[0] for r in one.rows] == ["cnn"] * 6 + ["resnet"] * 6


def test_differences_are_grok_minus_the_others_in_points():
    runs = study(early=EARLY, grok=GROK, easy={"test_acc": (0.8, 0.81, 0.79, 0.8, 0.82)})
    grid = differences(runs, words="cnn")
    assert grid is not None
    assert grid.columns == ("method", "grok minus early", "grok minus easy")
    assert grid.rows[0].cells == ("TA: test accuracy (more is better)",)
    assert grid.rows[1].cells[1].startswith("+10.0 [")
    assert grid.rows[1].cells[1].endswith(", n = 5 *")
    assert grid.rows[1].cells[2].startswith("-8.4 [")


def test_times_count_runs_that_never_got_there():
    slow, never = (1.0, 0.9, 0.7, 0.6, 0.4), (1.0, 0.9, 0.7, 0.6, 0.5)
    kept = (1.0,) * 5
    runs = [run("early", s, forget=never if s else slow, kept=kept) for s in range(3)]
    runs += [run("grok", s, forget=(1.0, 0.3, 0.2, 0.1, 0.0), kept=kept) for s in range(3)]
    grid = times_grid(runs)
    assert grid is not None
    assert grid.columns == ("method", "early", "grok", "grok minus early")
    assert cells(grid, "ga")[1:3] == ("> 20 (mean 20), 1/3", "5 (mean 5), 3/3")
    assert cells(grid, "ga")[3].startswith("-15.0 [")
    seconds = times_grid(runs, unit="seconds")
    assert seconds is not None
    assert cells(seconds, "ga")[2] == "2.5 (mean 2.5), 3/3"
    common = times_grid([replace(o, target=0.65, target_by="acc") for o in runs])
    assert common is not None
    assert "the same for all" in common.title
    assert cells(common, "ga")[1:3] == ("15 (mean 15), 3/3", "5 (mean 5), 3/3")
    assert times_grid([replace(o, target=0.65) for o in runs]) is None, "forget probability was not watched"
    own = [replace(o, target=0.65 if o.checkpoint == "early" else 0.25, target_by="acc") for o in runs]
    grid = times_grid(own)
    assert grid is not None
    assert "of each run's own gold" in grid.title
    assert cells(grid, "ga")[1:3] == ("15 (mean 15), 3/3", "10 (mean 10), 3/3")
    once = [replace(o, method="edit", trajectory=(o.trajectory[0], o.trajectory[-1])) for o in runs]
    edited = times_grid([*runs, *once])
    assert edited is not None
    told = [cells(g, "ga")[3].partition(", p")[0] for g in (times_grid(runs), edited) if g is not None]
    assert told[0] == told[1], "how seldom another method was watched says nothing of this one's times"
    by_gold = times_grid(own, by="acc")
    assert by_gold is not None
    assert "gold's forget accuracy" in by_gold.title
    assert cells(by_gold, "ga")[1:3] == ("> 20 (mean 20), 1/3", "5 (mean 5), 3/3")


def test_what_forget_levels_decide_is_not_judged():
    """Held to its own gold a checkpoint whose gold names more of what it never saw has less to forget."""
    runs = study(early=EARLY, grok=GROK)
    own = [replace(o, target=0.5 if o.checkpoint == "early" else 0.9) for o in runs]
    common = [replace(o, target=0.5, target_by="acc") for o in runs]
    assert (one_level(own), one_level(common), one_level(runs)) == (False, True, False)
    judged = {j.claim.words: j for j in claims(common, "grok", ("early",))}
    for words in ("UA after unlearning is lower", "UA comes nearer to gold's", "UA varies less over seeds"):
        assert judged[words].effect is None
        assert "to its forget level" in judged[words].why
    kept = judged["TA after unlearning is higher, at the forget level"]
    assert kept.verdict == "holds"
    left = np.mean([0.0, 0.3, 0.1, 0.4, 0.2]) - np.mean([0.02, 0.0, 0.05, 0.0, 0.0])  # above .5 by early and by grok
    assert kept.effect is not None
    assert kept.effect.mean == pytest.approx(np.mean(GROK["test_acc"]) - np.mean(EARLY["test_acc"]) + left)
    fall = judged["RA falls by less, at the forget level"].effect
    assert fall is not None
    assert fall.mean == pytest.approx(left), "kept alike, but early forgot less"
    assert "keeps all" in claims_grid(list(judged.values())).notes[-1]
    assert next(j for j in claims(own, "grok", ("early",)) if j.claim.words.startswith("UA after")).effect is None
    assert next(j for j in claims(runs, "grok", ("early",)) if j.claim.words.startswith("UA after")).effect is not None
    assert frontier_limits(runs) == (0.4, 1.0)
    assert frontier_limits(common) == (0.5, 1.0), "nobody was tuned to go further"


def test_frontier_areas_by_hand():
    runs = [run("early", 0), run("grok", 0, forget=(0.9, 0.55, 0.3), kept=(0.5, 0.5, 0.4))]
    assert frontier_limits(runs) == (0.4, 0.9)
    # early: .8 at .4, .9 from .7 on; grok: .4 until .55, then .5
    assert frontier_areas(runs) == {
        ("ga", "early"): {0: pytest.approx((0.3 * 0.8 + 0.2 * 0.9) / 0.5)},
        ("ga", "grok"): {0: pytest.approx((0.15 * 0.4 + 0.35 * 0.5) / 0.5)},
    }
    relative = frontier_areas(runs, relative=True)["ga", "grok"][0]
    assert relative == pytest.approx((0.15 * 0.8 + 0.35 * 1.0) / 0.5)
    assert frontier_areas(runs, kept="test_acc") == {}, "not watched"
    assert frontier_grid(runs, kept="test_acc") is None
    chance = [replace(o, metrics={**o.metrics, "retain_chance": {"value": 0.2}}) for o in runs]
    assert frontier_areas(chance)["ga", "grok"][0] == pytest.approx((0.15 * 0.25 + 0.35 * 0.375) / 0.5)
    assert frontier_limits([run("early", forget=(0.3, 0.2, 0.1))]) is None, "gold forgets less than the start model"


def test_spread_needs_four_seeds_and_more_than_a_row():
    grid = spread_grid(study(early=EARLY, grok=GROK))
    assert grid is not None
    assert grid.columns[-1] == "grok / early: variances"
    forget = next(i for i, r in enumerate(grid.rows) if r.cells[0].startswith("UA"))
    sd = 100 * np.std(EARLY["forget_acc"], ddof=1)
    assert grid.rows[forget + 1].cells[1].startswith(f"{sd:.1f} [")
    ratio = float(grid.rows[forget + 1].cells[3].split()[0])
    assert ratio == pytest.approx(np.var(GROK["forget_acc"]) / np.var(EARLY["forget_acc"]), rel=0.1)
    retain = next(i for i, r in enumerate(grid.rows) if r.cells[0].startswith("RA"))
    assert grid.rows[retain + 1].cells[3] == "–", "all seeds alike"
    assert spread_grid(study(seeds=3, early=EARLY, grok=GROK)) is None


def test_published_effects_by_hand():
    ua = [-5.9, -10.2, -4.7, -3.2, -7.2, -21.4, -6.4, -5.8]
    assert published.shift("forget_acc") == pytest.approx(np.mean(ua) / 100)
    # resnet and cnn started 7.0 and 13.2 points higher
    ta = np.mean([8.8, 7.1, 10.7, 9.1, 38.5, 4.7, 4.5, 5.4])
    assert published.shift("test_acc") == pytest.approx(ta / 100)
    assert published.shift("test_acc~drop") == pytest.approx(((5 * 7.0 + 3 * 13.2) / 8 - ta) / 100)
    assert published.shift("retain_acc~drop") > 0, "its own table: retain accuracy falls by more from grokked ones"
    assert published.updates_log_ratio() == pytest.approx(math.log(6.5 / 17.5))
    assert published.variance_log_ratio() == pytest.approx(math.log(1.3**2 / 15.9**2))


CLAIM = Claim("it is more", "test_acc", "difference", 1, 0.2)


@pytest.mark.parametrize(
    ("lo", "hi", "verdict", "why"),
    [
        (0.01, 0.3, "holds", ""),
        (0.01, 0.09, "holds", "less than half"),
        (-0.05, 0.09, "does not hold", "ruled out"),
        (-0.3, -0.01, "does not hold", "other way round"),
        (-0.05, 0.11, "cannot tell", "no effect"),
        (0.0, 0.3, "cannot tell", "no effect"),
    ],
)
def test_the_rule(lo, hi, verdict, why):
    found = judge(CLAIM, Interval((lo + hi) / 2, lo, hi, 5))
    assert found[0] == verdict
    assert why in found[1]


def test_without_a_published_effect_only_the_other_side_refutes():
    for published_effect in (None, -0.1):
        claim = replace(CLAIM, published=published_effect)
        assert claim.least == 0
        assert judge(claim, Interval(0, -0.1, 0.001, 5))[0] == "cannot tell"
        assert judge(claim, Interval(-0.1, -0.2, -0.001, 5))[0] == "does not hold"


def judged(runs):
    return {(j.claim.words, j.baseline): j for j in claims(runs)}


def test_claims_are_judged_over_seeds_after_averaging_methods():
    runs = study(methods=("ga", "scrub"), early=EARLY, grok=GROK)
    found = judged(runs)
    ta = found["TA after unlearning is higher", "early"]
    d = np.array(GROK["test_acc"]) - EARLY["test_acc"]
    assert (ta.verdict, ta.methods, ta.effect.n) == ("holds", ("ga", "scrub"), 5)
    assert ta.effect.mean == pytest.approx(d.mean())
    assert ta.effect.hi - ta.effect.mean == pytest.approx(2.7764451051977987 * d.std(ddof=1) / np.sqrt(5))
    assert found["UA after unlearning is lower", "early"].effect.mean == pytest.approx(0.19)
    assert found["RA falls by less", "early"].verdict == "cannot tell", "no difference at all, and none published"
    assert found["RA after unlearning is higher", "early"].verdict == "does not hold", "half of 17 points is ruled out"
    assert {b for _, b in found} == {"early"}
    assert len(found) == len(published_claims())


def test_a_method_that_collapsed_is_left_out_and_named():
    runs = study(methods=("ga", "scrub"), early=EARLY, grok=GROK)
    runs = [replace(o, signs=("broken",)) if (o.method, o.seed) == ("scrub", 1) else o for o in runs]
    ta = judged(runs)["TA after unlearning is higher", "early"]
    assert (ta.methods, ta.left_out) == (("ga",), ("scrub",))
    text = grids_markdown([claims_grid([ta])])
    assert "without scrub" in text


def test_more_seeds_of_some_methods_leave_no_other_out():
    more = {kind: {name: values * 2 for name, values in side.items()} for kind, side in
            (("early", EARLY), ("grok", GROK))}  # fmt: skip
    runs = study(seeds=10, methods=("ga",), **more) + study(methods=("scrub", "salun"), early=EARLY, grok=GROK)
    lost = [o for o in study(methods=("fisher",), early=EARLY, grok=GROK) if o.seed != 3]
    ta = judged([*runs, *lost])["TA after unlearning is higher", "early"]
    assert (ta.methods, ta.left_out, ta.effect.n) == (("ga", "salun", "scrub"), ("fisher",), 5)
    assert ta.effect.mean == pytest.approx(np.mean(np.array(GROK["test_acc"]) - EARLY["test_acc"]))


def test_too_few_seeds_cannot_tell():
    found = judged(study(seeds=2, early=EARLY, grok=GROK))
    assert {j.verdict for j in found.values()} == {"cannot tell"}
    assert found["TA falls by less", "early"].why.startswith("2 seeds")
    three = judged(study(seeds=3, early=EARLY, grok=GROK))
    assert three["UA varies less over seeds", "early"].effect is None, "a variance takes four"


def test_fewer_updates_is_a_ratio_and_counts_those_that_never_got_there():
    kept = (1.0,) * 5
    late = [(1.0, 0.9, 0.8, 0.6, 0.4), (1.0, 0.9, 0.8, 0.4, 0.4), (1.0, 0.9, 0.8, 0.7, 0.6)]
    runs = [run("early", s, forget=f, kept=kept) for s, f in enumerate(late)]
    runs += [run("grok", s, forget=(1.0, 0.4, 0.4, 0.4, 0.4), kept=kept) for s in range(3)]
    found = judged(runs)["fewer updates to the forget level", "early"]
    assert found.effect.mean == pytest.approx(np.mean(np.log([20 / 5, 15 / 5, 20 / 5])))
    assert found.verdict == "holds"
    row = next(r for r in claims_grid([found]).rows if r.cells[0].startswith("fewer"))
    assert row.cells[1] == "x 0.37"
    assert row.cells[2].startswith(f"x {np.exp(-found.effect.mean):.2g} [")
    lo, hi = (float(v) for v in row.cells[2].split("[")[1].rstrip("]").split(","))
    assert lo < np.exp(-found.effect.mean) < hi < 1


def test_variance_claim_is_a_ratio():
    found = judged(study(early=EARLY, grok=GROK))["UA varies less over seeds", "early"]
    want = np.log(np.var(EARLY["forget_acc"]) / np.var(GROK["forget_acc"]))
    assert found.effect.mean == pytest.approx(want, rel=0.05)
    row = next(r for r in claims_grid([found]).rows if r.cells[0].startswith("UA"))
    assert row.cells[1] == "x 0.0067"


def test_everything_is_shown_in_markdown_and_on_the_page():
    runs = [replace(o, architecture="<b>cnn</b>") for o in study(methods=("ga", "scrub"), early=EARLY, grok=GROK)]
    grids = paper(runs)
    assert all(len(r.cells) in (1, len(g.columns)) for g in grids for r in g.rows)
    text = grids_markdown(grids)
    assert "<b>" not in text
    data = ReportData((), tuple(runs), compare(runs), {}, {}, (), ())
    page = render(data)
    assert "Next to the published study" in page
    assert "<b>cnn" not in page
    assert all(g.title in html.unescape(page) for g in grids)
    assert paper([replace(o, metrics={"forget_acc": o.metrics["forget_acc"]}) for o in runs]) == []


def test_a_gap_is_also_told_against_doing_nothings():
    def from_gap(o: Outcome, start: float) -> Outcome:
        gap = {**o.metrics["average_gap"], "value": 0.1 + 0.01 * o.seed, "start": start}
        return replace(o, metrics={**o.metrics, "average_gap": gap})

    starts = {"early": 0.4, "grok": 0.15}  # grok ends as near to gold as early does, and had been near before
    grid = differences([from_gap(o, starts[o.checkpoint]) for o in study(early=EARLY, grok=GROK)])
    assert grid is not None
    told = {a.cells[0]: b.cells[1] for a, b in pairwise(grid.rows) if a.kind == "section"}
    assert told["mean distance to gold in TA, RA and UA (less is better)"].startswith("+0.0 ")
    assert told["by how much that is less than doing nothing's (more is better)"].startswith("-25.0 ")
