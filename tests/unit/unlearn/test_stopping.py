"""Which step of an unlearning run is kept, when it ends and why, and what raises an alarm."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.errors import Diverged
from llm_unlearn.unlearn import stopping
from llm_unlearn.unlearn.config import StopConfig
from llm_unlearn.unlearn.stopping import Level, UnlearnWatch, keep_rank, kept, left, over_forgotten, stop_reason

GOLD = Level(0.1, "gold", -3.0)
FREE = StopConfig(floor=None, collapse=None, over_forget=None)


def line(forget: float = 0.9, retain: float = 1.0, loss: float | None = None, **more: float) -> dict[str, float]:
    """An evaluation; unless given, every forget answer is one token, so that its loss is the probability's."""
    loss = -math.log(max(forget, 1e-30)) if loss is None else loss
    return {"forget_prob": forget, "forget_loss": loss, "retain_acc": retain, "retain_prob": 0.9 * retain, **more}


START = line(0.9, 1.0)


@pytest.mark.parametrize(
    ("forget", "retain", "score"),
    [(0.9, 1.0, 0.2), (0.1, 1.0, 1.0), (0.05, 0.8, 0.8), (0.0, 0.8, 0.8), (0.3, 0.9, 0.7)],
)
def test_the_score_of_a_step_by_hand(forget, retain, score):
    assert keep_rank(line(forget, retain), START, GOLD, FREE) == (True, forget <= 0.1, True, pytest.approx(score))


def test_forget_accuracy_may_be_what_comes_down():
    level = Level(0.5, "given", by="acc")
    far, near = ({**line(), "forget_prob": p, "forget_acc": a} for p, a in ((0.1, 0.8), (0.9, 0.5)))
    assert [stop_reason(its, line(), level, StopConfig(by="acc")) for its in (far, near)] == [None, "target"]
    ranks = [keep_rank(its, line(), level, StopConfig(by="acc")) for its in (far, near)]
    assert [rank[1] for rank in ranks] == [False, True]
    assert ranks[1][3] - ranks[0][3] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (line(0.80, 0.75), line(0.1, 0.65)),  # above the floor of .7 before forgotten
        (line(0.1, 0.75, loss=9.0), line(0.80, 1.0)),  # forgotten, and too much so, before not forgotten
        (line(0.1, 0.75), line(0.1, 1.0, loss=9.0)),  # not over-forgotten before more kept
        (line(0.3, 0.95), line(0.2, 0.80)),  # above the target one is weighed against the other
        (line(0.1, 0.75, loss=9.0), line(0.1, 0.65)),  # above the floor before not over-forgotten
        (line(0.1, 0.95), line(0.05, 0.9)),  # below the target only what is kept counts
    ],
)
def test_what_is_kept_in_which_order(better, worse):
    stop = StopConfig()
    assert keep_rank(better, START, GOLD, stop) > keep_rank(worse, START, GOLD, stop)


shares = st.floats(0, 1)


@given(shares, shares, shares, st.floats(0, 20))
def test_a_step_that_kept_more_is_never_ranked_lower(forget, a, b, loss):
    low, high = sorted((a, b))
    rank = [keep_rank(line(forget, retain, loss), START, GOLD, StopConfig()) for retain in (low, high)]
    assert rank[0] <= rank[1]


@given(shares, shares, st.floats(0, 40))
def test_a_usable_step_is_what_the_stopping_rules_let_pass(forget, retain, loss):
    """A run ends below the floor exactly at the steps that rank behind all above it."""
    now, stop = line(forget, retain, loss), StopConfig(until="max_steps")
    assert (stop_reason(now, START, GOLD, stop) is None) == keep_rank(now, START, GOLD, stop)[0]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({"retain_acc": 0.5, "retain_prob": 0.9}, 0.3),
        ({"retain_acc": 0.49, "retain_prob": 0.9}, 0.8),  # long answers: word for word says little
        ({}, 1.0),
    ],
)
def test_what_is_kept_is_read_from_what_says_most(start, expected):
    now = {"retain_acc": 0.3, "retain_prob": 0.8} if start else {}
    assert kept(now, start) == expected
    assert left(now, start) == pytest.approx(expected / kept(start, start))


@pytest.mark.parametrize(
    ("gold", "start", "now", "found"),
    [
        (-3.0, -0.1, -5.8, False),  # 2.8 nats below gold, doing nothing is 2.9 above it
        (-3.0, -0.1, -6.0, True),
        (-0.5, -0.1, -1.4, False),  # .9 below gold: further than doing nothing, but less than a nat
        (-0.5, -0.1, -1.6, True),
        (-3.0, -3.5, -3.9, False),  # a start below gold: a nat counts
        (-3.0, -0.1, -1.0, False),
    ],
)
def test_over_forgotten_by_hand(gold, start, now, found):
    lines = line(loss=-now), line(loss=-start)
    assert over_forgotten(*lines, Level(0.1, "gold", gold), 1.0) is found
    assert over_forgotten(*lines, Level(0.1, "given"), 1.0) is False
    assert over_forgotten(*lines, Level(0.1, "gold", gold), None) is False


@given(st.floats(-40, 0), st.floats(-40, 0), st.floats(0, 40), st.floats(0, 5))
def test_a_step_nearer_to_gold_than_the_start_is_never_over_forgotten(gold, start, loss, nats):
    if over_forgotten(line(loss=loss), line(loss=-start), Level(0.1, "gold", gold), nats):
        assert gold + loss > abs(start - gold) or start < gold
        assert gold + loss > nats


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (line(0.5, 0.9), None),
        (line(0.1, 0.9), "target"),
        (line(0.1, 0.69), "floor"),
        (line(0.0, 0.09), "collapse"),
        (line(0.9, 0.0), "collapse"),
        (line(0.5, 0.7), None),
    ],
)
def test_why_a_run_stops_by_hand(now, reason):
    assert stop_reason(now, START, GOLD, StopConfig()) == reason


@pytest.mark.parametrize(
    ("change", "now", "reason"),
    [
        ({"until": "max_steps"}, line(0.0, 1.0), None),
        ({"floor": None}, line(0.5, 0.2), None),
        ({"floor": None}, line(0.5, 0.05), "collapse"),
        ({"floor": None, "collapse": None, "until": "max_steps"}, line(0.0, 0.0), None),
        ({"collapse": None}, line(0.5, 0.05), "floor"),
    ],
)
def test_every_rule_can_be_switched_off(change, now, reason):
    assert stop_reason(now, START, GOLD, StopConfig(**change)) == reason


class Play:
    """A run that shows the watch given forget probabilities and retain accuracies; its one weight is the step."""

    def __init__(self, monkeypatch, forget, retain, every=1) -> None:
        self.forget, self.retain, self.every = forget, retain, every
        self.weight = torch.nn.Linear(1, 1, bias=False)
        accelerator = SimpleNamespace(is_main_process=True, num_processes=1, distributed_type=DistributedType.NO)
        self.run = SimpleNamespace(
            interruptible=nullcontext,
            step=0,
            max_steps=(len(forget) - 1) * every,
            model=self,
            answer_model=self,
            lm=self.weight,
            accelerator=accelerator,
            stop_reason=None,
        )
        monkeypatch.setattr(stopping, "quick_scores", self.scores)

    def scores(self, model, items):
        i = self.run.step // self.every
        if math.isnan(self.forget[i]):
            raise Diverged("the model's log-probabilities are NaN")
        shown = line(self.forget[i])
        loss, probability = (shown["forget_loss"], shown["forget_prob"]) if items[0].split == "forget" else (0.0, 0.5)
        return self.retain[i], loss, probability

    def __call__(self, watch, start=0):
        for step in range(start, self.run.max_steps + 1):
            self.run.step = step
            torch.nn.init.constant_(self.weight.weight, float(step))
            watch(self.run)
            if self.run.stop_reason:
                break
        return self.run


def watch_of(out=None, level=GOLD, **stop):
    splits: dict[str, Any] = {name: [SimpleNamespace(n_inputs=2, split=name)] for name in ("forget", "retain")}
    config = {"every": 1, "until": "max_steps", "floor": None, "collapse": None, **stop}
    return UnlearnWatch(StopConfig(**config), splits, level, out)


def test_the_best_step_is_kept_and_its_weights_put_back(monkeypatch):
    play = Play(monkeypatch, [0.9, 0.5, 0.1, 0.05, 0.0], [1.0, 1.0, 0.95, 0.9, 0.2])
    watch = watch_of()
    run = play(watch)
    assert watch.keep_best(run) == 2
    assert play.weight.weight.item() == 2.0


def test_of_equally_good_steps_the_first_is_kept(monkeypatch):
    watch = watch_of()
    run = Play(monkeypatch, [0.9, 0.1, 0.05], [1.0, 0.9, 0.9])(watch)
    assert watch.keep_best(run) == 1


def test_the_start_is_never_kept_and_the_best_after_it_is(monkeypatch):
    """Keeping the start would call doing nothing unlearning, even where every step is worse."""
    play = Play(monkeypatch, [0.2, 0.15, 0.1, 0.1], [1.0, 0.3, 0.4, 0.1])
    watch = watch_of(floor=0.7)
    run = play(watch)
    assert (run.step, run.stop_reason) == (1, "floor")
    assert watch.keep_best(run) == 1
    assert watch.faults(1) == ["below_floor"]
    assert play.weight.weight.item() == 1.0


def test_the_last_step_is_kept_when_asked_for(monkeypatch):
    play = Play(monkeypatch, [0.9, 0.1, 0.0], [1.0, 1.0, 0.0])
    watch = watch_of(keep="last")
    assert watch.keep_best(play(watch)) == 2
    assert play.weight.weight.item() == 2.0
    assert watch.best is None


def test_stops_at_the_target(monkeypatch):
    run = Play(monkeypatch, [0.9, 0.3, 0.1, 0.0], [1.0] * 4)(watch_of(until="target"))
    assert (run.step, run.stop_reason) == (2, "target")


def test_goes_on_past_the_target_when_told_to(monkeypatch):
    run = Play(monkeypatch, [0.9, 0.05, 0.0], [1.0] * 3)(watch_of())
    assert (run.step, run.stop_reason) == (2, None)


def test_a_start_that_is_there_already_makes_one_evaluation_of_updates(monkeypatch):
    run = Play(monkeypatch, [0.05, 0.05, 0.05], [1.0] * 3)(watch_of(until="target"))
    assert (run.step, run.stop_reason) == (1, "target")


def test_below_the_floor_the_run_ends_and_the_best_before_is_kept(monkeypatch):
    play = Play(monkeypatch, [0.9, 0.6, 0.3, 0.01, 0.0], [0.9, 0.9, 0.7, 0.5, 0.1])
    watch = watch_of(floor=0.7)
    run = play(watch)
    assert (run.step, run.stop_reason) == (3, "floor")
    assert watch.keep_best(run) == 2
    assert watch.faults(2) == []
    assert watch.alarms == {"below_floor": 3}


def test_over_forgetting_raises_an_alarm_once_and_is_not_kept(monkeypatch, caplog):
    play = Play(monkeypatch, [0.9, 0.04, 1e-4, 1e-5], [1.0, 0.9, 1.0, 1.0])
    watch = watch_of()
    with caplog.at_level("WARNING", logger="llm_unlearn"):
        run = play(watch)
    assert watch.alarms == {"over_forgotten": 2}
    assert run.stop_reason is None
    assert watch.keep_best(run) == 1
    assert sum("step 2" in record.getMessage() for record in caplog.records) == len(caplog.records) == 1


def test_scores_that_are_not_finite_end_a_run_that_has_a_step_to_keep(monkeypatch):
    play = Play(monkeypatch, [0.9, 0.5, math.nan], [1.0, 0.9, 0.9])
    watch = watch_of()
    run = play(watch)
    assert (run.step, run.stop_reason) == (2, "diverged")
    assert watch.keep_best(run) == 1
    assert [at["step"] for at in watch.lines] == [0, 1]


@pytest.mark.parametrize(("forget", "keep"), [([0.9, math.nan], "best"), ([0.9, 0.5, math.nan], "last")])
def test_without_a_step_to_keep_they_are_an_error(monkeypatch, forget, keep):
    with pytest.raises(Diverged, match="NaN"):
        Play(monkeypatch, forget, [1.0] * 3)(watch_of(keep=keep))


def test_evaluates_every_so_often_and_at_the_end(monkeypatch, tmp_path):
    play = Play(monkeypatch, [0.9, 0.5, 0.1], [1.0] * 3, every=3)
    play.run.max_steps = 8
    watch = watch_of(tmp_path, every=3)
    play(watch)
    lines = [json.loads(text) for text in (tmp_path / "trajectory.jsonl").read_text().splitlines()]
    assert [at["step"] for at in lines] == [0, 3, 6, 8] == [at["step"] for at in watch.lines]
    assert lines[1] == {
        "step": 3, "forget_acc": 1.0, "forget_loss": -math.log(0.5), "forget_prob": 0.5, "retain_acc": 1.0,
        "retain_loss": 0.0, "retain_prob": 0.5,
    }  # fmt: skip
    assert watch.tokens == 4 * 2 * 2, "four evaluations of two splits, each of one item that feeds two tokens"
    assert watch.seconds > 0


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_resumed_watch_keeps_the_same(monkeypatch, tmp_path, cut):
    curve = [0.9, 0.5, 0.1, 1e-4, 0.0], [1.0, 1.0, 0.95, 0.9, 0.2]
    whole = watch_of(tmp_path / "a")
    step_kept = whole.keep_best(Play(monkeypatch, *curve)(whole))
    first = watch_of(tmp_path / "b")
    play = Play(monkeypatch, *curve)
    for step in range(cut + 2):  # killed one step after the state was saved
        play.run.step = step
        torch.nn.init.constant_(play.weight.weight, float(step))
        first(play.run)
        if step == cut:
            state = first.state_dict()
            state = {**state, "lines": list(state["lines"]), "alarms": dict(state["alarms"])}
    second = watch_of(tmp_path / "b")
    second.load_state_dict(state)
    again = Play(monkeypatch, *curve)
    assert second.keep_best(again(second, start=cut + 1)) == step_kept
    assert again.weight.weight.item() == step_kept
    assert (second.alarms, second.tokens) == (whole.alarms, whole.tokens)
    assert (tmp_path / "b" / "trajectory.jsonl").read_text() == (tmp_path / "a" / "trajectory.jsonl").read_text()


def test_a_collapsed_step_is_called_so_and_what_became_of_the_rest_is_told(monkeypatch):
    play = Play(monkeypatch, [0.9, 0.05], [1.0, 0.02])
    watch = watch_of(collapse=0.1, floor=0.7)
    run = play(watch)
    assert run.stop_reason == "collapse"
    assert watch.faults(1) == ["collapsed", "below_floor"]
    assert watch.told(1) == "forget probability 0.90 -> 0.05 (target 0.10), retain accuracy 1.00 -> 0.02"
    assert watch.told(7) == "not evaluated"
