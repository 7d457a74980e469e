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
from llm_unlearn.methods.needs import check_params, lacks_in_images, needs, weights_at
from llm_unlearn.methods.spec import VOCABULARY, Method, input_names
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import RETAIN_TERMS
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.order import partner_items, rank_slice, step_items
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.alternates import Alternates
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.generic import GenericTargets
from llm_unlearn.unlearn.reference import CachedLogprobs, FrozenModel, UntrainedModel
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
    """One batch of a micro-step with its items' numbers, the tokens and rows of its sort in the whole step, and which
    step that is.
    """

    batch: Batch
    numbers: np.ndarray
    step_tokens: int
    step_rows: int
    step: int

    def share(self, mean_over: str) -> float:
        """Return this micro-batch's share of a mean over the step's tokens or sequences."""
        return self.batch.n_tokens / self.step_tokens if mean_over == "token" else self.batch.n_rows / self.step_rows


@dataclass
class Objective:
    """A method, resolved against a model: weights, knobs, layer, and the frozen models it needs. `updates` is how many
    the run has, for weights that follow a schedule.
    """

    method: Method
    retain: str
    params: Mapping[str, float]
    gamma: float
    alpha: float
    layer: int
    updates: int = 1
    reference: FrozenModel | None = None
    untrained: UntrainedModel | None = None
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

    def weights(self, step: int) -> tuple[float, float]:
        """Return the weights of the forget and of the retain term in a step, counted from 0."""
        if self.method.weights is None:
            return self.gamma, self.alpha
        return weights_at(self.method, min(step / self.updates, 1.0), self.params)


def make_objective(
    config: MethodConfig,
    model: Any,
    items: Items,
    seed: int,
    batch_size: int = 32,
    *,
    updates: int = 1,
    unseen_logp: float | None = None,
) -> Objective:
    """Resolve a method's config against the start model. Raises UserError for an unknown method or knob, or an unmet
    need.

    Args:
        config: of the method.
        model: the start model, wrapped (AnswerModel).
        items: of the run.
        seed: of what is drawn: a control vector, an untrained model.
        batch_size: of the run.
        updates: how many the run has, which schedules of weights are stretched over.
        unseen_logp: mean log-probability of an answer token never trained on, in nats; None if unknown.
    """
    objective = resolve_objective(config, model.lm.config, items, batch_size)
    objective.updates = updates
    if objective.params.get("target") == 0:
        objective.params = {**objective.params, "target": _unseen_loss(config.name, unseen_logp)}
    wanted = objective.needs
    if wanted & {"ref_logits", "ref_hidden"}:
        objective.reference = FrozenModel(model)
    if "bad_logits" in wanted:
        objective.untrained = UntrainedModel(model, seed)
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
    layers = lm_config.num_hidden_layers if "hidden" in wanted else 0
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
    gamma, alpha = weights_at(method, 0.0, params)
    gamma = gamma if config.gamma is None else config.gamma
    alpha = alpha if config.alpha is None else config.alpha
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


def _unseen_loss(name: str, unseen_logp: float | None) -> float:
    if unseen_logp is None:
        raise UserError(
            f"method '{name}' raises the forget loss to that of data never trained on, and there is neither gold nor a "
            "split holdout to take it from; set method.params.target (nats per token), or give gold"
        )
    return -unseen_logp


def _refuse_idle(config: MethodConfig, method: Method, retain: str, wanted: frozenset[str]) -> None:
    """Refuse a setting that would stand in the results and have had no effect."""
    rule = method.weights
    idle = {
        "gamma": config.gamma is not None and (method.forget is None or rule is not None),
        "alpha": config.alpha is not None and (retain == "none" or rule is not None),
        "layer": config.layer is not None and "hidden" not in wanted,
        "alternates": config.alternates is not None and "alt" not in wanted,
    }
    for name, useless in idle.items():
        if useless:
            cure = "set method.retain too, or remove it" if name == "alpha" else "remove it"
            if rule is not None and name in ("gamma", "alpha"):
                cure = f"set method.params.{next(iter(rule.params))} instead"
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


def check_for_images(config: MethodConfig) -> None:
    """Refuse a method that trains on answers which only texts have. Raises UserError, also for an unknown method."""
    method, _ = resolve_method(config)
    if lacks := lacks_in_images(method):
        raise UserError(
            f"method '{method.name}' needs {' and '.join(lacks)}, which images have none of; choose random_label, "
            "bad_teacher or another method"
        )


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
    if method.needs_retain and RETAIN_TERMS[retain].fn is None:
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
        self.step_means: dict[int, Tensor] = {}
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
                parts[name] = Part(
                    collate([source[i] for i in mine], self.pad_id), mine, totals[name], len(numbers), step
                )
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
        gamma, alpha = self.objective.weights(next(iter(micro.values())).step)
        weights = {"forget": gamma, "retain": alpha}
        forgets = bool(micro.keys() & {"forget", *ANSWERS}) or "weights" in self.objective.needs
        present = ["forget"] * forgets + ["retain"] * ("retain" in micro)
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
        # a term without a batch of its own, on the weights, is divided as the other term's is
        part = next(micro[source] for source in (name, *ANSWERS, "retain") if source in micro)
        value = self._term(model, fn, micro, name, {knob: self.objective.params[knob] for knob in knobs})
        return value * part.share(over)

    def _term(
        self, model: nn.Module, fn: Callable[..., Tensor], micro: dict[str, Part], base: str, knobs: Mapping[str, float]
    ) -> Tensor:
        names = input_names(fn)
        values: dict[str, Any] = {"weights": [p for p in model.parameters() if p.requires_grad]}
        others = {a: [n for n in names if n.startswith((f"{a}_", f"ref_{a}_"))] for a in ANSWERS}
        if any("batch" in VOCABULARY[n] for n in names):
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
            if "step_logp" in names:
                out["step_logp"] = self._step_logp(model, part, source, logp_N)
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
        if self.objective.untrained is not None and "bad_logits_NV" in names:
            out["bad_logits_NV"] = self.objective.untrained(*where)
            self.tokens["reference"] += batch.n_inputs
        return out

    @torch.no_grad()
    def _step_logp(self, model: nn.Module, part: Part, source: str, logp_N: Tensor) -> Tensor:
        """Return the mean log-probability of all answer tokens in the step's batch, at the weights as they are: that of
        the micro-batch where it is the whole, else by forward passes over the whole on every process, once a step.
        """
        if part.step_tokens == len(logp_N):
            return logp_N.mean()
        if part.step not in self.step_means:
            numbers, items = self.drawn(part.step)[source]
            total = logp_N.new_zeros(())
            for group in np.array_split(numbers, len(numbers) // len(part.numbers)):
                batch = collate([items[i] for i in group], self.pad_id).to(logp_N.device)
                total += token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0].sum()
                count_pass(self.tokens, batch)
            self.step_means = {part.step: total / part.step_tokens}
        return self.step_means[part.step]
