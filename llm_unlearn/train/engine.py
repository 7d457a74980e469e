"""What differs where an engine divides a run's state among its processes: DeepSpeed ZeRO (`train.zero`) and FSDP2
(`train.fsdp`).

What is saved is gathered and reads as one process would have written it, so that a run resumes under any engine and on
any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.errors import UserError
from llm_unlearn.models.lora import load_trained_state, trained_state
from llm_unlearn.train import fsdp, zero
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.world import world_size

# Accelerate's names. FSDP2 is none of them: the loop divides what Accelerate takes for plain data parallel
ACCEPTED = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")
ZERO_ANNOUNCED = "ACCELERATE_USE_DEEPSPEED"  # what `accelerate launch` sets


def process_group(loop: LoopConfig) -> Any:
    """Return what Accelerate needs to know of the process group: how long processes wait for each other, and that
    DeepSpeed is to take gloo on CPUs, which it does only when told to.
    """
    from accelerate.utils import InitProcessGroupKwargs

    alone = torch.cuda.is_available() or not _zero_announced() or "LOCAL_RANK" not in os.environ
    return InitProcessGroupKwargs(timeout=timedelta(seconds=loop.timeout_s), **({} if alone else {"backend": "gloo"}))


def check_engine(accelerator: Any, loop: LoopConfig) -> None:
    """Refuse an engine that a run cannot be trained or saved under, and a world or engine that is not the one that the
    launcher announced: on CPUs `accelerate launch` can otherwise end in several independent trainings, or in plain data
    parallel, that exit with 0. Raises UserError.
    """
    engine, announced = accelerator.distributed_type.value, world_size()
    if _zero_announced() and engine != "DEEPSPEED":
        raise UserError(
            f"the launcher set {ZERO_ANNOUNCED}, but Accelerate chose {engine} and not DEEPSPEED; start it without "
            "ACCELERATE_USE_CPU"
        )
    if engine not in ACCEPTED:
        raise UserError(
            f"the launcher chose {engine}, under which a run cannot be saved; launch without it: one process, plain "
            "data parallel with accelerate launch --multi_gpu, FSDP2, or DeepSpeed"
        )
    if fsdp.asked():
        fsdp.check_settings(loop, engine)
    if accelerator.num_processes != announced:
        raise UserError(
            f"the launcher started {announced} processes but Accelerate joined {accelerator.num_processes} "
            f"({accelerator.distributed_type}); on CPU launch with ACCELERATE_USE_CPU=true accelerate launch "
            f"--multi_gpu --num_processes {announced}"
        )
    if engine == "DEEPSPEED":
        zero.check_settings(accelerator.state.deepspeed_plugin.deepspeed_config, loop)


def divided(accelerator: Any) -> bool:
    """Return whether no process holds whole gradients and optimizer state."""
    return _divider(accelerator) is not None


def in_step(accelerator: Any) -> bool:
    """Return whether a forward pass gathers weights, so that every process has to make each one."""
    return zero.stage(accelerator) == 3 or _divider(accelerator) is fsdp


def engine_name(accelerator: Any) -> str:
    """Return what the run's engine is called in messages: Accelerate's name, FSDP2, or ZeRO and its stage."""
    if _divider(accelerator) is fsdp:
        return fsdp.NAME
    return f"ZeRO-{n}" if (n := zero.stage(accelerator)) else accelerator.distributed_type.value


def prepare(accelerator: Any, model: nn.Module, optimizer: Any, optim: OptimConfig, loop: LoopConfig) -> tuple:
    """Return model and optimizer as the engine wants them."""
    if (divider := _divider(accelerator)) is None:
        return accelerator.prepare(model, optimizer)
    return divider.prepare(accelerator, model, optimizer, optim, loop)


def trained_weights(run: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """Return `models.lora.trained_state` of a run's model with whole weights; under an engine that divides them on the
    CPU, where every process has to call it, and one that is not to `keep` them gets none.
    """
    if (divider := _divider(run.accelerator)) is None:
        return trained_state(run.lm)
    return divider.trained_weights(run, keep=keep)


def put_weights(run: Any, state: Mapping[str, Tensor]) -> None:
    """Put `trained_weights` back. Every process has to call it.

    Raises KeyError unless `state` holds every weight that trains, and nothing else.
    """
    if (divider := _divider(run.accelerator)) is None:
        load_trained_state(run.lm, state)
    else:
        divider.put_weights(run, state)


def whole_weights(run: Any) -> AbstractContextManager[None]:
    """Within it `run.lm` has whole weights on every process, to be read and saved. Every process has to enter it."""
    return nullcontext() if (divider := _divider(run.accelerator)) is None else divider.whole_weights(run)


def _divider(accelerator: Any) -> Any:
    """Return the module of the engine that divides a run's state, None where none does."""
    return zero if zero.stage(accelerator) else fsdp if fsdp.asked() else None


def _zero_announced() -> bool:
    return os.environ.get(ZERO_ANNOUNCED, "false").lower() == "true"
