"""LoRA adapters through peft."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from llm_unlearn.config import Config
from llm_unlearn.errors import UserError


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear layers."""

    rank: int = Field(default=8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=16.0, gt=0, description="Scale: the update is alpha / rank * B A.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="Names of the layers that get one, or all-linear."
    )


def add_lora(lm: Any, config: LoraConfig) -> Any:
    """Return the model wrapped by peft, its own weights frozen. It computes what it did before: every B starts at zero.

    Raises UserError for targets the model does not have, and for a model that takes no adapters.
    """
    if not getattr(lm, "supports_lora", True):
        raise UserError(f"lora: {type(lm).__name__} trains all its weights and takes no adapters; leave it out")
    from peft import LoraConfig as PeftLora

    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    try:
        return wrap(
            lm,
            PeftLora(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft takes fractions too
                lora_dropout=config.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UserError(f"lora.targets={config.targets}: {' '.join(str(error).split())[:160]}") from None


def wrap(lm: Any, config: Any) -> Any:
    """Return the model with the adapters that peft's own config describes."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft asks for what transformers 5.23 gave another name, and tells of GPT-2's layers what it settles itself
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        return get_peft_model(lm, config)


def is_adapted(lm: Any) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(lm, "merge_and_unload")


def merge_lora(lm: Any) -> Any:
    """Return the plain model with the adapters added into its weights, or the model itself if it has none."""
    return lm.merge_and_unload() if is_adapted(lm) else lm


def check_adapters_moved(lm: Any) -> None:
    """Refuse adapters that training has left where they began, every B at zero: such a model is its base, and saving it
    would call that unlearned. A model without adapters passes.
    """
    ends = [weight for name, weight in lm.named_parameters() if "lora_B" in name]
    if ends and not any(bool(weight.any()) for weight in ends):
        raise UserError(
            "no adapter has moved from its start (every lora_B is zero), so this is still the start model and it is "
            "not saved; likely the loss reads no layer of lora.targets, or optim.lr is too small"
        )


def trained_state(lm: Any) -> dict[str, Tensor]:
    """Return a model's state dict less its frozen weights: under LoRA a fraction of it, else all."""
    frozen = {name for name, weight in lm.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: value for name, value in lm.state_dict().items() if name not in frozen}


def load_trained_state(lm: Any, state: Mapping[str, Tensor]) -> None:
    """Put `trained_state` back. Raises KeyError unless it holds every weight that trains, and nothing else."""
    if differing := state.keys() ^ trained_state(lm).keys():
        raise KeyError(f"{len(differing)} weights differ in name, first {min(differing)}")
    lm.load_state_dict(state, strict=False)
