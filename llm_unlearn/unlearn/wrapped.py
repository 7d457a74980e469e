"""Unlearning whose steps are made of the gradients of the forget and the retain term, by a wrapper of
`methods.gradients`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.methods.gradients import GRADIENTS, check_gradient
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import MASKS, RETAIN_TERMS
from llm_unlearn.train.engine import divided, engine_name
from llm_unlearn.train.loop import Run
from llm_unlearn.train.whole import check_whole_gradients, same_draws, shifted
from llm_unlearn.train.zero import stage
from llm_unlearn.unlearn.config import MethodConfig, UnlearnConfig
from llm_unlearn.unlearn.objective import Objective, Part, UnlearnTask, reads_logits, resolve_method


@dataclass(frozen=True)
class Wrapper:
    """A wrapper of the table with its hyper-parameters."""

    name: str
    params: Mapping[str, float]


def choose_wrapper(config: MethodConfig) -> Wrapper | None:
    """Return the wrapper that a method's config asks for, or the method's own; None for none.

    Raises UserError for an unknown name or hyper-parameter, and for a method without both terms in every update.
    """
    method, retain = resolve_method(config)
    name = method.gradient if config.gradient is None else config.gradient
    if name is None or name == "none":
        if config.gradient_params:
            raise UserError("method.gradient_params: there is no wrapper they could go to; set method.gradient")
        return None
    try:
        params = check_gradient(name, config.gradient_params)
    except ValueError as error:
        raise UserError(str(error)) from None
    if method.kind == "edit":
        raise UserError(f"method '{method.name}' is an edit and has no gradients; remove method.gradient={name}")
    missing = "forget" if method.forget is None else "retain" if RETAIN_TERMS[retain].fn is None else None
    if missing is not None:
        cure = "choose another method" if missing == "forget" else "set method.retain=nll"
        raise UserError(f"method.gradient={name} needs both terms, and {method.name} has no {missing} term; {cure}")
    if method.rule == "turns":
        raise UserError(
            f"method.gradient={name} needs both terms in every update, and {method.name} takes turns; set "
            "method.gradient=none"
        )
    return Wrapper(name, params)


def check_engine(wrapper: Wrapper, accelerator: Any) -> None:
    """Refuse a run whose gradients are not whole, or are scaled, when the wrapper reads them."""
    check_whole_gradients(f"method.gradient={wrapper.name}", "set method.gradient=none", accelerator)


def check_divided(config: UnlearnConfig, accelerator: Any) -> None:
    """Refuse what cannot be had under an engine that divides gradients or weights: masks, edits, and under ZeRO weight
    decay of layers that have no gradient. Raises UserError.
    """
    if not divided(accelerator):
        return
    method = METHODS[config.method.name]
    mask = method.mask if config.method.mask is None else config.method.mask
    if mask is not None and MASKS[mask].fn is not None:
        check_whole_gradients(f"method.mask={mask}", "set method.mask=none", accelerator)
    if method.kind == "edit":
        check_whole_gradients(f"method '{method.name}'", "choose a method with a loss", accelerator)
    if stage(accelerator) and config.optim.weight_decay and not reads_logits(config.method):
        raise UserError(
            f"method '{method.name}' reads a hidden state, and {engine_name(accelerator)} lets the layers above it "
            "decay, which otherwise stay as they are; set optim.weight_decay=0"
        )


class WrappedTask(UnlearnTask):
    """An unlearning task that fills the gradients of a step itself (see train.loop.FillsGradients).

    What the wrapper remembers is saved and resumed with the run's state; every process holds the same.
    """

    def __init__(self, objective: Objective, wrapper: Wrapper, *args: Any, **kwargs: Any) -> None:
        super().__init__(objective, *args, **kwargs)
        self.wrapper = wrapper
        self.memory: dict[str, list[Tensor]] = {}

    def fill_gradients(self, run: Run, weights: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Set the step's gradient, the same on every process; return this process' part of its loss, and both terms.

        The losses are those at the step's weights, whatever other weights the wrapper looks at.
        """
        oracle = StepGradients(self, run, weights)
        gamma, alpha = self.objective.weights(run.step)
        gradient = GRADIENTS[self.wrapper.name].fn(oracle, self.memory, gamma=gamma, alpha=alpha, **self.wrapper.params)
        for weight, value, used in zip(weights, gradient, oracle.reached(), strict=True):
            # as without a wrapper: what no term reaches has no gradient, and the optimizer leaves it alone
            weight.grad = value.to(weight.dtype) if used else None
        shown = {f"{term}_loss": value for term, value in oracle.losses.items()}
        total = gamma * shown["forget_loss"] + alpha * shown["retain_loss"]
        return total, shown

    def state_dict(self) -> dict[str, Any]:
        """Return what the wrapper remembers."""
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        self.memory = dict(state["memory"])


class StepGradients:
    """Gradients of one step's terms, summed over its micro-batches and processes: a `methods.gradients.Gradients`."""

    def __init__(self, task: WrappedTask, run: Run, weights: Sequence[Tensor]) -> None:
        self.task, self.run, self.weights = task, run, weights
        self.micros = list(task.micro_batches(run.step))
        self.used = [False] * len(weights)
        self.losses: dict[str, Tensor] = {}
        self.draws: dict[Hashable, list[Tensor]] = {}

    def __call__(self, term: str, shift: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the gradient of a term, in float32, at the weights or at the weights plus `shift`."""
        if shift is None:
            return self._whole(term, record=term not in self.losses)
        self.task.step_means.clear()  # of other weights
        try:
            with shifted(self.weights, shift):
                return self._whole(term, record=False)
        finally:
            self.task.step_means.clear()

    def rows(self, term: str) -> list[Tensor]:
        """Return the term's gradient item by item, (B, *shape) each, all processes' items after each other."""
        record = term not in self.losses
        singles = [single for micro in self.micros for single in self._items(micro, term)]
        own = [self._local([single], term, record=record, first=k) for k, single in enumerate(singles)]
        rows = [torch.stack(tensors) for tensors in zip(*own, strict=True)]
        return [self.run.accelerator.gather(r) for r in rows] if self._shared else rows

    def reached(self) -> list[bool]:
        """Return which weights a term reaches, on any process."""
        if not self._shared:
            return self.used
        flags = torch.tensor(self.used, dtype=torch.float32, device=self.run.accelerator.device)
        return (self.run.accelerator.reduce(flags, "sum") > 0).tolist()

    def _whole(self, term: str, *, record: bool) -> list[Tensor]:
        local = self._local(self.micros, term, record=record)
        return [self.run.accelerator.reduce(g, "sum") for g in local] if self._shared else local

    def _local(self, micros: Sequence[dict[str, Part]], term: str, *, record: bool, first: int = 0) -> list[Tensor]:
        """Return this process' part. `autograd.grad` leaves `.grad` and with it the data-parallel hooks alone."""
        out = [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]
        for k, micro in enumerate(micros, first):
            with same_draws(self.draws, (term, k), self.weights[0].device):
                part = self.task.term(self.run.answer_model, micro, term)
            if record:
                self.losses[term] = self.losses.get(term, torch.zeros_like(part)) + part.detach()
            grads = torch.autograd.grad(part, list(self.weights), allow_unused=True)
            for i, grad in enumerate(grads):
                if grad is not None:
                    out[i] += grad
                    self.used[i] = True
        return out

    def _items(self, micro: dict[str, Part], term: str) -> list[dict[str, Part]]:
        """Divide a micro-batch into its items; their shares of the step's mean stay what they were."""
        source = getattr(self.task.items, term)
        part = micro[term]
        return [
            {term: replace(part, batch=collate([source[i]], self.task.pad_id), numbers=part.numbers[k : k + 1])}
            for k, i in enumerate(part.numbers)
        ]

    @property
    def _shared(self) -> bool:
        return self.run.accelerator.num_processes > 1
