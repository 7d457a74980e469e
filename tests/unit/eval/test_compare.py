"""Comparison of unlearning runs: means, paired differences and censoring, on numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.compare import compare, contrasts_between, paired_numbers
from llm_unlearn.eval.outcome import AT_TARGET, Outcome, find_outcomes, load_outcomes

REACHED = ((0, 0.9, 1.0), (4, 0.2, 0.8), (8, 0.1, 0.7))  # step, forget probability, retain accuracy
NEVER = ((0, 0.9, 1.0), (8, 0.3, 0.9))
N_ROWS = 100  # accuracies move in steps of .01: finer than the spread of the differences below
# differences grok - fit: npo -.1 -.3 -.2, ga -.1 0 -.2
FORGET_ACC = {
    ("npo", "fit"): (0.5, 0.6, 0.7),
    ("npo", "grok"): (0.4, 0.3, 0.5),
    ("ga", "fit"): (0.5, 0.5, 0.5),
    ("ga", "grok"): (0.4, 0.5, 0.3),
}


def run(method="npo", checkpoint="fit", seed=0, path=REACHED, target=0.25, **values) -> Outcome:
    numbers = {"forget_acc": 0.5, "retain_acc": 0.9, **values}
    metrics = {name: {"value": value, "gold": 0.1, "start": 1.0, "n": N_ROWS} for name, value in numbers.items()}
    trajectory = [{"step": s, "forget_prob": p, "retain_acc": r, "retain_inf_acc": r / 2} for s, p, r in path]
    return Outcome(Path(f"{method}-{checkpoint}-{seed}"), method, checkpoint, seed, metrics, trajectory, target, {}, {})


def study(seeds=(0, 1, 2)) -> list[Outcome]:
    return [run(m, k, s, forget_acc=values[s]) for (m, k), values in FORGET_ACC.items() for s in seeds]


def p_of(t: float) -> float:
    return 1 - abs(t) / np.sqrt(2 + t * t)  # two-sided, Student t with 2 degrees of freedom


def test_paired_differences_and_holm_by_hand():
    found = compare(study())
    assert found.groups == ("fit", "grok")
    assert found.methods == ("ga", "npo")
    npo, ga = p_of(-0.2 / (0.1 / np.sqrt(3))), p_of(-0.1 / (0.1 / np.sqrt(3)))
    contrasts = {c.method: c for c in found.contrasts if c.measure == "forget_acc"}
    one = contrasts["npo"]
    assert (one.group, one.baseline, one.n) == ("grok", "fit", 3)
    half = 4.302652729911275 * 0.1 / np.sqrt(3)  # the 97.5 % point for 2 degrees of freedom
    assert (one.mean, one.lo, one.hi) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert (one.p, contrasts["ga"].p) == pytest.approx((npo, ga))
    assert one.p_holm == pytest.approx(2 * npo), "the smaller of two p-values is doubled"
    assert contrasts["ga"].p_holm == pytest.approx(max(ga, 2 * npo))
    summary = found.cells["npo"]["grok"]["forget_acc"]
    assert (summary.mean, summary.n, summary.of) == (pytest.approx(0.4), 3, 3)
    assert (summary.lo, summary.hi) == pytest.approx((0.4 - half, 0.4 + half))


def test_pairs_are_matched_by_seed_and_not_by_order():
    outcomes = study()
    assert compare(outcomes[::-1]).contrasts == compare(outcomes).contrasts
    lone = compare([*study(), run("npo", "grok", 7, forget_acc=0.0)])  # no fit of seed 7: nothing to pair it with
    assert [c.n for c in lone.contrasts if c.measure == "forget_acc"] == [3, 3]
    assert lone.cells["npo"]["grok"]["forget_acc"].n == 4


def test_below_three_seeds_there_is_no_contrast():
    found = compare(study(seeds=(0, 1)))
    assert found.contrasts == ()
    assert found.cells["npo"]["fit"]["forget_acc"].lo is not None
    alone = compare(study(seeds=(0,))).cells["npo"]["fit"]["forget_acc"]
    assert (alone.mean, alone.lo, alone.hi, alone.n) == (0.5, None, None, 1)


def test_by_method_the_roles_are_exchanged():
    found = compare(study(), by="method", baseline="npo")
    assert (found.groups, found.methods) == (("ga", "npo"), ("fit", "grok"))
    (fit,) = [c for c in found.contrasts if c.measure == "forget_acc" and c.method == "fit"]
    assert (fit.group, fit.baseline, fit.mean) == ("ga", "npo", pytest.approx(0.5 - 0.6))


def test_a_run_that_never_reaches_the_target_is_counted_and_not_averaged():
    paths = {0: REACHED, 1: NEVER, 2: REACHED}
    outcomes = [run("npo", k, s, path=paths[s]) for k in ("fit", "grok") for s in paths]
    found = compare(outcomes)
    updates = found.cells["npo"]["fit"]["updates_to_target"]
    assert (updates.mean, updates.n, updates.of) == (4.0, 2, 3)
    assert found.cells["npo"]["fit"]["retain_at_target"].mean == 0.8
    assert found.cells["npo"]["fit"]["retain_inf_at_target"].mean == 0.4
    assert run(target=None).number("updates_to_target") is None
    assert run(target=0.2).number("updates_to_target") == 4, "at the target is reached"


def contrasted(outcomes: list[Outcome]) -> set[str]:
    return {c.measure for c in compare(outcomes).contrasts}


@pytest.mark.parametrize("late", ["fit", "grok"])
def test_nothing_at_the_target_is_contrasted_where_a_side_never_got_there(late):
    outcomes = [run("npo", k, s) for k in ("fit", "grok") for s in range(5)]
    missed = [run("npo", o.checkpoint, o.seed, NEVER) if (o.checkpoint, o.seed) == (late, 4) else o for o in outcomes]
    assert contrasted(missed) == contrasted(outcomes) - set(AT_TARGET), "the four seeds left would be the lucky ones"
    assert set(AT_TARGET) <= contrasted(outcomes)
    unpaired = [o for o in missed if o.seed < 4 or o.checkpoint == late]
    assert contrasted(unpaired) == contrasted(outcomes), "a seed that one side lacks is in no pair"


@pytest.mark.parametrize("side", ["fit", "grok"])
def test_a_method_that_collapsed_in_some_seed_is_not_contrasted(side):
    outcomes = [run(m, k, s) for m in ("npo", "ga") for k in ("fit", "grok") for s in range(4)]
    broken = run("ga", side, 3, retain_acc=0.05, forget_acc=0.1)  # as near to gold as can be
    found = compare([broken if (o.method, o.checkpoint, o.seed) == ("ga", side, 3) else o for o in outcomes])
    assert {c.method for c in found.contrasts} == {"npo"}
    assert found.cells["ga"][side]["forget_acc"].n == 4, "its numbers are shown all the same"


def test_equal_differences_of_accuracies_and_updates_are_as_sure_as_their_grid():
    def late(checkpoint: str) -> tuple:
        return REACHED if checkpoint == "fit" else (*REACHED[:1], (4, 0.6, 0.9), *REACHED[2:])

    found = compare(
        [run("npo", k, s, late(k), forget_acc=0.5 - 0.2 * (k == "grok")) for k in ("fit", "grok") for s in range(3)]
    )
    by = {c.measure: c for c in found.contrasts}
    t975 = 4.302652729911275
    for name, difference, step in (
        ("forget_acc", -0.2, 1 / N_ROWS),
        ("forget_acc~gold", -0.2, 1 / N_ROWS),
        ("updates_to_target", 4.0, 4.0),  # evaluated at 0, 4 and 8
    ):
        error = step * np.sqrt(2 / 12) / np.sqrt(3)
        assert (by[name].mean, by[name].hi - by[name].mean) == pytest.approx((difference, t975 * error))
        assert by[name].p == pytest.approx(p_of(difference / error))


def test_a_metric_only_some_seeds_have_is_contrasted_over_those():
    some = [run("npo", k, s, **({"forget_inf_acc": 0.3} if s else {})) for k in ("fit", "grok") for s in range(4)]
    (found,) = [c for c in compare(some).contrasts if c.measure == "forget_inf_acc"]
    assert (found.n, found.mean) == (3, 0)


def test_distances_to_gold_and_of_doing_nothing():
    one = run(forget_acc=0.4)
    assert one.number("forget_acc") == 0.4
    assert one.number("forget_acc~gold") == pytest.approx(0.3)
    assert one.number("forget_acc~start") == pytest.approx(0.9)
    assert one.number("forget_inf_acc") is None
    without = Outcome(Path("x"), "npo", "fit", 0, {"forget_acc": {"value": 0.4, "gold": 0.1}}, [], None, {}, {})
    assert without.number("forget_acc~start") is None, "the run's own distance is not that of doing nothing"
    no_gold = Outcome(Path("x"), "npo", "fit", 0, {"forget_acc": {"value": 0.4, "start": 1.0}}, [], None, {}, {})
    assert no_gold.number("forget_acc~gold") is None
    assert no_gold.number("forget_acc~start") is None
    found = compare([one])
    assert found.cells["npo"]["fit"]["forget_acc~start"].mean == pytest.approx(0.9)


def test_collapse_is_measured_against_the_start():
    assert run(retain_acc=0.09).collapsed
    assert not run(retain_acc=0.11).collapsed
    assert compare([run(seed=0, retain_acc=0.0), run(seed=1)]).collapsed == {"npo": {"fit": 1}}


def test_wrong_use_is_refused():
    with pytest.raises(UserError, match="two runs of npo from fit with seed 0"):
        compare([run(), run()])
    with pytest.raises(UserError, match="baseline 'late' is not among fit"):
        compare([run()], baseline="late")
    with pytest.raises(UserError, match="--by"):
        compare([run()], by="seed")


def results(folder: Path, value: float, at: int, more: tuple[str, ...] = (), model: str = "m", **facts) -> Path:
    folder.mkdir(parents=True)
    told = {"method": "npo", "checkpoint": "fit", "seed": 0, "target": 0.25, **facts}
    metrics = {name: {"value": value, "gold": 0.1, "start": 1.0} for name in ("forget_acc", *more)}
    path = folder / "results.json"
    path.write_text(json.dumps({"model": model, "suite": "s", "run": told, "metrics": metrics, "answers": {}}))
    os.utime(path, (at, at))
    return path


def test_outcomes_are_found_below_a_folder(tmp_path):
    results(tmp_path / "a/eval-1", 0.4, at=100)
    (tmp_path / "a/trajectory.jsonl").write_text('{"step": 6, "forget_prob": 0.2, "retain_acc": 0.8}\n')
    other = results(tmp_path / "b/eval-1", 0.3, at=100, seed=1)
    (tmp_path / "start/eval-1").mkdir(parents=True)
    (tmp_path / "start/eval-1/results.json").write_text(json.dumps({"suite": "s", "run": {}, "metrics": {}}))
    found = load_outcomes([tmp_path])
    assert [(o.folder, o.seed, o.number("updates_to_target")) for o in found] == [
        (tmp_path / "a", 0, 6),
        (tmp_path / "b", 1, None),
    ]
    assert [o.seed for o in load_outcomes([other])] == [1]
    with pytest.raises(UserError, match="no evaluated unlearning run"):
        load_outcomes([tmp_path / "start"])
    assert find_outcomes([tmp_path / "start"]) == []
    for gone in (tmp_path / "gone", tmp_path / "gone/results.json"):
        with pytest.raises(UserError, match="gone.*: no such folder or results.json"):
            find_outcomes([gone])


def test_how_a_run_ended_and_what_it_took_come_with_it(tmp_path):
    results(tmp_path / "a/eval-1", 0.4, at=100, stop="floor", kept_faults=["over_forgotten"], cost={"flops": 5})
    results(tmp_path / "b/eval-1", 0.3, at=100, seed=1)
    a, b = load_outcomes([tmp_path])
    assert (a.stop, a.kept_faults, a.cost) == ("floor", ["over_forgotten"], {"flops": 5})
    assert (b.stop, b.kept_faults, b.cost) == (None, (), {})


def test_results_written_elsewhere_are_the_run_s(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "final").mkdir(parents=True)
        (tmp_path / "runs" / name / "trajectory.jsonl").write_text('{"step": 6, "forget_prob": 0.2}\n')
    for name, model in (("a", "runs/a"), ("b", "runs/b/final"), ("c", "gone")):
        results(tmp_path / "out" / name, 0.4, at=100, seed=ord(name), model=str(tmp_path / model))
    results(tmp_path / "runs/a/eval-1", 0.3, at=50, seed=ord("a"))
    found = find_outcomes([tmp_path])
    assert [(o.folder.relative_to(tmp_path).as_posix(), len(o.trajectory)) for o in found] == [
        ("out/c", 0),
        ("runs/a", 1),
        ("runs/b", 1),
    ]


def test_another_forget_request_is_another_question():
    outcomes = [dataclasses.replace(o, request=f"world {o.seed}") for o in study()]
    assert compare(outcomes).contrasts, "each seed has its own world, and so its own request"
    outcomes[-1] = dataclasses.replace(outcomes[-1], request="other")
    with pytest.raises(UserError, match=r"npo-fit-2 and .*-2 \(seed 2\) forgot different things"):
        compare(outcomes)


@pytest.mark.parametrize("missing", ["metrics", "answers"])
def test_results_that_lack_a_part_are_one_line(tmp_path, missing):
    file = results(tmp_path / "a/eval-1", 0.4, at=100)
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json: has no {missing}; evaluate the model again"):
        find_outcomes([tmp_path])


def test_a_torn_results_file_is_one_line_and_a_foreign_one_is_passed_by(tmp_path):
    results(tmp_path / "a/eval-1", 0.4, at=100)
    (tmp_path / "results.json").write_text("[1, 2]")
    assert len(find_outcomes([tmp_path])) == 1
    torn = tmp_path / "a/eval-1/results.json"
    torn.write_text(torn.read_text()[:-20])
    with pytest.raises(UserError, match=r"eval-1/results\.json: is no whole JSON"):
        find_outcomes([tmp_path])


def test_of_two_evaluations_of_a_run_the_fullest_counts_and_then_the_newest(tmp_path):
    results(tmp_path / "a/eval-x", 0.4, at=200)
    results(tmp_path / "a/eval-y", 0.9, at=100)
    (one,) = load_outcomes([tmp_path])
    assert one.number("forget_acc") == 0.4
    results(tmp_path / "a/eval-full", 0.7, at=50, more=("retain_acc",))
    (one,) = load_outcomes([tmp_path])
    assert one.number("forget_acc") == 0.7, "a quick look later does not replace the full suite"


def test_a_torn_trajectory_is_read_up_to_the_tear(tmp_path):
    results(tmp_path / "a/eval-1", 0.4, at=100)
    (tmp_path / "a/trajectory.jsonl").write_text('{"step": 0, "forget_prob": 0.9}\n{"step": 2, "forg')
    (one,) = load_outcomes([tmp_path])
    assert [line["step"] for line in one.trajectory] == [0]


def test_results_of_weights_that_are_no_more_do_not_count(tmp_path):
    def of(weights, path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "identity": {"model": weights}}))
        return path

    of("old", results(tmp_path / "a/eval-full", 0.9, at=50, more=("retain_acc",)))
    os.utime(of("new", results(tmp_path / "a/eval-quick", 0.4, at=100)), (100, 100))
    os.utime(tmp_path / "a/eval-full/results.json", (50, 50))
    (one,) = find_outcomes([tmp_path])
    assert one.number("forget_acc") == 0.4


PARTS = {"test_acc": 0.6, "retain_acc": 0.9, "forget_acc": 0.5}


def image_run(checkpoint="fit", seed=0, cost=None, stop="max_steps", forget=(1.0, 0.5, 0.05), **values) -> Outcome:
    o = run("ga", checkpoint, seed, **{**PARTS, **values})
    path = [{"step": 5 * i, "forget_acc": f, "forget_prob": f, "retain_acc": 1.0} for i, f in enumerate(forget)]
    return dataclasses.replace(o, trajectory=path, cost=cost or {}, stop=stop)


def test_measures_of_model_gold_and_start_at_once():
    o = image_run()  # gold .1 and start 1 on each
    assert o.number("ues") == pytest.approx(50 / (40 * 10))
    assert o.number("forgotten_share") == pytest.approx(0.5 / 0.9)
    assert o.number("unlearning_balance") == pytest.approx(3 / (0.9 / 0.5 + 1 / 0.6 + 1 / 0.9))
    assert o.number("test_acc~drop") == pytest.approx(0.4)
    assert o.number("forget_acc~left") == pytest.approx(0.4 / 0.9)
    numbers, step = paired_numbers([image_run(k) for k in ("fit", "grok")], "ga", "grok", "fit", "forget_acc~left")
    assert (numbers[0], step) == (pytest.approx((0.4 / 0.9, 0.4 / 0.9)), pytest.approx(1 / N_ROWS / 0.9))
    near = dataclasses.replace(o, metrics={"forget_acc": {"value": 0.5, "start": 0.55, "gold": 0.5, "n": N_ROWS}})
    assert near.number("forget_acc~left") is None, "of next to nothing no share says anything"
    found = compare([image_run(k, s) for k in ("fit", "grok") for s in range(3)])
    assert {"ues", "unlearning_balance", "test_acc"} <= set(found.measures)
    assert "ues" not in compare(study()).measures, "no test accuracy"


def test_collapse_is_judged_above_chance():
    assert not image_run(retain_acc=0.15).collapsed
    chance = {"retain_chance": {"value": 0.1, "n": 10}}
    o = image_run(retain_acc=0.15)
    assert dataclasses.replace(o, metrics={**o.metrics, **chance}).collapsed
    o = image_run(retain_acc=0.2)
    assert not dataclasses.replace(o, metrics={**o.metrics, **chance}).collapsed


def test_seconds_and_flops_follow_the_updates():
    cost = {"updates": 20, "train_seconds": 4.0, "flops": 100.0, "reference_flops": 20.0}
    o = image_run(cost=cost)  # gold's accuracy .1 is reached at update 10, the target .25 too
    assert [o.number(f"{unit}_to_gold_acc") for unit in ("updates", "seconds", "flops")] == [10, 2, 60]
    assert o.number("seconds_to_target") == 2
    assert image_run().number("seconds_to_gold_acc") is None, "cost not known"
    late = image_run(cost=cost, forget=(1.0, 0.5))
    assert late.number("updates_to_gold_acc") is None
    assert (late.time_until("acc").at, late.time_until("acc").reached) == (5, False)
    assert not late.time_until("acc").ended
    assert image_run(forget=(1.0, 0.5), stop="collapse").time_until("acc").ended


def test_times_are_not_contrasted_where_a_side_never_got_there():
    runs = [image_run(k, s) for k in ("fit", "grok") for s in range(4)]
    assert "updates_to_gold_acc" in contrasted(runs)
    assert "updates_to_gold_acc" not in contrasted([*runs[:-1], image_run("grok", 3, forget=(1.0, 0.5))])


def test_contrasts_of_given_pairs_are_corrected_together():
    values = {"fit": (0.5, 0.6, 0.7), "grok": (0.4, 0.3, 0.5), "easy": (0.3, 0.3, 0.4)}
    runs = [run("npo", k, s, forget_acc=v) for k, by in values.items() for s, v in enumerate(by)]
    found = contrasts_between(runs, [("grok", "fit"), ("grok", "easy"), ("grok", "sam")], ["forget_acc"])
    assert [(c.group, c.baseline) for c in found] == [("grok", "fit"), ("grok", "easy")]
    assert found[0].mean == pytest.approx(-0.2)
    assert found[1].mean == pytest.approx(0.2 / 3)
    ps = [c.p for c in found]
    assert min(c.p_holm for c in found) == pytest.approx(2 * min(ps))
    numbers, step = paired_numbers(runs, "npo", "grok", "easy", "forget_acc")
    assert numbers == {0: (0.4, 0.3), 1: (0.3, 0.3), 2: (0.5, 0.4)}
    assert step == 1 / N_ROWS
    assert paired_numbers(runs, "npo", "grok", "sam", "forget_acc")[0] == {}
    broken = [run("npo", k, s, retain_acc=0.01) for k in ("grok", "easy") for s in range(3)]
    assert paired_numbers(broken, "npo", "grok", "easy", "forget_acc")[0] == {}


def test_what_was_kept_at_the_level_is_there_for_runs_that_never_got_to_it():
    there = run(retain_acc=0.9, forget_Q_A_Prob=0.2)
    short = run(retain_acc=0.9, forget_Q_A_Prob=0.45, path=NEVER)
    assert there.number("kept_at_level") == pytest.approx(0.9)
    assert short.number("kept_at_level") == pytest.approx(0.9 - (0.45 - 0.25))
    assert short.number("retain_at_target") is None
    assert run(retain_acc=0.9, forget_Q_A_Prob=0.2, target=None).number("kept_at_level") is None
    assert run(retain_acc=0.9).number("kept_at_level") is None
    by_acc = replace(run(retain_acc=0.9, forget_acc=0.45, forget_Q_A_Prob=0.1), target_by="acc")
    assert by_acc.number("kept_at_level") == pytest.approx(0.9 - (0.45 - 0.25))
    assert short.number("retain_acc@level") == short.number("kept_at_level")
    assert short.number("retain_acc~drop@level") == pytest.approx(short.number("retain_acc~drop") + 0.45 - 0.25)
    assert short.number("none@level") is None
    seeds = [run(checkpoint=k, seed=s, retain_acc=a - s / 50, forget_Q_A_Prob=0.25 + missed, path=NEVER)
             for k, a, missed in (("fit", 0.9, 0.1), ("grok", 0.9, 0.0)) for s in (0, 1, 2)]  # fmt: skip
    found = {c.measure: c for c in compare(seeds).contrasts}
    assert found["kept_at_level"].mean == pytest.approx(0.1)
    assert "retain_at_target" not in found, "half of the runs never came to it"
    for name in ("kept_at_level", "retain_acc@level", "retain_acc~drop@level"):
        assert paired_numbers(seeds, "npo", "grok", "fit", name)[1] == 1 / N_ROWS
