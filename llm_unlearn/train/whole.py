"""What tasks need that make a step's whole gradient themselves (see loop.FillsGradients), maybe at other weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.errors import UserError
from llm_unlearn.train.engine import divided, engine_name


def check_whole_gradients(what: str, cure: str, accelerator: Any) -> None:
    """Refuse a run whose gradients are not whole, or are scaled, when `what` reads them. Raises UserError."""
    if divided(accelerator):
        raise UserError(
            f"{what} needs whole gradients, and {engine_name(accelerator)} divides them; launch with one process or "
            f"plain data parallel, or {cure}"
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            f"{what} with loop.precision=fp16: fp16's gradients are scaled when it reads them; choose bf16 or no"
        )


@contextmanager
def shifted(weights: Sequence[Tensor], shift: Sequence[Tensor]) -> Iterator[None]:
    """Add `shift` to the weights for a while; the very bits they had before come back."""
    before = [w.detach().clone() for w in weights]  # adding and subtracting would not give the same bits back
    with torch.no_grad():
        for weight, by in zip(weights, shift, strict=True):
            weight.add_(by.to(weight.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


@contextmanager
def same_draws(drawn: MutableMapping[Hashable, list[Tensor]], key: Hashable, device: torch.device) -> Iterator[None]:
    """Draw under a key what was drawn under it before: two looks at one loss would else differ by their dropout masks.

    `drawn` remembers the states of the generators; a second look leaves the generators as it found them.
    """
    cuda = [device] if device.type == "cuda" else []
    if key not in drawn:
        drawn[key] = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
        yield
        return
    with torch.random.fork_rng(devices=cuda):
        cpu, *others = drawn[key]
        torch.set_rng_state(cpu)
        for where, state in zip(cuda, others, strict=True):
            torch.cuda.set_rng_state(state, where)
        yield
