"""What tuning tries: equally many settings for every method, the defaults among them, the same ones every time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.needs import knobs
from llm_unlearn.methods.spec import Knob
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import MASKS
from llm_unlearn.study.search import ALPHA, LR, PARAMS, Axis, axes, has_learning_rate, nested, settings
from llm_unlearn.unlearn.config import MethodConfig

LRS = (1e-4, 3e-4, 1e-3)


GRADIENT, MASK = "method.gradient_params.", "method.mask_params."


def searched(name: str, **given) -> tuple[Axis, ...]:
    return axes(METHODS[name], MethodConfig(name=name, **given))


def steps(name: str, **given) -> bool:
    return has_learning_rate(METHODS[name], MethodConfig(name=name, **given))


def tried(name: str, trials: int = 6, seed: int = 0, lrs=LRS, **given):
    return settings(searched(name, **given), lrs, trials, np.random.default_rng(seed))


def unique(grid) -> set:
    return {tuple(sorted(setting.items())) for setting in grid}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("trials", [3, 6, 7, 40])
def test_every_method_gets_as_many_different_settings_with_its_defaults_at_every_rate_first(name, trials):
    method = METHODS[name]
    if not steps(name):
        pytest.skip("takes no steps: has no learning rate")
    grid = tried(name, trials)
    assert len(unique(grid)) == len(grid) == trials
    assert {setting[LR] for setting in grid[:3]} == set(LRS)
    for setting in grid[:3]:
        for key, value in setting.items():
            section, _, knob = key.rpartition(".")
            wrapped = GRADIENTS[method.gradient].params if method.gradient else {}
            tables = {"method.params": knobs(method), "method.gradient_params": wrapped}
            tables["method.mask_params"] = MASKS[method.mask].params
            default = {LR: setting[LR], ALPHA: method.alpha}.get(key)
            assert value == (tables[section][knob].default if default is None else default)


def test_a_subset_is_drawn_and_the_draw_decides_it():
    assert tried("npo") == tried("npo")
    assert tried("npo")[:3] == tried("npo", seed=1)[:3]
    assert unique(tried("npo")) != unique(tried("npo", seed=1))
    assert tried("npo", 9)[:6] == tried("npo", 6), "more trials keep those that are done"


def test_what_trials_are_left_go_round_the_rates():
    rates = [setting[LR] for setting in tried("npo", 9)]
    assert {lr: rates.count(lr) for lr in LRS} == dict.fromkeys(LRS, 3)


def test_a_grid_that_is_too_small_gets_rates_in_the_middle_of_the_widest_gap():
    assert tried("ga", 5) == [{LR: lr} for lr in (*LRS, 5.48e-4, 1.73e-4)]
    # one other value of one knob: 2 settings per rate, so 4 rates for 7 trials
    knob = Axis(PARAMS + "k", (1.0, 2.0), 1.0)
    grid = settings([knob], LRS, 7, np.random.default_rng(0))
    assert {setting[LR] for setting in grid} == {*LRS, 5.48e-4}


def test_without_a_rate_the_knobs_alone_are_searched_until_they_are_exhausted():
    knob = Axis(PARAMS + "k", (1.0, 2.0, 4.0), 2.0)
    assert settings([knob], (), 9, np.random.default_rng(0))[0] == {PARAMS + "k": 2.0}
    assert len(settings([knob], (), 9, np.random.default_rng(0))) == 3
    assert len(settings([knob], (), 2, np.random.default_rng(0))) == 2, "a loss at a learning rate of its own"
    assert len(settings([knob], (), None, np.random.default_rng(0))) == 3, "what takes no updates: all there is"
    assert settings([], (), 9, np.random.default_rng(0)) == [{}], "nothing to search: one trial"


def test_what_is_trained_has_a_learning_rate():
    assert {name for name in METHODS if not steps(name)} == {"fisher", "ssd"}
    assert steps("task_vector"), "its reinforced model is trained by the run"
    assert not steps("task_vector", reinforced="runs/reinforced"), "unless it is given"


def test_axes_are_the_knobs_worth_searching():
    assert searched("ga") == ()
    assert searched("simnpo") == (
        Axis(PARAMS + "beta", (2.5, 4.5, 5.5), 4.5),  # delta has one value
        Axis(ALPHA, (1.0, 2.0, 5.0), 1.0),
    )
    assert [axis.key for axis in searched("npo", retain="none")] == [PARAMS + "beta"]
    more = dataclasses.replace(METHODS["ga"], params={"k": Knob(default=1.0, search=(1.0, 3.0), help="of a test")})
    assert axes(more, MethodConfig(name="ga")) == (Axis(PARAMS + "k", (1.0, 3.0), 1.0),)


def test_knobs_are_those_of_the_retain_term_wrapper_and_mask_in_force():
    def keys(name, **given):
        return [axis.key for axis in searched(name, **given)]

    assert keys("scrub") == [PARAMS + "kl_weight", PARAMS + "msteps"]
    assert keys("scrub", retain="nll") == [PARAMS + "msteps"]
    assert keys("npo", retain="distil") == [PARAMS + "beta", PARAMS + "kl_weight", ALPHA]
    assert keys("npo_sam") == [PARAMS + "beta", ALPHA, GRADIENT + "rho"]
    assert keys("npo_sam", gradient="none") == [PARAMS + "beta", ALPHA]
    assert keys("npo_sam", gradient="gru") == [PARAMS + "beta", ALPHA, GRADIENT + "ema"]
    assert keys("graddiff", gradient="orthopenalty") == [ALPHA, GRADIENT + "weight"], "radius has one value"
    assert keys("salun") == [ALPHA, MASK + "share"]
    assert keys("salun", mask="none") == [ALPHA]
    assert searched("graddiff", mask="saliency")[1] == Axis(MASK + "share", (0.1, 0.3, 0.5), 0.5)


def test_what_the_study_sets_is_not_searched():
    assert searched("ceu") == (Axis(PARAMS + "skip", (0.0, 1.0), 1.0),)
    assert searched("ceu", params={"skip": 0}) == ()
    assert [axis.key for axis in searched("rmu", alpha=50.0)] == [PARAMS + "coeff"]
    assert [axis.key for axis in searched("npo_sam", gradient_params={"rho": 0.1})] == [PARAMS + "beta", ALPHA]
    assert [axis.key for axis in searched("salun", mask_params={"share": 0.3})] == [ALPHA]


def test_fewer_trials_than_rates_are_refused():
    with pytest.raises(UserError, match="tune.trials=2 is less than the 3 learning rates"):
        tried("npo", 2)


def test_a_setting_is_sections_of_a_config():
    assert nested({LR: 1e-3, ALPHA: 2.0, PARAMS + "beta": 0.1, MASK + "share": 0.3}) == {
        "optim": {"lr": 1e-3},
        "method": {"alpha": 2.0, "params": {"beta": 0.1}, "mask_params": {"share": 0.3}},
    }
    assert nested({}) == {}
