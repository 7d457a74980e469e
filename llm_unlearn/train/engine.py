"""What differs where an engine divides a run's state among its processes: DeepSpeed ZeRO (Rajbhandari et al. 2020,
arXiv:1910.02054), which Accelerate starts. Nothing here imports it.

What is saved is gathered and reads as one process would have written it, so that a run resumes under any engine and on
any number of processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.errors import UserError
from llm_unlearn.models.lora import load_trained_state, trained_state
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.world import world_size

# engines under which every process holds the whole model and whole gradients: one of them can save it
WHOLE_MODEL = ("NO", "MULTI_CPU", "MULTI_GPU")
ACCEPTED = (*WHOLE_MODEL, "DEEPSPEED")
ANNOUNCED = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}  # what `accelerate launch` sets
OURS = ("optimizer", "scheduler")  # of DeepSpeed's config: the recipe has its own
OFFLOADED = ("offload_optimizer", "offload_param")


def process_group(loop: LoopConfig) -> Any:
    """Return what Accelerate needs to know of the process group: how long processes wait for each other, and that
    DeepSpeed is to take gloo on CPUs, which it does only when told to.
    """
    from accelerate.utils import InitProcessGroupKwargs

    alone = torch.cuda.is_available() or not _announced("DEEPSPEED") or "LOCAL_RANK" not in os.environ
    return InitProcessGroupKwargs(timeout=timedelta(seconds=loop.timeout_s), **({} if alone else {"backend": "gloo"}))


def check_engine(accelerator: Any, loop: LoopConfig) -> None:
    """Refuse an engine that a run cannot be trained or saved under, and a world or engine that is not the one that the
    launcher announced: on CPUs `accelerate launch` can otherwise end in several independent trainings, or in plain data
    parallel, that exit with 0. Raises UserError.
    """
    engine, asked = accelerator.distributed_type.value, world_size()
    for name, variable in ANNOUNCED.items():
        if _announced(name) and engine != name:
            cure = "start it without ACCELERATE_USE_CPU" if name == "DEEPSPEED" else "it needs GPUs"
            raise UserError(f"the launcher set {variable}, but Accelerate chose {engine} and not {name}; {cure}")
    if engine not in ACCEPTED:
        raise UserError(
            f"the launcher chose {engine}, under which a run cannot be saved; launch without it: one process, plain "
            "data parallel with accelerate launch --multi_gpu, or DeepSpeed"
        )
    if accelerator.num_processes != asked:
        raise UserError(
            f"the launcher started {asked} processes but Accelerate joined {accelerator.num_processes} "
            f"({accelerator.distributed_type}); on CPU launch with ACCELERATE_USE_CPU=true accelerate launch "
            f"--multi_gpu --num_processes {asked}"
        )
    if engine != "DEEPSPEED":
        return
    _check_config(accelerator.state.deepspeed_plugin.deepspeed_config, loop)


def _check_config(config: Mapping[str, Any], loop: LoopConfig) -> None:
    zero = config["zero_optimization"]
    if zero["stage"] == 0:
        raise UserError("DeepSpeed's zero_optimization.stage=0 divides nothing; choose 1, 2 or 3, or launch without it")
    if offloaded := [name for name in OFFLOADED if (zero.get(name) or {}).get("device", "none") != "none"]:
        raise UserError(f"DeepSpeed's {offloaded[0]} has not been tested with the recipes; launch without it")
    if loop.precision == "fp16" or config.get("fp16", {}).get("enabled") is True:
        raise UserError("loop.precision=fp16 has not been tested under DeepSpeed; choose bf16 or no")
    if given := [name for name in OURS if name in config]:
        raise UserError(f"DeepSpeed's config has its own {given[0]}, and optim.* decides here; remove it there")


def stage(accelerator: Any) -> int:
    """Return the ZeRO stage of a run; 0 where nothing is divided."""
    if accelerator.distributed_type.value != "DEEPSPEED":
        return 0
    return int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def engine_name(accelerator: Any) -> str:
    """Return what the run's engine is called in messages: Accelerate's name, or ZeRO and its stage."""
    return f"ZeRO-{n}" if (n := stage(accelerator)) else accelerator.distributed_type.value


def prepare(accelerator: Any, model: nn.Module, optimizer: Any, optim: OptimConfig, loop: LoopConfig) -> tuple:
    """Return model and optimizer as the engine wants them. DeepSpeed's batch sizes, accumulation and clipping are set
    to the run's: it scales and clips by its own config.
    """
    if not stage(accelerator):
        return accelerator.prepare(model, optimizer)
    n_micro, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_batch_size=loop.batch_size,
        train_micro_batch_size_per_gpu=loop.batch_size // (processes * n_micro),
        gradient_accumulation_steps=n_micro,
        gradient_clipping=optim.clip,
    )
    alone = optimizer.state_dict()["param_groups"]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    model, divided = accelerator.prepare(model, optimizer)
    return model, DividedOptimizer(divided, alone, weights, accelerator.is_main_process)


class DividedOptimizer:
    """A ZeRO optimizer whose state reads as that of torch's optimizer it was made from. Steps are part of DeepSpeed's
    backward pass.

    Args:
        divided: the optimizer that Accelerate has prepared.
        groups: `param_groups` of the torch optimizer's state dict.
        weights: its parameters, in its order.
        keeps: whether this process is one that saves; the others only take part in gathering.
    """

    def __init__(self, divided: Any, groups: list[dict[str, Any]], weights: Sequence[Tensor], keeps: bool) -> None:
        self.divided, self.groups, self.weights, self.keeps = divided, groups, weights, keeps
        self.step, self.zero_grad = divided.step, divided.zero_grad

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The engine's groups: what is set in them counts."""
        return self.divided.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, gathered to the CPU of a process that keeps it. Every process has to call it."""
        states = list(self._zero.optimizer.state.values())
        if not states:
            return {"state": {}, "param_groups": self.groups}
        names = [name for name, value in states[0].items() if torch.is_tensor(value) and value.dim()]
        count = {"step": states[0]["step"].cpu()} if "step" in states[0] else {}
        _link(self._zero)
        get = _deepspeed().utils.safe_get_full_optimizer_state
        state = {}
        for i, weight in enumerate(self.weights):
            values = {name: get(weight, name) for name in names}
            if self.keeps:
                state[i] = {**count, **{name: value.to("cpu", copy=True) for name, value in values.items()}}
        return {"state": state, "param_groups": self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a state dict, of whatever engine it is."""
        each = state["state"]
        if not each:
            return
        steps = [values["step"] for values in each.values() if "step" in values]
        names = {
            name for values in each.values() for name, value in values.items() if name != "step" and value is not None
        }
        zero = self._zero
        flat_weights = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        for flat in zero.single_partition_of_fp32_groups if flat_weights is None else flat_weights:
            zero.optimizer.state[flat] = {
                **({"step": max(steps).clone().to(flat.device)} if steps else {}),
                **{name: torch.zeros_like(flat) for name in names},
            }
        _link(zero)
        put = _deepspeed().utils.safe_set_full_optimizer_state
        for i, weight in enumerate(self.weights):
            for name in names if i in each else ():  # what had no gradient so far has no state
                put(weight, each[i][name].to(weight.device), name)

    @property
    def _zero(self) -> Any:
        return self.divided.optimizer


def trained_weights(run: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """Return `models.lora.trained_state` of a run's model with whole weights, under ZeRO in fp32 and on the CPU. Every
    process has to call it; one that is not to `keep` them then gets none.
    """
    state = trained_state(run.lm)
    if not stage(run.accelerator):
        return state
    weights = dict(run.lm.named_parameters(remove_duplicate=False))
    get = _deepspeed().utils.safe_get_full_fp32_param
    gathered = {}
    for name, value in state.items():
        whole = get(weights[name]) if name in weights else value
        if keep:
            gathered[name] = whole.detach().to("cpu", copy=True)
    return gathered


def put_weights(run: Any, state: Mapping[str, Tensor]) -> None:
    """Put `trained_weights` back, also into the fp32 copy that the engine steps on. Every process has to call it.

    Raises KeyError unless `state` holds every weight that trains, and nothing else.
    """
    if not stage(run.accelerator):
        load_trained_state(run.lm, state)
        return
    if differing := state.keys() ^ trained_state(run.lm).keys():
        raise KeyError(f"{len(differing)} weights differ in name, first {min(differing)}")
    put = _deepspeed().utils.safe_set_full_fp32_param
    with torch.no_grad():
        for name, buffer in run.lm.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        for name, weight in run.lm.named_parameters():
            if name in state:
                value = state[name].to(weight.device)
                with _gathered(run.accelerator, [weight], writer=0):
                    weight.copy_(value)
                put(weight, value)


@contextmanager
def whole_weights(run: Any) -> Iterator[None]:
    """Within it `run.lm` has whole weights on every process, to be read and saved. Every process has to enter it."""
    with _gathered(run.accelerator, list(run.lm.parameters())):
        yield


def _gathered(accelerator: Any, weights: Sequence[Tensor], writer: int | None = None) -> AbstractContextManager[Any]:
    if stage(accelerator) < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(weights, modifier_rank=writer)


def _link(zero: Any) -> None:
    """Tell the weights where their share of the optimizer's state is. ZeRO-1 and 2 do it in the first group's first
    step, when the second group has none yet (DeepSpeed 0.19.8).
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    return sys.modules["deepspeed"]  # Accelerate has imported it


def _announced(engine: str) -> bool:
    return os.environ.get(ANNOUNCED[engine], "false").lower() == "true"
