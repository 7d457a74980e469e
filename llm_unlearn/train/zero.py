"""DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), which Accelerate starts. Nothing here imports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llm_unlearn.errors import UserError
from llm_unlearn.models.lora import trained_state
from llm_unlearn.train.config import LoopConfig, OptimConfig

OURS = ("optimizer", "scheduler")  # of DeepSpeed's config: the recipe has its own
OFFLOADED = ("offload_optimizer", "offload_param")


def check_settings(config: Mapping[str, Any], loop: LoopConfig) -> None:
    """Refuse a config of DeepSpeed's that has not been tried or decides what the recipe does. Raises UserError."""
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


def prepare(accelerator: Any, model: nn.Module, optimizer: Any, optim: OptimConfig, loop: LoopConfig) -> tuple:
    """Have DeepSpeed take model and optimizer. Its batch sizes, accumulation and clipping are set to the run's: it
    scales and clips by its own config.
    """
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
    """See `engine.trained_weights`; the fp32 weights that are stepped on."""
    state = trained_state(run.lm)
    weights = dict(run.lm.named_parameters(remove_duplicate=False))
    get = _deepspeed().utils.safe_get_full_fp32_param
    gathered = {}
    for name, value in state.items():
        whole = get(weights[name]) if name in weights else value
        if keep:
            gathered[name] = whole.detach().to("cpu", copy=True)
    return gathered


def put_weights(run: Any, state: Mapping[str, Tensor]) -> None:
    """See `engine.put_weights`; also into the fp32 copy that is stepped on."""
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
    """See `engine.whole_weights`."""
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
