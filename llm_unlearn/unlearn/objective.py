"""gamma * forget term + alpha * retain term, with exactly the forward passes their signatures ask for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_unlearn.data.batches import Batch, collate
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.methods.hidden import control_vector
from llm_unlearn.methods.losses import sum_by_row, token_logprobs
from llm_unlearn.methods.needs import check_params, needs
from llm_unlearn.methods.spec import Method, input_names
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import RETAIN_TERMS
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.order import partner_items, rank_slice, step_items
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.alternates import Alternates
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.generic import GenericTargets
from llm_unlearn.unlearn.reference import CachedLogprobs, FrozenModel
from llm_unlearn.unlearn.turns import Alternating, Turn, joint

ANSWERS = ("idk", "alt", "rl")  # batches that answer the forget questions with something else


@dataclass(frozen=True)
class Items:
    """Encoded items an unlearning run draws from: `idk[i]` answers the question of `forget[i]` with a refusal, `alt`
    with other answers of the same kind, `rl` with random ones.
    """

    forget: Sequence[Item]
    retain: Sequence[Item]
    idk: Sequence[Item] = ()
    alt: Alternates | None = None
    rl: Alternates | None = None


@dataclass(frozen=True)
class Part:
    """One batch of a micro-step with its items' numbers, and the tokens and rows of its sort in the whole step."""

    batch: Batch
    numbers: np.ndarray
    step_tokens: int
    step_rows: int

    def share(self, mean_over: str) -> float:
        """Return this micro-batch's share of a mean over the step's tokens or sequences."""
        return self.batch.n_tokens / self.step_tokens if mean_over == "token" else self.batch.n_rows / self.step_rows


@dataclass
class Objective:
    """A method, resolved against a model: weights, knobs, layer, and the reference it needs."""

    method: Method
    retain: str
    params: Mapping[str, float]
    gamma: float
    alpha: float
    layer: int
    reference: FrozenModel | None = None
    cached: dict[str, CachedLogprobs] = field(default_factory=dict)
    control_H: Tensor | None = None
    generic: GenericTargets | None = None
    turn: Callable[[int], Turn] = joint

    @property
    def start_tokens(self) -> Counter[str]:
        """Tokens processed before the first step, by "forward", "backward" and "reference"."""
        spent = Counter(reference=sum(cached.tokens for cached in self.cached.values()))
        return spent + (self.generic.tokens if self.generic else Counter())

    @property
    def needs(self) -> frozenset[str]:
        """What has to be provided: see methods.needs.needs."""
        return needs(self.method, self.retain)


def make_objective(config: MethodConfig, model: Any, items: Items, seed: int, batch_size: int = 32) -> Objective:
    """Resolve a method's config against the start model. Raises UserError for an unknown method or knob, or an unmet
    need. `batch_size` is that of the run.
    """
    objective = resolve_objective(config, model.lm.config, items, batch_size)
    wanted = objective.needs
    if wanted & {"ref_logits", "ref_hidden"}:
        objective.reference = FrozenModel(model)
    if "ref_logp" in wanted:
        objective.cached["forget"] = CachedLogprobs(model, items.forget)
        if "idk" in wanted:
            objective.cached["idk"] = CachedLogprobs(model, items.idk)
        if "alt" in wanted and items.alt is not None:
            objective.cached["alt"] = CachedLogprobs(model, items.alt.items)
    if "hidden" in wanted:
        objective.control_H = control_vector(model.hidden_size(objective.layer), seed)
    if "generic" in wanted:
        objective.generic = GenericTargets(model, items.forget, objective.params, batch_size, seed)
    return objective


def resolve_objective(config: MethodConfig, lm_config: Any, items: Items, batch_size: int) -> Objective:
    """Return the objective without what only the start model can give: reference, cached log-probabilities, targets.
    `lm_config` is the model's transformers config. Raises UserError as `make_objective` does.
    """
    method, retain = resolve_method(config)
    try:
        wanted = needs(method, retain)
        params = check_params(method, config.params, retain)
    except ValueError as error:
        raise UserError(str(error)) from None
    layers = lm_config.num_hidden_layers
    layer = max(layers // 2 - 1, 0) if config.layer is None else config.layer
    if "hidden" in wanted and layers < 2:
        raise UserError(
            f"method '{method.name}' with retain={retain} needs a model of at least two layers, and this one has "
            f"{layers}; choose a method on log-probabilities"
        )
    if "hidden" in wanted and layer > layers - 2:
        raise UserError(
            f"method.layer={layer}: the model has {layers} layers, and the last one's output is not read; choose 0 to "
            f"{layers - 2}"
        )
    if "retain" in wanted and not items.retain:
        raise UserError(
            f"method '{method.name}' with retain={retain} needs a retain set, and it is empty; choose "
            "method.retain=none"
        )
    _check_forget(method, params, wanted, items)
    _refuse_idle(config, method, retain, wanted)
    gamma = method.gamma if config.gamma is None else config.gamma
    alpha = method.alpha if config.alpha is None else config.alpha
    objective = Objective(method, retain, params, gamma, alpha, layer)
    if method.rule == "turns":
        objective.turn = Alternating(math.ceil(params["msteps"] * math.ceil(len(items.forget) / batch_size)))
    return objective


def _check_forget(method: Method, params: Mapping[str, float], wanted: frozenset[str], items: Items) -> None:
    if "alt" in wanted and items.alt is None:
        raise UserError(f"method '{method.name}' needs alternate answers, and there are none; see method.alternates")
    skip = params.get("skip", 0)
    if skip and "forget" in wanted and all(item.n_answer - item.has_eos <= skip for item in items.forget):
        raise UserError(
            f"method.params.skip={skip:g} leaves nothing of any forget answer, which have at most that many tokens "
            "before the end; set method.params.skip=0"
        )


def _refuse_idle(config: MethodConfig, method: Method, retain: str, wanted: frozenset[str]) -> None:
    """Refuse a setting that would stand in the results and have had no effect."""
    idle = {
        "gamma": config.gamma is not None and method.forget is None,
        "alpha": config.alpha is not None and retain == "none",
        "layer": config.layer is not None and "hidden" not in wanted,
        "alternates": config.alternates is not None and "alt" not in wanted,
    }
    for name, useless in idle.items():
        if useless:
            cure = "set method.retain too, or remove it" if name == "alpha" else "remove it"
            raise UserError(f"method.{name} has no effect on '{method.name}' with retain={retain}; {cure}")


def reads_logits(config: MethodConfig) -> bool:
    """Return whether a term of the loss reads logits, as edits always do. If none does, the layers above the one that
    is read get no gradient at all, in a step that the terms share; in turns, every one of them has to. Raises UserError
    for an unknown method.
    """
    method, retain = resolve_method(config)
    if method.kind == "edit":
        return True
    terms = [term for term in (method.forget, RETAIN_TERMS[retain].fn) if term is not None]
    return (all if method.rule == "turns" else any)("hidden_NH" not in input_names(term) for term in terms)


def reads_answers(config: MethodConfig, kind: str) -> bool:
    """Return whether the forget term reads other answers: "alt" or "rl". Raises UserError for an unknown method."""
    method, _ = resolve_method(config)
    return method.forget is not None and any(f"{kind}_" in name for name in input_names(method.forget))


def resolve_method(config: MethodConfig) -> tuple[Method, str]:
    """Return a config's method and the name of its retain term. Raises UserError for an unknown method, and for one
    that cannot do without a retain term.
    """
    if config.name not in METHODS:
        raise UserError(f"unknown method '{config.name}' in method.name{suggest(config.name, METHODS)}")
    method = METHODS[config.name]
    retain = method.retain if config.retain is None else config.retain
    if method.rule != "joint" and RETAIN_TERMS[retain].fn is None:
        raise UserError(f"method '{method.name}' needs a retain term; set method.retain={method.retain}")
    return method, retain


class UnlearnTask:
    """The loop's task: a forget batch and its retain partners per step, both pure functions of (seed, step)."""

    def __init__(
        self, objective: Objective, items: Items, batch_size: int, seed: int, place: Place, pad_id: int = 0
    ) -> None:
        self.objective, self.items, self.batch_size, self.seed, self.place, self.pad_id = (
            objective,
            items,
            batch_size,
            seed,
            place,
            pad_id,
        )
        self.n_micro = place.n_micro
        made = items.alt.tokens if items.alt is not None and "alt" in objective.needs else 0
        self.tokens = objective.start_tokens + Counter(reference=made)

    def micro_batches(self, step: int) -> Iterator[dict[str, Part]]:
        """Yield the batches of this process that the method needs, by name; a term whose turn it is not has none."""
        drawn = self.drawn(step)
        totals = {name: sum(source[i].n_answer for i in numbers) for name, (numbers, source) in drawn.items()}
        for k in range(self.n_micro):
            parts = {}
            for name, (numbers, source) in drawn.items():
                mine = rank_slice(numbers, self.place.rank, self.place.world, k, self.n_micro)
                parts[name] = Part(collate([source[i] for i in mine], self.pad_id), mine, totals[name], len(numbers))
            yield parts

    def drawn(self, step: int) -> dict[str, tuple[np.ndarray, Sequence[Item]]]:
        """Return the items of a step's batches over all processes, by name: (batch,) numbers, and what they number."""
        wanted, turn = self.objective.needs, self.objective.turn(step)
        drawn: dict[str, tuple[np.ndarray, Sequence[Item]]] = {}
        if turn.forget is not None:
            forget = step_items(len(self.items.forget), self.batch_size, turn.forget, self.seed)
            drawn |= {name: (forget, getattr(self.items, name)) for name in ("forget", "idk") if name in wanted}
            for name in ("alt", "rl"):
                others = getattr(self.items, name)
                if name in wanted and others is not None:
                    drawn[name] = (others.numbers(forget, turn.forget * self.batch_size), others.items)
        if turn.retain is not None and "retain" in wanted:
            partners = partner_items(len(self.items.retain), self.batch_size, turn.retain, self.seed)
            drawn["retain"] = (partners, self.items.retain)
        return drawn

    def loss(self, model: nn.Module, micro: dict[str, Part]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's part of gamma * forget + alpha * retain, and the terms that are in it."""
        weights = {"forget": self.objective.gamma, "retain": self.objective.alpha}
        present = ["forget"] * bool(micro.keys() & {"forget", *ANSWERS}) + ["retain"] * ("retain" in micro)
        values = {name: self.term(model, micro, name) for name in present}
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, {f"{name}_loss": value for name, value in values.items()}

    def term(self, model: nn.Module, micro: dict[str, Part], name: str) -> Tensor:
        """Return the micro-batch's part of the `forget` or the `retain` term, without its weight."""
        method, retain = self.objective.method, RETAIN_TERMS[self.objective.retain]
        fn, knobs, over = (
            (method.forget, method.params, method.mean_over)
            if name == "forget"
            else (retain.fn, retain.params, retain.mean_over)
        )
        assert fn is not None  # `needs` draws no batch for a term that is not there
        part = micro[name] if name in micro else next(micro[answers] for answers in ANSWERS if answers in micro)
        value = self._term(model, fn, micro, name, {knob: self.objective.params[knob] for knob in knobs})
        return value * part.share(over)

    def _term(
        self, model: nn.Module, fn: Callable[..., Tensor], micro: dict[str, Part], base: str, knobs: Mapping[str, float]
    ) -> Tensor:
        names = input_names(fn)
        values: dict[str, Any] = {}
        others = {a: [n for n in names if n.startswith((f"{a}_", f"ref_{a}_"))] for a in ANSWERS}
        if sum(map(len, others.values())) < len(names):
            values.update(self._values(model, micro[base], base, names, ""))
        for answers in ANSWERS:
            if others[answers]:
                values.update(self._values(model, micro[answers], answers, names, f"{answers}_"))
        return fn(**{name: values[name] for name in names}, **knobs)

    def _values(self, model: nn.Module, part: Part, source: str, names: Sequence[str], prefix: str) -> dict[str, Any]:
        """Compute the named inputs of a term on one batch; one forward pass each of the model and, if asked for, the
        reference.
        """
        batch = part.batch.to(next(model.parameters()).device)
        where = (batch.inputs, batch.index_N)
        out: dict[str, Any] = {
            f"{prefix}row_N": batch.row_N,
            "n_rows": batch.n_rows,
            f"{prefix}len_B": torch.bincount(batch.row_N, minlength=batch.n_rows),
        }
        if "hidden_NH" in names:
            out["hidden_NH"] = model(*where, self.objective.layer)
            out["control_H"] = (
                None if self.objective.control_H is None else self.objective.control_H.to(batch.row_N.device)
            )
        else:
            logits_NV = model(*where)
            logp_N, _ = token_logprobs(logits_NV, batch.labels_N)
            out.update(
                {
                    f"{prefix}logits_NV": logits_NV,
                    f"{prefix}labels_N": batch.labels_N,
                    f"{prefix}logp_N": logp_N,
                    f"{prefix}logp_B": sum_by_row(logp_N, batch.row_N, batch.n_rows),
                }
            )
            if self.objective.generic is not None and "generic_logp_N" in names:
                generic_N = self.objective.generic(part.numbers).to(batch.row_N.device)
                out["generic_logp_N"] = token_logprobs(logits_NV, generic_N)[0]
        count_pass(self.tokens, batch)
        if f"ref_{prefix}logp_B" in names:
            out[f"ref_{prefix}logp_B"] = self.objective.cached[source](part.numbers).to(batch.row_N.device)
        if self.objective.reference is not None and any(name in ("ref_logits_NV", "ref_hidden_NH") for name in names):
            hidden = "ref_hidden_NH" in names
            out["ref_hidden_NH" if hidden else "ref_logits_NV"] = self.objective.reference(
                *where, self.objective.layer if hidden else None
            )
            self.tokens["reference"] += batch.n_inputs
        return out
