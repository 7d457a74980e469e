"""Method cards: everything the table knows of a method, for people. `docs/methods.md` is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_unlearn.methods.gradients import GRADIENTS, Gradient
from llm_unlearn.methods.needs import FROZEN, knobs, lacks_in_images, needs, needs_text, passes, weights_at
from llm_unlearn.methods.spec import Knob, Mask, Method, input_names
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import MASKS, RETAIN_TERMS

# One batch forward and backward costs 3 forward passes; weights, their gradients and AdamW's two moments are 4 copies.
FORWARD, BACKWARD, COPIES = 1, 2, 4
NEEDS: Mapping[str, str] = {
    "forget": "forget set",
    "retain": "retain set",
    "idk": "refusals to the forget questions",
    "alt": "alternate answers to the forget questions",
    "rl": "random answers to the forget questions",
    "generic": "generic answers to the forget questions, made once by a reinforced copy",
    "hidden": "hidden states of one layer",
    "ref_logp": "start model's log-probabilities, computed once",
    "ref_logits": "start model's logits, at every update",
    "ref_hidden": "start model's hidden states, at every update",
    "bad_logits": "logits of an untrained model, at every update",
    "weights": "the trained weights themselves",
    "importance": "squared gradients of every item, computed once",
    "reinforced": "the start model trained further on the forget set",
}


def card(method: Method) -> dict[str, Any]:
    """Return a method's card.

    `cost` and `memory` are multiples of plain fine-tuning at the same batch size: time of an update in forward passes
    (a backward pass counting as two), and copies of the weights (the weights, their gradients and two moments of AdamW,
    against those and a frozen start model where one is run, which under LoRA is the model itself, and an untrained one
    where one is run).
    """
    trained, reference = passes(method)
    wanted = needs(method)
    # an edit of a reinforced model keeps the start model; importances are sums beside weights and gradients
    sums = len([name for name in input_names(method.edit) if name.endswith("_importance")]) if method.edit else 0
    frozen = len({need.partition("_")[0] for need in wanted & FROZEN})
    copies = 2 + sums if sums else COPIES + (1 if method.edit else frozen)
    if method.gradient is not None:
        copies += GRADIENTS[method.gradient].copies or 0
    if "generic" in wanted:  # before the first update: the model, and a whole training of its copy
        copies = max(copies, 1 + COPIES)
    if method.mask != "none":  # a byte for each weight, and the values of the frozen half
        copies += 0.25 + 0.5
    gamma, alpha = weights_at(method, 0.0, {})
    return {
        "name": method.name,
        "kind": method.kind,
        "formula": method.formula,
        "retain": method.retain,
        "retain_formula": RETAIN_TERMS[method.retain].formula,
        "gradient": method.gradient or "none",
        "mask": method.mask,
        "source": method.source,
        "gamma": gamma,
        "alpha": alpha,
        "weights": None if method.weights is None else method.weights.formula,
        "alpha_search": list(method.alpha_search),
        "knobs": _knobs(knobs(method)),
        "lacks_in_images": lacks_in_images(method),
        "needs": [text for need, text in NEEDS.items() if need in wanted],
        "cost": round((trained * (FORWARD + BACKWARD) + reference * FORWARD) / (FORWARD + BACKWARD), 2),
        "memory": round(copies / COPIES, 2),
        "note": method.note,
        "failure": method.failure,
    }


def card_text(method: Method) -> str:
    """Return a method's card as Markdown."""
    told = card(method)
    edit = method.kind == "edit"
    rule = [
        "- loss: `gamma * forget + alpha * retain`, "
        + (told["weights"] or f"gamma = {told['gamma']:g}, alpha = {told['alpha']:g}"),
        f"- forget: `{told['formula']}`",
        f"- retain (`{told['retain']}`): `{told['retain_formula']}`",
    ]
    if method.mask != "none":
        mask = MASKS[method.mask]
        rule.append(f"- mask: `{method.mask}` (`{mask.formula}`)")
    if method.gradient is not None:
        rule.append(f"- gradients rewritten: `{method.gradient}` (`{GRADIENTS[method.gradient].formula}`)")
    rule = [f"- one edit of the weights: `{told['formula']}`"] if edit else rule
    lines = [f"### `{told['name']}`", "", *rule, f"- source: {told['source']}"]
    lines += [f"- `{name}` = {_knob(knob)}" for name, knob in told["knobs"].items()]
    if told["alpha_search"]:
        given = " where a retain term is given" if method.retain == "none" else ""
        lines.append(f"- `alpha` is tuned over {_values(told['alpha_search'])}{given}")
    lines += [
        f"- needs: {'; '.join(told['needs'])}",
        *([f"- for texts only: images have no {' and '.join(told['lacks_in_images'])}"] if needs_text(method) else []),
        f"- {'a batch' if edit else 'an update'} costs {told['cost']:g} times one of fine-tuning, memory "
        f"{told['memory']:g} times",
        f"- fails: {told['failure']}",
    ]
    if told["note"]:
        lines.append(f"- note: {told['note']}")
    return "\n".join(lines)


def wrapper_card(wrapper: Gradient | Mask) -> dict[str, Any]:
    """Return the card of what changes the steps of any loss method."""
    setting = "gradient" if isinstance(wrapper, Gradient) else "mask"
    names = ("name", "formula", "source", "note", "failure", *(("passes", "memory") if setting == "gradient" else ()))
    return {"kind": setting, **{name: getattr(wrapper, name) for name in names}, "knobs": _knobs(wrapper.params)}


def wrapper_text(wrapper: Gradient | Mask) -> str:
    """Return the card of what changes the steps of any loss method, as Markdown."""
    setting = "gradient" if isinstance(wrapper, Gradient) else "mask"
    lines = [
        f"### `{setting}={wrapper.name}`",
        "",
        f"- `{wrapper.formula}`",
        f"- source: {wrapper.source}",
        *(f"- `{setting}_params.{name}` = {_knob(knob)}" for name, knob in _knobs(wrapper.params).items()),
    ]
    if isinstance(wrapper, Gradient):
        forget, retain = wrapper.passes
        lines.append(f"- passes of an update: {forget} over the forget batch, {retain} over the retain batch")
        lines.append(f"- memory: {wrapper.memory}")
    lines.append(f"- fails: {wrapper.failure}")
    return "\n".join([*lines, f"- note: {wrapper.note}"] if wrapper.note else lines)


def wrappers() -> dict[str, Gradient | Mask]:
    """Return what `method.gradient` and `method.mask` can be set to, by name."""
    return {**GRADIENTS, **{name: mask for name, mask in MASKS.items() if mask.fn is not None}}


def page() -> str:
    """Return the cards of all methods and wrappers; `docs/methods.md` holds them and a test keeps the two equal."""
    of_methods = [card_text(method) for method in METHODS.values()]
    of_wrappers = [wrapper_text(wrapper) for wrapper in wrappers().values()]
    return "\n\n".join([*of_methods, "## Wrappers", *of_wrappers])


def _knobs(params: Mapping[str, Knob]) -> dict[str, dict[str, Any]]:
    return {
        name: {"default": knob.default, "domain": knob.domain, "search": list(knob.search), "help": knob.help}
        for name, knob in params.items()
    }


def _knob(told: Mapping[str, Any]) -> str:
    return f"{told['default']:g} in {told['domain']}, tuned over {_values(told['search'])}: {told['help']}"


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
