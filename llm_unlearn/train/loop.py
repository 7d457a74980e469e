"""The training loop, on Accelerate. Grokking, fine-tuning, unlearning and relearning all run on it.

A task says which micro-batches form a step and what their loss is; callbacks look on, save and stop; gradient edits sit
between backward and the optimizer step. Which items form a step is a pure function of (seed, epoch, step), so resuming
needs no sampler state.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import Diverged, Interrupted, UserError
from llm_unlearn.interrupt import noted
from llm_unlearn.log import JsonlLog, get_logger, progress
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.checkpointing import checkpoint_activations
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.ending import Ending
from llm_unlearn.train.engine import check_engine, divided, in_step, prepare, process_group
from llm_unlearn.train.finite import refuse_non_finite
from llm_unlearn.train.fsdp import unannounced
from llm_unlearn.train.lock import locked
from llm_unlearn.train.optimizer import make_optimizer
from llm_unlearn.train.resume import load_resume, save_resume
from llm_unlearn.train.schedule import lr_factor
from llm_unlearn.train.tasks import Place, n_micro_batches
from llm_unlearn.train.whole import check_whole_gradients
from llm_unlearn.train.world import end_with_launcher, named_in_errors, world_size

log = get_logger(__name__)
GradientEdit = Callable[[Sequence[tuple[str, Tensor]]], None]


class Task(Protocol):
    """What is trained: micro-batches of a step, and their loss."""

    n_micro: int
    pad_id: int

    def drawn(self, step: int) -> Mapping[str, tuple[np.ndarray, Sequence[Item]]]:
        """Return the items of a step over all processes, by sort: (batch,) numbers, and what they number."""
        ...

    def micro_batches(self, step: int) -> Iterable[Any]:
        """Yield this process' `n_micro` micro-batches of a step (counted from 0), on the CPU."""
        ...

    def loss(self, model: nn.Module, micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's part of the step's loss (the parts of all micro-batches and processes add up to it)
        and parts to log.
        """
        ...


@runtime_checkable
class FillsGradients(Protocol):
    """A task that makes a step's gradient itself, in place of the backward pass of its loss. With `state_dict` and
    `load_state_dict` it is saved and resumed too.
    """

    def fill_gradients(self, run: Run, weights: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Set `.grad` of the trained weights to the gradient of step `run.step`, whole and the same on every process;
        return this process' part of the step's loss and parts to log.
        """
        ...


class Callback(Protocol):
    """Called after every optimizer step, and once before the first with `run.step` = 0 (or the step resumed from)."""

    def __call__(self, run: Run) -> None:
        """Look at the run; set `run.stop_reason` to end it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        ...


@dataclass
class Run:
    """A running training: what callbacks see. `step` counts finished optimizer steps; `unseen` is the first callback
    that has not seen the last of them, None when all have.
    """

    model: nn.Module
    accelerator: Any
    out: Path | None
    max_steps: int
    step: int = 0
    loss: float = math.nan
    logs: dict[str, float] = field(default_factory=dict)
    stop_reason: str | None = None
    seconds: float = 0.0
    resumed_from: int = 0
    unseen: int | None = None
    asked_to_end: bool = False
    ending: Ending | None = None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For the long part of a callback, which changes nothing: a signal ends it, and a resumed run calls the
        callback again. Every process has to come here. Raises Interrupted.
        """
        if self.ending is None:
            yield
        else:
            with self.ending.interruptible():
                yield

    @cached_property
    def answer_model(self) -> AnswerModel:
        """The model, out of whatever Accelerate wrapped it in (looking for which takes as long as a small model)."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def lm(self) -> Any:
        """The bare Hugging Face model."""
        return self.answer_model.lm


def join_world(loop: LoopConfig, out: Path, *, unused_parameters: bool = False) -> tuple[Any, Place]:
    """Return the run's Accelerator (see `make_accelerator`) and this process' place among the others."""
    n_micro = n_micro_batches(loop.batch_size, loop.micro_batch, world_size())
    accelerator = make_accelerator(loop, n_micro, out, unused_parameters=unused_parameters)
    return accelerator, Place(accelerator.process_index, accelerator.num_processes, n_micro)


def make_accelerator(
    loop: LoopConfig, n_micro: int, out: Path | None = None, *, unused_parameters: bool = False
) -> Any:
    """Create the Accelerator of a run and refuse to start in a world that is not the one asked for.

    `unused_parameters` says that no forward pass of a step reaches some of the trained weights, which several processes
    have to know in advance.

    Raises UserError as `check_engine` does, for a tracker that is not installed, and for a precision that this machine
    does not have.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    if loop.tracker != "none" and loop.tracker not in [str(name) for name in get_available_trackers()]:
        raise UserError(f"loop.tracker={loop.tracker}: is not installed; pip install 'llm-unlearn[trackers]'")
    end_with_launcher()
    if loop.threads:
        torch.set_num_threads(loop.threads)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # Accelerate imports deepspeed, which otherwise searches and warns
    try:
        with unannounced():
            accelerator = Accelerator(
                mixed_precision=loop.precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=n_micro, sync_with_dataloader=False),
                log_with=None if loop.tracker == "none" else loop.tracker,
                project_dir=None if out is None else str(out),
                kwargs_handlers=[
                    DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
                    process_group(loop),
                ],
            )
    except ValueError as error:
        if f"{loop.precision} mixed precision" not in str(error):
            raise
        raise UserError(f"loop.precision={loop.precision}: {error} Choose another precision") from None
    check_engine(accelerator, loop)
    if loop.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("loop.precision=fp16: needs a GPU, on a CPU Accelerate leaves it out; choose bf16 or no")
    return accelerator


def train(
    model: nn.Module,
    task: Task,
    optim: OptimConfig,
    loop: LoopConfig,
    *,
    accelerator: Any,
    out: Path | None = None,
    callbacks: Sequence[Callback] = (),
    gradient_edits: Sequence[GradientEdit] = (),
    identity: str = "",
    made_from: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    label: str = "train",
    has_result: Callable[[], bool] = lambda: False,
) -> Run:
    """Train `model` (an AnswerModel) for `loop.max_steps` steps or until a callback stops it.

    With `out`, the state is saved there every `save_every` steps and a run that finds a valid state resumes from it,
    bit-identically. `identity` is the digest of everything that decides the result: a state of another identity is
    refused, and so is one `made_from` other models (reference -> fingerprint). A tracker gets the run's flat `settings`
    and what the journal gets.

    Returns the finished Run, whose `model` is the prepared one. Raises Diverged, a UserError, on a loss or gradient
    that is not finite, naming the step and its items; if `has_result` (asked in every process) is true by then, the run
    ends with the stop reason "diverged" instead, its weights as they were before that step (ZeRO in bf16 has taken it).
    Raises Interrupted when a signal asked one of the processes to end: the state of the last finished step is saved
    then.
    """
    if loop.gradient_checkpointing:
        checkpoint_activations(model.lm)
    if divided(accelerator) and (gradient_edits or isinstance(task, FillsGradients)):
        check_whole_gradients("what is done to gradients here", "leave it out", accelerator)
    optimizer = make_optimizer(model, optim)
    model, optimizer = prepare(accelerator, model, optimizer, optim, loop)
    run = Run(model, accelerator, out, loop.max_steps)
    run.ending = Ending(accelerator, in_step=in_step(accelerator))
    with locked(out if accelerator.is_main_process else None), noted(), named_in_errors(lambda: run.step):
        parts = {
            "callbacks": callbacks,
            "gradient_edits": [edit for edit in gradient_edits if hasattr(edit, "state_dict")],
            **({"task": [task]} if hasattr(task, "state_dict") else {}),
        }
        if out is not None:
            run.step = run.resumed_from = load_resume(out, run, optimizer, parts, identity, made_from or {})
        if run.resumed_from:
            log.info("resumed at step %d", run.step)
        names = [(n, p) for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
        journal = (
            JsonlLog(out / "train_log.jsonl", keep=lambda line: line["step"] <= run.step)
            if out and accelerator.is_main_process
            else None
        )
        if loop.tracker != "none":
            accelerator.init_trackers("llm-unlearn", {key: _plain(value) for key, value in (settings or {}).items()})

        def save() -> None:
            if out is not None:
                save_resume(out, run, optimizer, parts, identity, made_from or {})

        model.train()
        if run.step == 0:
            notify(callbacks, run)
        elif run.unseen is not None:
            _after_step(run, callbacks, loop, save)
        with progress(loop.max_steps, label, enabled=accelerator.is_main_process) as bar:
            while run.step < loop.max_steps and run.stop_reason is None:
                started = time.perf_counter()
                try:
                    _one_step(run, task, optimizer, optim, gradient_edits, names)
                except Diverged as error:
                    if not has_result():
                        raise
                    log.warning("%s", error)
                    run.stop_reason = "diverged"
                    break
                run.seconds += time.perf_counter() - started
                if run.step % loop.log_every == 0 or run.step == 1:
                    line = {"loss": run.loss, "lr": optimizer.param_groups[0]["lr"], **run.logs}
                    accelerator.log(line, step=run.step)
                    if journal:
                        journal.write({"step": run.step, **line})
                _after_step(run, callbacks, loop, save)
                bar.update(run.step, f"loss {run.loss:.3g}")
    return run


def _after_step(run: Run, callbacks: Sequence[Callback], loop: LoopConfig, save: Callable[[], None]) -> None:
    """Show callbacks the step and save it when it is time. Asked to end, save it at once and raise Interrupted; what
    callbacks have not seen they see when the run is resumed.
    """
    assert run.ending is not None
    try:
        if run.asked_to_end:
            run.unseen = run.unseen or 0
            raise run.ending.reason
        notify(callbacks, run)
    except Interrupted:
        save()
        if run.accelerator.is_main_process:
            log.warning("asked to end: saved at step %d" if run.out else "asked to end at step %d", run.step)
        raise
    if run.step % loop.save_every == 0 or run.stop_reason or run.step == loop.max_steps:
        save()
        if run.ending.agreed():  # while saving: another step would be time lost
            raise run.ending.reason


def _one_step(
    run: Run,
    task: Task,
    optimizer: Any,
    optim: OptimConfig,
    edits: Sequence[GradientEdit],
    names: Sequence[tuple[str, Tensor]],
) -> None:
    accelerator = run.accelerator
    for group in optimizer.param_groups:
        group["lr"] = optim.lr * lr_factor(run.step, optim.warmup, run.max_steps, optim.schedule)
    if isinstance(task, FillsGradients):
        total, logs = task.fill_gradients(run, [p for _, p in names])
        _before_update(run, task, total, optim, edits, names)
        optimizer.step()
        optimizer.zero_grad()
    else:
        total, logs = torch.zeros((), device=accelerator.device), {}
        for micro in task.micro_batches(run.step):
            with accelerator.accumulate(run.model):
                part, shown = task.loss(run.model, micro)
                # Accelerate averages over micro-batches and processes; our parts already add up to the step's loss
                accelerator.backward(part * (task.n_micro * accelerator.num_processes))
                total += part.detach()
                for key, value in shown.items():
                    logs[key] = logs.get(key, 0.0) + value.detach()
                if accelerator.sync_gradients:
                    _before_update(run, task, total, optim, edits, names)
                optimizer.step()
                optimizer.zero_grad()
    run.step += 1
    assert run.ending is not None
    sums = torch.stack([total, *(value.to(total) for value in logs.values()), total.new_tensor(run.ending.mine)])
    run.loss, *shares, asked = (accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums).tolist()
    run.logs, run.asked_to_end = dict(zip(logs, shares, strict=True)), asked > 0


def _before_update(
    run: Run,
    task: Task,
    total: Tensor,
    optim: OptimConfig,
    edits: Sequence[GradientEdit],
    names: Sequence[tuple[str, Tensor]],
) -> None:
    for edit in edits:
        edit(names)
    # DeepSpeed has stepped by now, in its backward pass, and clipped by its own config; this is its norm
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), optim.clip or math.inf)
    refuse_non_finite(run, task, total, norm)


def notify(callbacks: Sequence[Callback], run: Run) -> None:
    """Call the callbacks that have not seen the step; over several processes, a reason to stop becomes that of the
    first for all.
    """
    for i in range(run.unseen or 0, len(callbacks)):
        run.unseen = i
        callbacks[i](run)
    run.unseen = None
    if run.accelerator.num_processes > 1:
        # scores differ in the last bits from process to process, and a stop has to be everyone's
        from accelerate.utils import broadcast_object_list

        run.stop_reason = broadcast_object_list([run.stop_reason])[0]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
