"""The leaderboard: who may be ranked, by what, and what is shown of the others, on numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.leaderboard import as_json, grids, holds, reached, share_reached, standings
from llm_unlearn.report.tables import grids_markdown

# value, gold, start: distances .2, .1, .3 make .2; doing nothing's are .9, .8, .7, which make .8
GOOD = {
    "forget_acc": (0.3, 0.1, 1.0),
    "forget_Q_A_Prob": (0.2, 0.1, 0.9),
    "forget_inf_acc": (0.4, 0.1, 0.8),
    "retain_acc": (0.9, 1.0, 1.0),
    "retain_inf_acc": (0.85, 0.9, 0.9),
    "model_utility": (0.9, 0.95, 0.95),
}
PATH = ((0, 0.9, 1.0, 0.9), (10, 0.3, 0.9, 0.85), (20, 0.15, 0.75, 0.85))  # step, forget, retain, two-hop retain


def run(method="npo", seed=0, checkpoint="fit", path=PATH, signs=(), **values) -> Outcome:
    metrics = {
        name: {"value": values.get(name, value), "gold": gold, "start": start, "n": 100}
        for name, (value, gold, start) in GOOD.items()
        if values.get(name, value) is not None
    }
    keys = ("step", "forget_prob", "retain_acc", "retain_inf_acc")
    lines = [dict(zip(keys, line, strict=True)) for line in path]
    return Outcome(
        Path(f"{method}-{seed}"), method, checkpoint, seed, metrics, lines, 0.15, {"cpu_seconds": 5.0 + seed}, {},
        signs=signs,
    )  # fmt: skip


def test_ranks_go_by_distance_among_those_that_keep_enough():
    near, far = {"forget_acc": 0.15}, {"forget_acc": 0.6}
    outcomes = [run("far", s, **far) for s in (0, 1)] + [run("near", s, **near) for s in (0, 1)]
    outcomes += [run("lost", s, forget_acc=0.1, forget_inf_acc=0.1, retain_acc=0.7) for s in (0, 1)]
    outcomes += [run("gibberish", 0, signs=("empty",)), run("gibberish", 1), run("half", 0)]
    found = standings(outcomes, "author", ["near", "none"])
    assert [(s.method, s.rank) for s in found] == [
        ("near", 1), ("far", 2), ("gibberish", None), ("half", None), ("lost", None), ("none", None),
    ]  # fmt: skip
    assert [s.barred for s in found[2:]] == ["collapsed in 1/2", "only 1 of 2 seeds", "retain 0.70 < 0.80",
                                             "only 0 of 2 seeds"]  # fmt: skip
    assert found[0].distance.mean == pytest.approx((0.05 + 0.1 + 0.3) / 3)
    assert (found[0].distance.lo, found[0].distance.hi) == pytest.approx((0.15, 0.15))
    assert found[0].cpu_seconds.mean == 5.5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"retain_acc": 0.80, "retain_inf_acc": 0.801}, ""),
        ({"retain_acc": 0.79}, "retain 0.79 < 0.80"),
        ({"retain_inf_acc": 0.75}, "two-hop retain fell by 0.15"),
        ({"model_utility": 0.1}, ""),  # the accuracies say it all
        ({"retain_acc": None, "retain_inf_acc": None, "model_utility": 0.7}, "utility fell by 0.25"),
        ({"retain_acc": None, "retain_inf_acc": None}, ""),
        (dict.fromkeys(("forget_acc", "forget_Q_A_Prob", "forget_inf_acc")), "no distance to gold"),
    ],
    ids=str,
)
def test_who_may_be_ranked(values, said):
    assert holds([run(**values)], 1) == said


def test_means_over_seeds_are_judged():
    assert holds([run(seed=0, retain_acc=0.75), run(seed=1, retain_acc=0.9)], 2) == ""


@pytest.mark.parametrize(
    ("values", "is_there"),
    [
        ({"forget_Q_A_Prob": 0.199}, True),
        ({"forget_Q_A_Prob": 0.21}, False),
        ({"forget_Q_A_Prob": 0.0}, True),
        ({"retain_acc": 0.79}, False),
        ({"retain_inf_acc": 0.79}, False),
        ({"forget_Q_A_Prob": 0.0, "signs": ("empty",)}, False),
        ({"forget_Q_A_Prob": None}, False),
    ],
    ids=str,
)
def test_what_it_is_to_have_reached_it(values, is_there):
    assert reached(run(**values)) is is_there


def test_the_share_counts_methods_that_got_there_in_two_of_three_seeds():
    outcomes = [
        run(method, seed, forget_Q_A_Prob=0.1 if seed < n else 0.5)
        for method, n in (("three", 3), ("two", 2), ("one", 1))
        for seed in range(3)
    ] + [run("two-alone", 0, forget_Q_A_Prob=0.1)]
    found = standings(outcomes, "author", ["absent"])
    assert share_reached(found, "author", "fit") == (2, 5), "a seed without a run is one not reached"


def test_the_best_step_is_the_one_that_misses_by_least():
    """Step 10 misses by .3 - .1 - .1 in forgetting, step 20 by .80 - .75 in retaining."""
    found = standings([run(forget_Q_A_Prob=0.5), run(seed=1, forget_Q_A_Prob=0.5)], "author")[0]
    assert (found.best["step"], found.best["missed"]) == pytest.approx((20, 0.05))
    kept = ((0, 0.9, 1.0, 0.9), (10, 0.19, 0.8, 0.8))
    assert standings([run(path=kept)], "author")[0].best["missed"] == pytest.approx(0)
    assert standings([run(path=kept[:1])], "author")[0].best is None, "the start is no step on the way"


def test_gold_and_doing_nothing_stand_beside_and_all_of_it_is_json():
    outcomes = [run(m, s, k) for m in ("npo", "ga") for s in (0, 1) for k in ("fit", "grok")]
    content = as_json(standings(outcomes, "author", ["absent"]))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [(b["checkpoint"], b["who"]) for b in content["beside"]] == [
        (k, who) for k in ("fit", "grok") for who in ("start", "gold")
    ]
    assert [b["distance"]["mean"] for b in content["beside"]] == pytest.approx([0.8, 0.0, 0.8, 0.0])
    assert len(content["rows"]) == 6
    assert content["rows"][0]["measures"]["forget_acc"]["mean"] == pytest.approx(0.3)
    assert content["shares"][0] == {"scenario": "author", "checkpoint": "fit", "reached": 2, "methods": 3}


def test_the_markdown_says_who_is_barred_and_why():
    outcomes = [run("npo", s) for s in (0, 1)] + [run("ga", s, retain_acc=0.5) for s in (0, 1)]
    found = standings(outcomes, "author") + standings(
        [dataclasses.replace(o, checkpoint="grok") for o in outcomes], "fact"
    )
    text = grids_markdown(grids(found))
    lines = [line for line in text.splitlines() if line.startswith("| npo |")]
    assert lines[0] == "| npo | 1: 0.20 | 1: 0.20 |"
    assert "| ga | barred (0.20) | barred (0.20) |" in text
    assert text.count("retain 0.50 &lt; 0.80") == 2
    assert "author fit 1/2; fact grok 1/2 methods" in text
    assert text.count("| *gold* |") == text.count("| *do nothing* |") == 2
    frontier = text[text.index("What the others reached") :]
    assert "| ga | author | fit | 0/2 |" in frontier
    assert "npo" not in frontier
