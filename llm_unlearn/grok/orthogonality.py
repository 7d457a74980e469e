"""An intervention on gradients at fixed data: from a kind of checkpoint on, those of two halves of the authors are
pushed apart (or together) while the answers go on being fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_unlearn.data.batches import Batch, collate
from llm_unlearn.data.images import ImageRow
from llm_unlearn.data.schema import QARow
from llm_unlearn.eval.probes.passes import margin_loss
from llm_unlearn.grok.config import OrthogonalityConfig
from llm_unlearn.grok.detector import kinds
from llm_unlearn.grok.watch import GrokWatch
from llm_unlearn.log import get_logger
from llm_unlearn.methods.gradients import cosine_slopes, dot
from llm_unlearn.seeding import rng
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.loop import Run
from llm_unlearn.train.order import rank_slice, step_items
from llm_unlearn.train.tasks import FitTask

log = get_logger(__name__)
Graded = list[Tensor | None]


def unit_of(row: QARow) -> str:
    """What is never divided between the halves: an image's class, a question's author."""
    return row.answer if isinstance(row, ImageRow) else row.author or row.fact_id or row.question


class OrthogonalTask(FitTask):
    """Fitting with a penalty on the squared cosine of the gradients of two halves of each batch.

        loss + weight * cos^2(g_a, g_b),   g_a, g_b: gradients over a random half of the authors each, of the loss
                                           itself, or with `of: margin` of the mean of z_y - mean(other logits)

    The halves are drawn anew at every step, as a pure function of (seed, step), so the penalty's mean is that over
    random splits of the authors into some to be forgotten and some to be kept. Its gradient 2 c (H_a u + H_b v), with c
    the cosine and u, v its derivatives (`methods.gradients.cosine_slopes`), is exact: a second backward pass through
    the first, over the whole batch, all micro-batches and processes. The graphs of all of a step's micro-batches are
    held meanwhile. A step that has authors of one half alone is a plain one.

    Until `on` is set, steps are the plain ones to the bit. The loss logged is that of the answers alone; `cosine` is
    logged beside it. Batch norm sees each half on its own.
    """

    def __init__(self, config: OrthogonalityConfig, units: Sequence[str], *fit: Any) -> None:
        super().__init__(*fit)
        self.config, self.weight, self.on = config, config.weight, config.after == "start"
        names, self.unit_I = np.unique(np.asarray(units), return_inverse=True)
        self.n_units = len(names)

    def first_half(self, step: int) -> np.ndarray:
        """Return which items are of the first half at a step: (items,) bool."""
        chosen = np.zeros(self.n_units, dtype=bool)
        chosen[rng(self.seed, "halves", step).permutation(self.n_units)[: self.n_units // 2]] = True
        return chosen[self.unit_I]

    def fill_gradients(self, run: Run, weights: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Set the step's gradient; return this process' part of the loss, and the cosine of the halves while on."""
        total = torch.zeros((), device=weights[0].device)
        if not self.on:
            plain: Graded = [None] * len(weights)
            for micro in self.micro_batches(run.step):
                part, _ = self.loss(run.answer_model, micro)
                plain = _add(plain, torch.autograd.grad(part, list(weights), allow_unused=True))
                total += part.detach()
            _set(weights, plain, run)
            return total, {"cosine": torch.zeros_like(total)}
        sides: list[Graded] = [[None] * len(weights), [None] * len(weights)]
        fitting: Graded = [None] * len(weights)
        of_margin = self.config.of == "margin"
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            for side, batch, share in self._half_batches(run.step):
                batch = batch.to(total.device)
                for _ in range(3 if self.weight else 1):  # a backward pass through the first costs about two of each
                    count_pass(self.tokens, batch)
                logits_NV = run.answer_model(batch.inputs, batch.index_N)
                part = asked = self.objective(logits_NV, batch.labels_N) * share
                if of_margin:
                    asked = margin_loss(logits_NV, batch.labels_N).mean() * share
                    own = torch.autograd.grad(part, list(weights), retain_graph=True, allow_unused=True)
                    fitting = _add(fitting, own)
                    self.tokens["backward"] += batch.n_inputs
                grads = torch.autograd.grad(asked, list(weights), create_graph=bool(self.weight), allow_unused=True)
                sides[side] = _add(sides[side], grads)
                total += part.detach()
            cosine, penalty = self._penalty(run, weights, sides)
        if not of_margin:
            first, second = ([None if g is None else g.detach() for g in side] for side in sides)
            fitting = _add(first, second)
        _set(weights, _add(fitting, penalty), run)
        return total, {"cosine": cosine / run.accelerator.num_processes}

    def _half_batches(self, step: int) -> Iterator[tuple[int, Batch, float]]:
        """Yield (half, batch, its share of the step's answer tokens) of this process' micro-batches."""
        order = step_items(len(self.items), self.batch_size, step, self.seed)
        total, first_I = sum(self.items[i].n_answer for i in order), self.first_half(step)
        for k in range(self.n_micro):
            mine = rank_slice(order, self.place.rank, self.place.world, k, self.n_micro)
            for side, chosen in enumerate((mine[first_I[mine]], mine[~first_I[mine]])):
                if len(chosen):
                    batch = collate([self.items[i] for i in chosen], self.pad_id)
                    yield side, batch, batch.n_tokens / total

    def _penalty(self, run: Run, weights: Sequence[Tensor], sides: Sequence[Graded]) -> tuple[Tensor, Graded]:
        """Return the cosine of the halves' gradients, and this process' part of the penalty's gradient."""
        zeros = [torch.zeros_like(w) for w in weights]
        local = [[z if g is None else g.detach() for z, g in zip(zeros, side, strict=True)] for side in sides]
        whole = [_reduced(gradient, run) for gradient in local]
        cosine, *slopes = cosine_slopes(*whole)
        nothing: Graded = [None] * len(weights)
        pairs = [(g, slope) for side, by in zip(sides, slopes, strict=True) for g, slope in zip(side, by, strict=True)
                 if g is not None and g.requires_grad]  # fmt: skip
        if not pairs or not self.weight:
            return cosine, nothing
        along = dot(*map(list, zip(*pairs, strict=True))) * (2 * self.weight * cosine)
        return cosine, list(torch.autograd.grad(along, list(weights), allow_unused=True))


class Intervention:
    """The callback that turns an OrthogonalTask on at the evaluation that decides its kind, and ends the run `steps`
    updates later. It comes after the watch.
    """

    def __init__(self, task: OrthogonalTask, watch: GrokWatch) -> None:
        self.task, self.watch, self.config = task, watch, task.config
        self.begun: int | None = 0 if task.on else None

    def __call__(self, run: Run) -> None:
        """Turn the penalty on if it is time, and stop the run if it had its updates."""
        evaluated = bool(self.watch.curve) and self.watch.curve[-1].step == run.step
        if self.begun is None and evaluated and self.config.after in kinds(self.watch.report):
            self.begun, self.task.on = run.step, True
            log.info("orthogonality: weight %g from step %d", self.config.weight, run.step)
        if self.begun is not None and self.config.steps and run.step >= self.begun + self.config.steps:
            run.stop_reason = f"{self.config.steps} steps of orthogonality"

    def state_dict(self) -> dict[str, Any]:
        """Return when it began."""
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        self.begun = state["begun"]
        self.task.on = self.begun is not None


def _add(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> Graded:
    return [b if a is None else a if b is None else a + b for a, b in zip(sums, more, strict=True)]


def _reduced(gradient: list[Tensor], run: Run) -> list[Tensor]:
    return [run.accelerator.reduce(g, "sum") for g in gradient] if run.accelerator.num_processes > 1 else gradient


def _set(weights: Sequence[Tensor], gradient: Graded, run: Run) -> None:
    used = [g is not None for g in gradient]
    whole = _reduced([torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=True)], run)
    for weight, value, mine in zip(weights, whole, used, strict=True):
        weight.grad = value.to(weight.dtype) if mine else None
