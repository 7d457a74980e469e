"""What tuning tries: the same number of settings for every method, so that none wins by having been tuned harder. An
edit in one go takes no updates, so its whole grid is tried: that costs nothing the budget counts.

A plain grid and a seeded random subset of it, no adaptive search: the budget is then equal by construction, a trial is
reproducible on its own, and the grids are far too small for a model of the objective to pay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.needs import knobs, needs
from llm_unlearn.methods.spec import Knob, Method
from llm_unlearn.methods.terms import MASKS
from llm_unlearn.unlearn.config import MethodConfig

LR = "optim.lr"
ALPHA = "method.alpha"
PARAMS, GRADIENT_PARAMS, MASK_PARAMS = "method.params.", "method.gradient_params.", "method.mask_params."
Setting = dict[str, float]
"""Dotted key of an unlearning config -> value."""


@dataclass(frozen=True)
class Axis:
    """One searched knob: its dotted key, the values worth trying (ascending) and the one used when it is not tuned."""

    key: str
    values: tuple[float, ...]
    default: float


def axes(method: Method, given: MethodConfig) -> tuple[Axis, ...]:
    """Return the knobs of a method that are searched besides the learning rate: every hyper-parameter that has several
    values to search, of its terms, its steps, and the gradient wrapper and mask in force, and the weight of the retain
    term where there is one. What the study sets is not searched.

    Args:
        method: an entry of METHODS.
        given: the study's `method` section for it.
    """
    retain = method.retain if given.retain is None else given.retain
    out = _section(PARAMS, knobs(method, retain), given.params)
    if method.alpha_search and retain != "none" and given.alpha is None:
        out.append(_axis(ALPHA, method.alpha_search, method.alpha))
    wrapper = GRADIENTS.get((method.gradient if given.gradient is None else given.gradient) or "none")
    mask = MASKS[method.mask if given.mask is None else given.mask]
    if wrapper is not None:  # an unknown name is refused where the trial's config is checked
        out += _section(GRADIENT_PARAMS, wrapper.params, given.gradient_params)
    return (*out, *_section(MASK_PARAMS, mask.params, given.mask_params))


def has_learning_rate(method: Method, given: MethodConfig) -> bool:
    """Whether the run takes optimizer steps: a loss does, and an edit by a reinforced model that it trains itself;
    another edit changes the weights in one go.
    """
    return str(method.kind) == "loss" or ("reinforced" in needs(method) and given.reinforced is None)


def settings(
    searched: Sequence[Axis], lrs: Sequence[float], trials: int | None, draw: np.random.Generator
) -> list[Setting]:
    """Return exactly `trials` different settings, the knobs' defaults at the learning rates given first.

    The default knobs are tried at each of `lrs`. What trials are left go round the learning rates in a random order,
    each time to the next of that rate's other knob values in a random order. A grid smaller than the trials gets more
    learning rates, one at a time in the middle (in log) of the widest gap. Without learning rates (`lrs` empty) the
    default comes first, then a random subset; such a grid may be exhausted by fewer settings than trials, all of them
    then.

    Args:
        searched: what `axes` returns.
        lrs: learning rates, none or at least 2 different ones.
        trials: number of settings wanted; None, without learning rates alone: all there are.
        draw: decides the subset.

    Raises:
        UserError: fewer trials than learning rates.
    """
    default = {axis.key: axis.default for axis in searched}
    others = [
        combo
        for values in itertools.product(*(axis.values for axis in searched))
        if (combo := {axis.key: value for axis, value in zip(searched, values, strict=True)}) != default
    ]
    if not lrs:
        return [default, *(others[i] for i in draw.permutation(len(others)))][:trials]
    if trials is None or trials < len(lrs):
        raise UserError(
            f"tune.trials={trials} is less than the {len(lrs)} learning rates of tune.lrs, and every method is "
            "tried at each; raise tune.trials or list fewer"
        )
    rates = _more(lrs, math.ceil(trials / (1 + len(others))))
    queues = {lr: [{LR: lr, **others[i]} for i in draw.permutation(len(others))] for lr in rates}
    out = [{LR: lr, **default} for lr in rates]
    for turn in range(len(others)):
        out += [queues[rates[i]][turn] for i in draw.permutation(len(rates))]
    return out[:trials]


def nested(setting: Mapping[str, float]) -> dict[str, Any]:
    """Return a setting as sections of an unlearning config: {"optim.lr": 1} gives {"optim": {"lr": 1}}."""
    out: dict[str, Any] = {}
    for key, value in setting.items():
        *sections, last = key.split(".")
        place = out
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return out


def _section(prefix: str, table: Mapping[str, Knob], given: Mapping[str, float]) -> list[Axis]:
    return [
        _axis(prefix + name, knob.search, knob.default)
        for name, knob in table.items()
        if name not in given and len(set(knob.search)) > 1
    ]


def _axis(key: str, search: Sequence[float], default: float) -> Axis:
    return Axis(key, tuple(sorted({*map(float, search), float(default)})), float(default))


def _more(lrs: Sequence[float], wanted: int) -> list[float]:
    """Return at least `wanted` learning rates: those given, then the middles of the widest gaps."""
    out = list(dict.fromkeys(lrs))
    while len(out) < wanted:
        known = sorted(out)
        low, high = max(itertools.pairwise(known), key=lambda pair: round(math.log(pair[1] / pair[0]), 6))
        out.append(float(f"{math.sqrt(low * high):.3g}"))
    return out
