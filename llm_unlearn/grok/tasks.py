"""What a grokking run fits: the answers, maybe with a penalty beside them, maybe where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.data.batches import Batch
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import DistilConfig, GrokConfig, SplineConfig
from llm_unlearn.grok.orthogonality import OrthogonalTask
from llm_unlearn.methods.complexity import complexity_penalty
from llm_unlearn.methods.fitting import FIT_LOSSES
from llm_unlearn.methods.gradients import nearby_worst
from llm_unlearn.methods.losses import kl
from llm_unlearn.seeding import derive
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.loop import Run
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.train.whole import same_draws, shifted

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU)


def make_task(
    items: Sequence[Item],
    config: GrokConfig,
    place: Place,
    pad_id: int,
    model: nn.Module,
    teacher: nn.Module | None = None,
    units: Sequence[str] = (),
) -> FitTask | SamTask:
    """Return the task of a grokking run.

    Args:
        teacher: the model that `config.distil` names.
        units: what each item's gradient belongs to (orthogonality's authors).

    Raises UserError for a penalty on activations that the model does not have, or losses that exclude each other.
    """
    fit = (items, config.loop.batch_size, derive(config.seed, "order"), place, pad_id, FIT_LOSSES[config.loss])
    if config.spline is not None and not activations(model):
        raise UserError(
            "spline: the model has no ReLU, GELU or SiLU module whose pre-activations could be read; set spline=null"
        )
    losses = [name for name in ("spline", "distil", "orthogonality") if getattr(config, name) is not None]
    if len(losses) > 1:
        raise UserError(f"{' and '.join(losses)}: each makes the step's loss; set all but one to null")
    if config.orthogonality is not None:
        if config.sam is not None:
            raise UserError("orthogonality and sam: each makes the step's gradient; set one of them to null")
        return OrthogonalTask(config.orthogonality, units, *fit)
    task = FitTask(*fit)
    if config.spline is not None:
        task = SplineTask(config.spline, *fit)
    elif config.distil is not None and teacher is not None:
        task = DistilTask(config.distil, teacher, *fit)
    return task if config.sam is None else SamTask(task, config.sam.rho)


class SplineTask(FitTask):
    """Fitting with `methods.complexity.complexity_penalty` on what enters the activations at the items of the step:
    with text where an answer token is predicted, with images everywhere.

    Every token (image) has the same weight in the penalty as in the loss, so micro-batches and processes change
    nothing. The penalty itself is logged as `complexity`, without its weight.
    """

    def __init__(self, config: SplineConfig, *fit: Any) -> None:
        super().__init__(*fit)
        self.weight, self.margin = config.weight, config.margin

    def loss(self, model: nn.Module, micro: tuple[Batch, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's part of loss plus weighted penalty."""
        batch, share = micro
        with preactivations(model) as seen:
            part, shown = super().loss(model, micro)
        index_N = batch.index_N.to(part.device)
        penalty = complexity_penalty([at_answers(z, batch, index_N) for z in seen], self.margin) * share
        return part + self.weight * penalty, {**shown, "complexity": penalty}


class DistilTask(FitTask):
    """Fitting the answers and a frozen teacher's distributions over them at a temperature T.

        L = (1 - weight) objective(z, y) + weight T^2 mean_N KL( softmax(z_teacher / T) || softmax(z / T) )

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (whose second weight is `1 - weight`). The divergence is
    logged as `teacher_kl`, without weight and T^2. The teacher's passes count as `reference`.
    """

    def __init__(self, config: DistilConfig, teacher: nn.Module, *fit: Any) -> None:
        super().__init__(*fit)
        self.weight, self.temperature = config.weight, config.temperature
        self.teacher = teacher.eval().requires_grad_(False)

    def loss(self, model: nn.Module, micro: tuple[Batch, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's part of the weighted sum."""
        batch, share = micro
        device, t = next(model.parameters()).device, self.temperature
        batch = batch.to(device)
        count_pass(self.tokens, batch)
        self.tokens["reference"] += batch.n_inputs
        with torch.no_grad():
            ref_logits_NV = self.teacher.to(device)(batch.inputs, batch.index_N)
        logits_NV = model(batch.inputs, batch.index_N)
        divergence = kl(logits_NV / t, ref_logits_NV / t) * share
        fit = self.objective(logits_NV, batch.labels_N) * share
        return (1 - self.weight) * fit + self.weight * t**2 * divergence, {"teacher_kl": divergence}


class SamTask:
    """A task whose steps take the gradient where their loss is worst nearby: Foret et al. 2021, arXiv:2010.01412,
    algorithm 1, over the whole batch of the step (all micro-batches and processes), not m-sharpness.

    The second look at a batch draws the same dropout masks. It normalises with the statistics of its own batch, as the
    first does, but batch norm's running statistics are those of the first look alone: the second one's, at weights the
    model never has, are put back. Over several processes they are those of the first. The loss logged is that at the
    step's weights; `nearby_loss` is the other.
    """

    def __init__(self, task: FitTask, rho: float) -> None:
        self.task, self.rho = task, rho
        self.n_micro, self.tokens, self.pad_id, self.drawn = task.n_micro, task.tokens, task.pad_id, task.drawn

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, float]]:
        """Yield the micro-batches of the task."""
        return self.task.micro_batches(step)

    def loss(self, model: nn.Module, micro: tuple[Batch, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the task's loss."""
        return self.task.loss(model, micro)

    def fill_gradients(self, run: Run, weights: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Set the step's gradient; return this process' part of the loss at the weights, and parts to log."""
        step = _Step(self.task, run, weights)
        gradient = nearby_worst(step.gradient, self.rho)
        for weight, value, used in zip(weights, gradient, step.used, strict=True):
            weight.grad = value.to(weight.dtype) if used else None
        (total, shown), *nearby = step.losses
        return total, {**shown, "nearby_loss": nearby[0][0] if nearby else total}


class _Step:
    """The gradient of one step, at its weights and at others."""

    def __init__(self, task: FitTask, run: Run, weights: Sequence[Tensor]) -> None:
        self.task, self.run, self.weights = task, run, weights
        self.micros = list(task.micro_batches(run.step))
        self.used = [False] * len(weights)
        self.losses: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.drawn: dict[Hashable, list[Tensor]] = {}

    def gradient(self, shift: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the float32 gradient of the whole step, the same on every process."""
        if shift is None:
            return self._sweep()
        with shifted(self.weights, shift), _held_buffers(self.run):
            return self._sweep()

    def _sweep(self) -> list[Tensor]:
        """Go through the micro-batches. `autograd.grad` leaves `.grad` and with it the data-parallel hooks alone."""
        run, device = self.run, self.weights[0].device
        out = [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]
        total, logs = torch.zeros((), device=device), dict[str, Tensor]()
        for k, micro in enumerate(self.micros):
            with same_draws(self.drawn, k, device):
                part, shown = self.task.loss(run.answer_model, micro)
            grads = torch.autograd.grad(part, list(self.weights), allow_unused=True)
            for i, grad in enumerate(grads):
                if grad is not None:
                    out[i] += grad
                    self.used[i] = True
            total += part.detach()
            for key, value in shown.items():
                logs[key] = logs.get(key, 0.0) + value.detach()
        self.losses.append((total, logs))
        return [run.accelerator.reduce(g, "sum") for g in out] if run.accelerator.num_processes > 1 else out


@contextmanager
def _held_buffers(run: Run) -> Iterator[None]:
    """Put the model's buffers back afterwards, on every process to those of the first."""
    buffers = list(run.answer_model.buffers())
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for buffer in buffers:
            broadcast(buffer)
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def activations(model: nn.Module) -> list[nn.Module]:
    """Return a model's ReLU, GELU and SiLU modules, torch's and transformers' own (Llama's SiLU is one of those)."""
    return [
        module
        for module in model.modules()
        if isinstance(module, ACTIVATIONS) or type(module).__module__ == "transformers.activations"
    ]


@contextmanager
def preactivations(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters every activation while the model runs, in the order of the passes."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    hooks = [module.register_forward_pre_hook(keep) for module in activations(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def at_answers(values: Tensor, batch: Batch, index_N: Tensor) -> Tensor:
    """Return a layer's values by answer token, (N, ...): of images all there is, of texts the positions that predict an
    answer, unless the layer ran only there.
    """
    if batch.inputs.is_floating_point() or values.dim() == 2:
        return values
    return values.flatten(0, 1)[index_N]
