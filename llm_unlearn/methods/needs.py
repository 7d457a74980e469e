"""What a method needs and costs, and whether hyper-parameters fit it: read off the signatures of its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.spec import EDIT_VOCABULARY, VOCABULARY, Knob, Mask, Method, check_knobs, hint, input_names
from llm_unlearn.methods.terms import RETAIN_TERMS

__all__ = [
    "FROZEN",
    "check_mask_params",
    "check_params",
    "knobs",
    "lacks_in_images",
    "needs",
    "needs_text",
    "passes",
    "weights_at",
]

BATCHES = frozenset({"forget", "retain", "idk", "alt", "rl"})
FROZEN = frozenset({"ref_logits", "ref_hidden", "bad_logits"})  # read from a frozen model at every update
TEXT: Mapping[str, str] = {"idk": "refusals", "alt": "alternate answers"}  # answers that only texts have


def needs(method: Method, retain_name: str | None = None) -> frozenset[str]:
    """What the objective has to provide, derived from the signatures of the forget and the retain term.

    Args:
        method: an entry of METHODS.
        retain_name: a key of RETAIN_TERMS; None means the method's default.

    Returns:
        Subset of {forget, retain, idk, alt, rl, generic, hidden, ref_logp, ref_logits, ref_hidden, bad_logits,
        weights}: batches to draw, whether generic targets, hidden states or the weights are read, and what to compute
        under the frozen start model and under one never trained. The former is not needed if nothing begins with ref_.
        For an edit a subset of {forget, retain, importance, reinforced}: items to read, and what is computed of them.

    Raises:
        ValueError: unknown retain term, or neither a forget nor a retain term.
    """
    if method.edit is not None:
        return frozenset().union(*(EDIT_VOCABULARY[name] for name in input_names(method.edit)))
    retain_name = method.retain if retain_name is None else retain_name
    if retain_name not in RETAIN_TERMS:
        raise ValueError(f"method {method.name}: unknown retain term '{retain_name}'{hint(retain_name, RETAIN_TERMS)}")
    retain_fn = RETAIN_TERMS[retain_name].fn
    if method.forget is None and retain_fn is None:
        raise ValueError(f"method {method.name}: nothing to train on with retain=none; use retain={method.retain}")
    return _needs_of(method.forget, "forget") | _needs_of(retain_fn, "retain")


def passes(method: Method, retain_name: str | None = None) -> tuple[int, int]:
    """Return (batches that go forward and backward, batches that frozen models run) in one update; errors as `needs`.

    What needs only the start model's log-probabilities runs it once, before the first update.
    """
    needs(method, retain_name)
    if method.edit is not None:  # one batch or one item at a time
        return 1, 0
    retain = RETAIN_TERMS[method.retain if retain_name is None else retain_name].fn
    terms = [_needs_of(method.forget, "forget"), _needs_of(retain, "retain")]
    times = GRADIENTS[method.gradient].passes if method.gradient else (1, 1)
    trained = [len(need & BATCHES) * n for need, n in zip(terms, times, strict=True)]
    reference = [len(need & FROZEN) * n for need, n in zip(terms, times, strict=True)]
    together = max if method.rule == "turns" else sum
    return together(trained), together(reference)


def knobs(method: Method, retain_name: str | None = None) -> dict[str, Knob]:
    """Return every hyper-parameter of a method: of its forget term, its retain term, its steps and their weights."""
    retain_name = method.retain if retain_name is None else retain_name
    weights = {} if method.weights is None else method.weights.params
    return {**method.params, **RETAIN_TERMS[retain_name].params, **method.step_params, **weights}


def weights_at(method: Method, done: float, params: Mapping[str, float]) -> tuple[float, float]:
    """Return a method's own (gamma, alpha) when a share `done` of the updates, in [0, 1), is done.

    `params` are checked hyper-parameters, see `check_params`; what is not among them has its default.
    """
    if method.weights is None:
        return method.gamma, method.alpha
    rule = method.weights
    return rule.fn(done, **{name: params.get(name, knob.default) for name, knob in rule.params.items()})


def needs_text(method: Method) -> bool:
    """Whether a method trains on answers that only texts have, so that it means nothing for images."""
    return bool(lacks_in_images(method))


def lacks_in_images(method: Method) -> list[str]:
    """Return, in words, the answers a method needs that images have none of."""
    return [words for need, words in TEXT.items() if need in needs(method)]


def check_params(method: Method, params: Mapping[str, Any], retain_name: str | None = None) -> dict[str, float]:
    """Check hyper-parameters against the method with a (known) retain term and complete them with the defaults.

    Raises ValueError; see `spec.check_knobs`.
    """
    return check_knobs(f"method {method.name}", knobs(method, retain_name), params)


def check_mask_params(mask: Mask, params: Mapping[str, Any]) -> dict[str, float]:
    """The same for a mask. Raises ValueError; see `spec.check_knobs`."""
    return check_knobs(f"mask {mask.name}", mask.params, params)


def _needs_of(fn: Callable[..., Any] | None, batch: str) -> frozenset[str]:
    if fn is None:
        return frozenset()
    wanted = frozenset().union(*(VOCABULARY[name] for name in input_names(fn)))
    return frozenset(batch if need == "batch" else need for need in wanted)
