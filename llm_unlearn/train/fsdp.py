"""FSDP2 (torch's `fully_shard`; Zhao et al. 2023, arXiv:2304.11277, sharded weight by weight): every process holds a
share of each weight, its gradient and its optimizer state, and a layer's whole weights only while the layer runs.

The loop divides the model itself wherever the launcher announces FSDP: Accelerate's own FSDP2 does nothing on CPUs. It
only joins the processes, as it does for plain data parallel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from llm_unlearn.errors import UserError
from llm_unlearn.models.lora import load_trained_state, trained_state
from llm_unlearn.train.config import LoopConfig, OptimConfig

NAME = "FSDP2"
ANNOUNCED = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets
REFUSED = {  # setting of the launch file -> why not
    "FSDP_OFFLOAD_PARAMS": "offload has not been tested with the recipes",
    "FSDP_ACTIVATION_CHECKPOINTING": "loop.gradient_checkpointing decides here",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "models that are loaded beside the trained one would be empty on all but the "
    "first process",
}


def asked() -> bool:
    """Return whether the launcher announced FSDP."""
    return _is_set(ANNOUNCED)


def check_settings(loop: LoopConfig, engine: str) -> None:
    """Refuse what is not tried, and a world of one process, in which Accelerate's `engine` is NO. Raises UserError."""
    if engine not in ("MULTI_CPU", "MULTI_GPU"):
        raise UserError(
            f"the launcher set {ANNOUNCED}, but Accelerate chose {engine}, which joins no processes; FSDP2 divides a "
            "model among several: on CPUs launch with ACCELERATE_USE_CPU=true, or launch one process without it"
        )
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"fsdp_version {version}: the recipes divide models by FSDP2 only; set fsdp_version: 2")
    for name, why in REFUSED.items():
        if _is_set(name):
            raise UserError(f"{name.lower()}: {why}; set it to false")
    if loop.precision == "fp16":
        raise UserError("loop.precision=fp16 has not been tested under FSDP2; choose bf16 or no")


@contextmanager
def unannounced() -> Iterator[None]:
    """Within it Accelerate is not told of FSDP: what it creates is for plain data parallel, on CPUs and GPUs alike."""
    said = os.environ.pop(ANNOUNCED, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[ANNOUNCED] = said


def prepare(accelerator: Any, model: nn.Module, optimizer: Any, optim: OptimConfig, loop: LoopConfig) -> tuple:
    """Divide the model in place, and have the optimizer, which has not stepped yet, step on the shares."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = accelerator.prepare_model(model, evaluation_mode=True)  # its device and its precision, no data parallel
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = {weight: name for name, weight in model.named_parameters()}
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
    for layer in reversed(_units(model)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "states"):  # evaluations call it in place of the model; the head stays whole after it
        register_fsdp_forward_method(model, "states")
    alone, shares = optimizer.state_dict()["param_groups"], dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shares[names[weight]] for weight in group["params"]]
        group["fused"] = group["fused"] and not isinstance(optimizer, SGD)  # whose fused step takes no shares
    return model, ShardedOptimizer(accelerator.prepare_optimizer(optimizer), alone, accelerator.is_main_process)


def _units(model: Any) -> list[nn.Module]:
    """Return the layers whose weights are made whole one layer at a time. What belongs to none (embeddings, the head,
    all of an image classifier) is whole as long as the model runs.
    """
    lm = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
    classes = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [module for module in lm.modules() if type(module).__name__ in classes]
    # of a plain Llama's last layer only parts are called, which would find its shares
    return layers[:-1] if getattr(model, "plain_last_layer", False) else layers


class ShardedOptimizer:
    """An optimizer on shares whose state reads as that of one that steps on whole weights.

    Args:
        prepared: torch's optimizer as Accelerate has prepared it.
        groups: `param_groups` of its state dict when its weights were whole.
        keeps: whether this process is one that saves; the others only take part in gathering.
    """

    def __init__(self, prepared: Any, groups: list[dict[str, Any]], keeps: bool) -> None:
        self.prepared, self.groups, self.keeps = prepared, groups, keeps
        self.step, self.zero_grad = prepared.step, prepared.zero_grad

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: what is set in them counts."""
        return self.prepared.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, gathered to the CPU of a process that keeps it. Every process has to call it."""
        gathered = {}
        for number, values in self.prepared.state_dict()["state"].items():
            whole = {name: _whole(value, self.keeps) for name, value in values.items()}
            if self.keeps:
                gathered[number] = whole
        return {"state": gathered, "param_groups": self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back a state dict, of whatever engine it is."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        shares = {
            number: {
                name: _share(value, weights[number]) if torch.is_tensor(value) and value.dim() else value
                for name, value in values.items()
            }
            for number, values in state["state"].items()
        }
        self.prepared.load_state_dict({"state": shares, "param_groups": self.prepared.state_dict()["param_groups"]})


def trained_weights(run: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """See `engine.trained_weights`."""
    _divide_again(run.model)
    gathered = {name: _whole(value, keep) for name, value in trained_state(run.lm).items()}
    return gathered if keep else {}


def put_weights(run: Any, state: Mapping[str, Tensor]) -> None:
    """See `engine.put_weights`."""
    _divide_again(run.model)
    shares = trained_state(run.lm)
    load_trained_state(run.lm, {name: _share(value, shares.get(name)) for name, value in state.items()})


@contextmanager
def whole_weights(run: Any) -> Iterator[None]:
    """See `engine.whole_weights`. Within it `run.lm` is a plain model: a process may call it, or generate, alone."""
    _divide_again(run.model)
    places = [
        (module, name, weight)
        for module in run.model.modules()
        for name, weight in module._parameters.items()
        if _is_share(weight)
    ]
    whole: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module, name, share in places:
        if share not in whole:
            whole[share] = nn.Parameter(share.detach().full_tensor(), requires_grad=share.requires_grad)
        module._parameters[name] = whole[share]
    try:
        with _not_gathering(run.model):
            yield
    finally:
        for module, name, share in places:
            module._parameters[name] = share


@contextmanager
def _not_gathering(model: nn.Module) -> Iterator[None]:
    """Within it no forward pass gathers or frees weights."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    before = []
    for unit in units:
        state = fully_shard.state(unit)  # whose methods the hooks are
        for hooks in (unit._forward_pre_hooks, unit._forward_hooks):
            before.append((hooks, list(hooks.items())))
            for key, hook in before[-1][1]:
                if getattr(hook, "__self__", None) is state:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)  # in their order


def _divide_again(model: nn.Module) -> None:
    """Have every module hold its shares: after an evaluation some are still whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(value: Any, keep: bool) -> Any:
    """Return what a process keeps of a tensor: the whole of it, on the CPU. Of shares every process has to ask."""
    whole = value.full_tensor() if _is_share(value) else value
    return whole.detach().to("cpu", copy=True) if keep and torch.is_tensor(whole) else whole if keep else None


def _share(value: Tensor, like: Any) -> Tensor:
    """Return this process' share of a whole tensor that every process holds, divided as another is."""
    if not _is_share(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_share(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
