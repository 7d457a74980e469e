"""What an evaluation costs: time, memory, tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_unlearn.usage import resident_peak

SUMMED = ("cpu_seconds", "forward_tokens", "generated_tokens")
Cost = dict[str, float]


@contextmanager
def metered(lm: nn.Module) -> Iterator[Callable[[], Cost]]:
    """Count within the block what a model does; the function it gives returns the cost so far.

    Cost: `seconds` and `cpu_seconds` of this process, `peak_bytes` (largest memory: of the GPU's tensors if the model
    is on one, else resident memory of the process since it started), `forward_tokens` (fed to the model, padding
    included; for a classifier, images) and `generated_tokens` (fed to it one at a time).
    """
    tokens = {"forward_tokens": 0, "generated_tokens": 0}

    def count(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ids = inputs[0]
        tokens["forward_tokens"] += len(ids) if ids.is_floating_point() else ids.numel()
        tokens["generated_tokens"] += ids.numel() if ids.dim() == 2 and ids.shape[1] == 1 else 0

    embeddings: Any = lm.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    cuda = next(lm.parameters()).is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    hook = embeddings.register_forward_pre_hook(count)
    wall, cpu = time.perf_counter(), time.process_time()

    def cost() -> Cost:
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": float(torch.cuda.max_memory_allocated() if cuda else resident_peak()),
            **{name: float(n) for name, n in tokens.items()},
        }

    try:
        yield cost
    finally:
        hook.remove()


def together(costs: Sequence[Mapping[str, float]]) -> Cost:
    """Return the cost of processes that worked side by side: what was used adds up, time and memory are the largest."""
    return {name: (sum if name in SUMMED else max)(c[name] for c in costs) for name in costs[0]}


def in_turn(costs: Sequence[Mapping[str, float]]) -> Cost:
    """Return the cost of what was done one after the other: all but memory adds up."""
    return {name: (max if name == "peak_bytes" else sum)(c[name] for c in costs) for name in costs[0]}
