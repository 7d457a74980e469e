"""What a method is: its terms, knobs, sources, and what it needs. The entries are in `table`.

A method of kind "loss" trains on  gamma * forget(...) + alpha * retain(...).  Terms are functions of `losses`,
`tokenwise`, `distill` and `hidden`; their parameter names are the contract with the objective, which makes the forward
passes that `needs` lists and no others. A method of kind "edit" is a function of `edits` that changes the weights once;
its parameter names say what has to be computed for it. A mask says which weights a loss trains.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "EDIT_VOCABULARY",
    "VOCABULARY",
    "Knob",
    "Mask",
    "Method",
    "RetainTerm",
    "Weights",
    "check_knobs",
    "hint",
    "input_names",
    "knob_defaults",
]

MeanOver = Literal["token", "sequence"]

# What a term may ask for -> what the objective has to run for it. "batch" stands for the batch that the term reads:
# forget for forget terms, retain for retain terms. "idk" and "alt" are refusals and alternate answers to the forget
# batch's questions; "generic" are target tokens made once, before the first step. "ref_*" means a pass of the frozen
# start model over the same batch, "bad_*" one of a model that was never trained. "weights" are the trained ones.
# `step_logp` is () the mean log-probability of all answer tokens of the step's batch, over all its micro-batches and
# processes, without gradient.
VOCABULARY: Mapping[str, frozenset[str]] = {
    "logp_N": frozenset({"batch"}),
    "logp_B": frozenset({"batch"}),
    "step_logp": frozenset({"batch"}),
    "len_B": frozenset({"batch"}),
    "logits_NV": frozenset({"batch"}),
    "labels_N": frozenset({"batch"}),
    "row_N": frozenset({"batch"}),
    "n_rows": frozenset({"batch"}),
    "hidden_NH": frozenset({"batch", "hidden"}),
    "control_H": frozenset({"batch", "hidden"}),
    "ref_logp_B": frozenset({"batch", "ref_logp"}),
    "ref_logits_NV": frozenset({"batch", "ref_logits"}),
    "ref_hidden_NH": frozenset({"batch", "hidden", "ref_hidden"}),
    "bad_logits_NV": frozenset({"batch", "bad_logits"}),
    "generic_logp_N": frozenset({"batch", "generic"}),
    "idk_logp_N": frozenset({"idk"}),
    "idk_logp_B": frozenset({"idk"}),
    "idk_row_N": frozenset({"idk"}),
    "ref_idk_logp_B": frozenset({"idk", "ref_logp"}),
    "alt_logp_B": frozenset({"alt"}),
    "ref_alt_logp_B": frozenset({"alt", "ref_logp"}),
    "rl_logp_N": frozenset({"rl"}),
    "weights": frozenset({"weights"}),
}

# What an edit may ask for -> the items that are read for it, and what is computed.
EDIT_VOCABULARY: Mapping[str, frozenset[str]] = {
    "weights": frozenset(),
    "seed": frozenset(),
    "reinforced": frozenset({"forget", "reinforced"}),
    "forget_importance": frozenset({"forget", "importance"}),
    "retain_importance": frozenset({"retain", "importance"}),
    "all_importance": frozenset({"forget", "retain", "importance"}),
}


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A hyper-parameter: its default, the values that make sense at all, and those worth trying."""

    default: float
    search: tuple[float, ...]
    """Values `llm-unlearn tune` tries: the range that sources use, the default among them."""
    low: float = 0.0
    high: float = math.inf
    closed: bool = False
    """Whether the bounds themselves are allowed."""
    whole: bool = False
    """Whether only whole numbers make sense."""
    help: str

    @property
    def domain(self) -> str:
        """The values allowed, as an interval in mathematical notation."""
        left, right = "[]" if self.closed else "()"
        return f"{left}{self.low:g}, {self.high:g}{right if math.isfinite(self.high) else ')'}"

    def allows(self, value: float) -> bool:
        """Whether a value lies in the domain."""
        if self.whole and value != int(value):
            return False
        return self.low <= value <= self.high if self.closed else self.low < value < self.high


@dataclass(frozen=True, kw_only=True)
class RetainTerm:
    """A term that protects what has to stay. `fn` reads the retain batch; None means no retain term."""

    fn: Callable[..., Any] | None
    params: Mapping[str, Knob] = field(default_factory=dict)
    """Its hyper-parameters, given among those of the method."""
    mean_over: MeanOver
    formula: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A rule that gives the weights of both terms, in the place of gamma and alpha."""

    fn: Callable[..., tuple[float, float]]
    """From the share of the run's updates that are done, in [0, 1), to (gamma, alpha)."""
    params: Mapping[str, Knob]
    """Its hyper-parameters, given among those of the method."""
    formula: str


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A choice of the weights that are trained; the others stay bit for bit what they were."""

    name: str
    fn: Callable[..., Any] | None
    """From gradients of the forget loss at the start to what is trained; None trains every weight."""
    params: Mapping[str, Knob] = field(default_factory=dict)
    formula: str
    source: str = ""
    note: str = ""
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to unlearn: minimising gamma * forget + alpha * retain, or one edit of the weights."""

    name: str
    kind: Literal["loss", "edit"] = "loss"
    forget: Callable[..., Any] | None = None
    """Forget term; None for a method that only trains on the retain set, and for an edit."""
    edit: Callable[..., Any] | None = None
    """What an edit does to the weights; None for a loss."""
    retain: str
    """Default retain term, a key of RETAIN_TERMS; none for an edit."""
    mask: str = "none"
    """Default mask, a key of MASKS."""
    params: Mapping[str, Knob] = field(default_factory=dict)
    """Hyper-parameters of the forget term or the edit."""
    step_params: Mapping[str, Knob] = field(default_factory=dict)
    """Hyper-parameters of how its steps or its targets are made."""
    rule: Literal["joint", "turns", "dual"] = "joint"
    """How the terms share the updates: both in each; one at a time (unlearn.turns); or the weight of the retain term
    follows a limit on it by dual ascent (unlearn.dual)."""
    gradient: str | None = None
    """Default wrapper of its gradients, a key of gradients.GRADIENTS."""
    alpha: float = 1.0
    """Weight of the retain term; without effect where the retain term is none."""
    alpha_search: tuple[float, ...] = ()
    """Weights of the retain term worth trying, the default among them; empty where the default is not worth tuning."""
    gamma: float = 1.0
    """Weight of the forget term; without effect where there is none."""
    weights: Weights | None = None
    """What gives both weights instead; gamma and alpha are then without effect."""
    mean_over: MeanOver = "token"
    """What the forget term averages over; its value times that count adds up exactly over micro-batches."""
    formula: str
    source: str
    """Papers, with the equation where it is numbered."""
    note: str = ""
    """Where papers and code differ, and what is followed."""
    failure: str
    """How it is known to go wrong."""

    @property
    def needs_retain(self) -> bool:
        """Whether its rule means nothing without a retain term."""
        return self.rule != "joint" or self.weights is not None


def input_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the tensors (and n_rows) that a term takes, in order: what the objective binds by name."""
    return tuple(n for n, p in inspect.signature(fn).parameters.items() if p.kind is not p.KEYWORD_ONLY)


def knob_defaults(fn: Callable[..., Any]) -> dict[str, float]:
    """Hyper-parameters of a term (its keyword-only parameters) and the defaults in its signature."""
    return {n: p.default for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_knobs(owner: str, knobs: Mapping[str, Knob], given: Mapping[str, Any]) -> dict[str, float]:
    """Check hyper-parameters against what `owner` ("method npo") takes and complete them with the defaults.

    Raises:
        ValueError: a name that is not taken, a value that is not a finite number, or one outside its domain.
    """
    for name, value in given.items():
        if name not in knobs:
            raise ValueError(f"{owner}: unknown parameter '{name}'{hint(name, knobs)}")
        knob = knobs[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}; default {knob.default:g}")
        if not knob.allows(value):
            kind = "a whole number in" if knob.whole else "in"
            raise ValueError(f"{owner}: {name} must be {kind} {knob.domain}, got {value:g}; default {knob.default:g}")
    return {**{name: knob.default for name, knob in knobs.items()}, **{n: float(v) for n, v in given.items()}}


def hint(name: str, known: Iterable[str]) -> str:
    """Return the tail of an "unknown ..." message: the nearest known name, or all of them."""
    names = sorted(known)
    if not names:
        return "; it takes none"
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"
