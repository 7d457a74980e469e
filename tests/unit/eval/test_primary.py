"""The contrast declared beforehand, on numbers worked out by hand and against scipy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llm_unlearn.cli import app
from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.eval.compare import compare, other_requests, primary_of
from llm_unlearn.eval.outcome import Outcome, of_scenario
from llm_unlearn.eval.primary import Paired, Primary, judge
from llm_unlearn.report.collect import report_data
from llm_unlearn.stats import detectable_effect

DECLARED = {
    "measure": "forget_acc~gold",
    "methods": ["npo", "ga"],
    "contrasts": [["grok", "fit"], ["grok", "easy"]],
    "bound": 0.1,
}
FIT = (0.60, 0.62, 0.64, 0.58, 0.61)  # the numbers lie far apart from gold's .1, so the distances differ as they do
GROK = (0.40, 0.43, 0.43, 0.37, 0.41)  # differences -.20 -.19 -.21 -.21 -.20
EASY = (0.41, 0.42, 0.42, 0.38, 0.40)  # grok - easy: -.01 .01 .01 -.01 .01


def primary(**changes) -> Primary:
    return build_config(Primary, {**DECLARED, **changes})


def outcome(method: str, checkpoint: str, seed: int, value: float, **more) -> Outcome:
    metrics = {
        "forget_acc": {"value": value, "gold": 0.1, "start": 1.0, "n": 100_000},
        "retain_acc": {"value": 0.9, "gold": 1.0, "start": 1.0, "n": 1000},
    }
    told = {"primary": DECLARED, "control": checkpoint == "easy", **more}
    return Outcome(Path(f"{method}-{checkpoint}-{seed}"), method, checkpoint, seed, metrics, [], None, {}, {}, **told)


def study(**more) -> list[Outcome]:
    values = {"fit": FIT, "grok": GROK, "easy": EASY}
    return [
        outcome(m, k, s, v, **more) for m in ("npo", "ga", "rmu") for k, of in values.items() for s, v in enumerate(of)
    ]


def test_the_declared_contrasts_are_a_family_of_their_own():
    found = compare(study()).primary
    assert found is not None
    assert [(x.method, x.group, x.baseline) for x in found.contrasts] == [
        ("npo", "grok", "fit"), ("ga", "grok", "fit"), ("npo", "grok", "easy"), ("ga", "grok", "easy"),
    ]  # fmt: skip
    against_fit, _, against_easy, _ = found.contrasts
    differs, near = np.subtract(GROK, FIT), np.subtract(GROK, EASY)
    assert against_fit.mean == pytest.approx(differs.mean())
    assert against_fit.p_holm == pytest.approx(4 * scipy_stats.ttest_1samp(differs, 0).pvalue, rel=1e-6)
    interval = scipy_stats.ttest_1samp(differs, 0).confidence_interval(0.95)
    assert (against_fit.lo, against_fit.hi) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert against_fit.p_equivalence == 1
    below = scipy_stats.ttest_1samp(near, 0.1, alternative="less").pvalue
    assert below > scipy_stats.ttest_1samp(near, -0.1, alternative="greater").pvalue
    assert against_easy.p_equivalence == pytest.approx(4 * below, rel=1e-5), "of four, the two that are not 1 tie"
    assert against_easy.detectable == pytest.approx(detectable_effect(near.std(ddof=1), 5, 0.05 / 4), rel=1e-5)
    assert [x.verdict for x in found.contrasts] == ["differs", "differs", "equivalent", "equivalent"]
    assert {(x.n, x.of) for x in found.contrasts} == {(5, 5)}


def test_a_wide_spread_cannot_tell():
    noisy = replace(study()[0], checkpoint="grok")
    runs = [o for o in study() if (o.method, o.checkpoint) != ("npo", "grok")]
    wild = [replace(noisy, seed=s, metrics=outcome("npo", "grok", s, v).metrics) for s, v in enumerate((0.2, 0.9, 0.5))]
    found = compare([*runs, *wild]).primary
    assert found is not None
    first = found.contrasts[0]
    assert (first.verdict, first.n, first.of) == ("cannot tell", 3, 5)
    assert first.detectable is not None
    assert first.mean is not None
    assert first.detectable > abs(first.mean)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"signs": ("one token",)}, "collapsed in seed 3"),
        ({"metrics": {}}, None),
    ],
)
def test_what_cannot_be_tested_says_why_and_keeps_its_place_in_the_family(broken, said):
    at = ("npo", "grok", 3)
    runs = [replace(o, **broken) if (o.method, o.checkpoint, o.seed) == at else o for o in study()]
    found, whole = compare(runs).primary, compare(study()).primary
    assert found is not None
    assert whole is not None
    if said is None:  # a seed without the number is left out
        assert (found.contrasts[0].verdict, found.contrasts[0].n) == ("differs", 4)
        return
    assert (found.contrasts[0].verdict, found.contrasts[0].why) == ("not testable", said)
    assert (found.contrasts[0].mean, found.contrasts[0].p_holm) == (None, None)
    # four tests were declared, so the smallest p is multiplied by 4 all the same
    assert found.contrasts[1].p_holm == pytest.approx(whole.contrasts[1].p_holm)


def test_a_run_that_never_got_there_leaves_a_time_untestable():
    timed = {**DECLARED, "measure": "updates_to_target", "bound": 10.0}
    path = [{"step": s, "forget_prob": p, "retain_acc": 0.9} for s, p in ((0, 0.9), (10, 0.5), (20, 0.2))]
    runs = [replace(o, primary=timed, trajectory=path, target=0.3) for o in study()]
    at = ("npo", "grok", 2)
    late = [replace(o, target=0.1) if (o.method, o.checkpoint, o.seed) == at else o for o in runs]
    found = compare(late).primary
    assert found is not None
    assert found.contrasts[0].why == "never came down to the level in seed 2"
    assert found.contrasts[1].mean == 0


def test_two_seeds_are_not_tested():
    found = compare([o for o in study() if o.seed < 2]).primary
    assert found is not None
    assert {(x.verdict, x.why) for x in found.contrasts} == {("not testable", "2 seeds in common, 3 needed")}


def test_runs_made_before_it_was_declared_or_for_another_one_are_not_judged():
    early = [replace(o, primary=None) if (o.method, o.seed) == ("npo", 0) else o for o in study()]
    found = compare(early).primary
    assert found is not None
    assert found.contrasts == ()
    assert found.problem == "3 of its runs were made before it was declared, or for another one"
    other = [replace(o, primary={**DECLARED, "bound": 0.3}) if o.seed == 0 else o for o in study()]
    assert (found := compare(other).primary) is not None
    assert found.problem
    elsewhere = [replace(o, primary=None) if o.method == "rmu" else o for o in study()]
    assert (found := compare(elsewhere).primary) is not None
    assert not found.problem, "a method that it is not judged on"
    assert compare([replace(o, primary=None) for o in study()]).primary is None


def test_it_is_judged_on_its_scenario_alone():
    author = {**DECLARED, "scenario": "author"}
    runs = [replace(o, scenario=name, primary=author) for name in ("author", "fact") for o in study()]
    with pytest.raises(UserError, match="forgot different things.*--scenario NAME"):
        compare(runs)
    assert primary_of(of_scenario(runs, "author")) == primary_of(runs)
    assert primary_of(of_scenario(runs, "fact")) is None
    with pytest.raises(UserError, match="no run of scenario 'autor'; did you mean 'author'"):
        of_scenario(runs, "autor")
    with pytest.raises(UserError, match="these runs are of a study of one"):
        of_scenario(study(), "author")


def test_the_rest_is_as_it_was():
    found, plain = compare(study()), compare([replace(o, primary=None) for o in study()])
    assert found.contrasts == plain.contrasts
    assert found.groups == ("fit", "grok", "easy")


def test_checkpoints_stand_in_their_order():
    names = ("zoo", "twin", "post", "sam", "alpha", "fit_scaled", "early", "spline", "easy", "grok", "fit")
    runs = [outcome("npo", k, s, 0.3) for k in names for s in range(3)]
    assert compare(runs).groups == (
        "early", "fit", "fit_scaled", "grok", "post", "easy", "sam", "spline", "twin", "alpha", "zoo",
    )  # fmt: skip


def test_a_control_may_have_rows_of_its_own_to_forget_and_is_named():
    runs = [replace(o, request=f"{o.seed}{'*' * o.control}") for o in study()]
    assert compare(runs).primary is not None
    assert other_requests(runs) == ("easy",)
    assert other_requests(study()) == ()
    stray = [replace(o, request="x") if (o.method, o.checkpoint) == ("ga", "easy") else o for o in runs]
    with pytest.raises(UserError, match="forgot different things"):
        compare(stray)
    main = [replace(o, control=False) for o in runs]
    with pytest.raises(UserError, match="forgot different things"):
        compare(main)


@pytest.mark.parametrize("change", [{"methods": []}, {"contrasts": []}, {"contrasts": [["a"]]}, {"alpha": 0.5}])
def test_what_is_no_primary(change):
    with pytest.raises(UserError, match=next(iter(change))):
        primary(**change)


def test_false_alarms_over_a_whole_family_keep_the_level():
    rng, one = np.random.default_rng(11), primary(contrasts=[["a", "b"]], methods=["x", "y", "z"])
    alarms = 0
    for _ in range(1500):
        found = judge(one, lambda *_: Paired(list(rng.normal(size=6)), list(rng.normal(size=6)), 0.0, 6))
        alarms += any(x.verdict == "differs" for x in found.contrasts)
    assert alarms / 1500 <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 1500)


def test_compare_of_a_study_of_several_requests_takes_one(tmp_path, capfd):
    for scenario in ("author", "fact"):
        for kind, value in (("fit", 0.6), ("grok", 0.4)):
            run = {"method": "npo", "checkpoint": kind, "seed": 0, "scenario": scenario, "request": scenario}
            metrics = {"forget_acc": {"value": value + (scenario == "fact") / 10, "gold": 0.1, "start": 1.0, "n": 20}}
            folder = tmp_path / scenario / kind / "eval-x"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"run": run, "metrics": metrics, "answers": {}}))
    assert app(["compare", str(tmp_path), "--scenario", "fact", "--json"], standalone_mode=False) is None
    cells = json.loads(capfd.readouterr().out)["cells"]
    assert [c["measures"]["forget_acc"]["mean"] for c in cells] == pytest.approx([0.7, 0.5])
    with pytest.raises(UserError, match="--scenario NAME"):
        app(["compare", str(tmp_path)], standalone_mode=False)
    assert report_data([tmp_path], "author").outcomes[0].scenario == "author"
