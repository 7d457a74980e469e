"""What a run took: updates, tokens, FLOPs, seconds, memory, and the share of what training gold took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_unlearn.data.batches import Batch
from llm_unlearn.files import read_json
from llm_unlearn.models.pretrained import read_origin, split_reference
from llm_unlearn.usage import resident_peak

Cost = dict[str, float | None]
PEAKS = ("peak_bytes", "gpu_peak_bytes")
SHARED = (*PEAKS, "seconds", "train_seconds", "evaluation_seconds")  # processes side by side: not their sum


def flops(parameters: int, trained: int, forward: int, backward: int) -> int:
    """Return the floating-point operations of passes over tokens: 2 N a token forward; backward 2 N for the gradients
    of activations and 2 N_trained for those of weights, so 4 N if all are trained and about 2 N under LoRA.

    After Kaplan et al. 2020 (arXiv:2001.08361, section 2.1), whose 6 N D this is: N leaves out embeddings and the
    output head, and attention's products of activations are not counted. Nor is it counted that a pass may recompute
    activations (gradient checkpointing), run its last layer only where an answer is predicted, or end at the layer a
    loss reads.

    Args:
        parameters: N of the model, see `counted_parameters`.
        trained: N_trained, how many of them get gradients.
        forward: tokens of forward passes, padding included.
        backward: those that a backward pass followed.
    """
    return 2 * parameters * forward + 2 * (parameters + trained) * backward


def counted_parameters(lm: Any) -> tuple[int, int]:
    """Return (N, N_trained) of a language model: parameters without embedding tables and without the output head.

    Of an image classifier N is the multiply-adds of one image, head included, all of them trained: a convolution uses a
    weight many times. Its "tokens" are images.
    """
    if hasattr(lm, "macs_per_image"):
        return lm.macs_per_image(), lm.macs_per_image()
    tables = [*(m for m in lm.modules() if isinstance(m, nn.Embedding)), lm.get_output_embeddings()]
    left_out = {id(p) for module in tables if module is not None for p in module.parameters()}
    counted = [p for p in lm.parameters() if id(p) not in left_out]
    return sum(p.numel() for p in counted), sum(p.numel() for p in counted if p.requires_grad)


def count_pass(tokens: Counter[str], batch: Batch) -> None:
    """Count a forward pass over a batch, and the backward pass that follows if gradients are recorded."""
    tokens["forward"] += batch.n_inputs
    tokens["backward"] += batch.n_inputs if torch.is_grad_enabled() else 0


def training_flops(reference: str | None) -> float | None:
    """Return what training the model of a run (`run@kind`, or its folder) took: its run's FLOPs, in proportion to the
    model's step, since every step draws as many items. None for what is no run of ours, or one that did not count them.
    """
    if reference is None or not (Path(run := split_reference(reference)[0]) / "run.json").exists():
        return None
    result = read_json(Path(run) / "run.json")
    total, steps = result.get("cost", {}).get("flops"), result.get("step", result.get("steps"))
    step = read_origin(reference).get("step")
    return total * step / steps if total and steps and step else None


def start_clock() -> tuple[float, float]:
    """Return (wall, CPU) seconds to count from, and forget the GPU's peak memory until now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter(), time.process_time()


class Meter:
    """Callback that carries what a run has used over from the processes before it to the one that ends it.

    What a killed process did after its last checkpoint is not counted: it is done again.

    Args:
        tokens: the task's counter, by "forward", "backward" and "reference".
        started: of `start_clock`.
    """

    def __init__(self, tokens: Counter[str], started: tuple[float, float]) -> None:
        self.tokens, self.started = tokens, started
        self.before: Mapping[str, float] = {}

    def __call__(self, run: Any) -> None:
        """Do nothing: only its state matters."""

    def used(self) -> dict[str, float]:
        """Return seconds (of the clock, of CPUs, for which a GPU was held) and the largest memory so far."""
        cuda = torch.cuda.is_available()
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        now = {
            "seconds": wall,
            "cpu_seconds": cpu,
            "gpu_seconds": wall if cuda else 0.0,
            "peak_bytes": float(resident_peak()),
            "gpu_peak_bytes": float(torch.cuda.max_memory_allocated()) if cuda else 0.0,
        }
        return {
            name: (max if name in PEAKS else sum)((value, self.before.get(name, 0.0))) for name, value in now.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tokens, seconds and memory so far."""
        return {"tokens": dict(self.tokens), "used": self.used()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`; passes made to get ready again are not counted twice."""
        self.tokens.clear()
        self.tokens.update(state["tokens"])
        self.before = state["used"]

    def cost(self, run: Any, watch: Any = None, gold: str | None = None) -> Cost:
        """Return what the run took, of all its processes; every one of them has to call it.

        `updates`; `train_seconds`, `evaluation_seconds` and `seconds` in all, of the clock; `cpu_seconds`,
        `gpu_seconds` for which a GPU was held; `peak_bytes` resident since the process began, `gpu_peak_bytes` of
        tensors; `forward_tokens` and `backward_tokens` of training, `reference_tokens`, `evaluation_tokens`, padding
        included; `flops` of training, `reference_flops`, `evaluation_flops` (see `flops`); `share_of_gold`: the first
        two over what training gold took, None where that is not known.

        Args:
            run: the finished Run.
            watch: the callback that evaluated, with its `tokens` and `seconds`.
            gold: gold model, as `run@kind` or its run's folder.
        """
        mine = {
            "train_seconds": run.seconds,
            "evaluation_seconds": 0.0 if watch is None else watch.seconds,
            **self.used(),
            **{f"{name}_tokens": self.tokens[name] for name in ("forward", "backward", "reference")},
            "evaluation_tokens": 0 if watch is None else watch.tokens,
        }
        if run.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            every = gather_object([mine])
            mine = {name: (max if name in SHARED else sum)(one[name] for one in every) for name in mine}
        n, trained = counted_parameters(run.lm)
        spent = {
            "flops": flops(n, trained, mine["forward_tokens"], mine["backward_tokens"]),
            "reference_flops": flops(n, trained, mine["reference_tokens"], 0),
            "evaluation_flops": flops(n, trained, mine["evaluation_tokens"], 0),
        }
        whole = training_flops(gold)
        share = None if not whole else (spent["flops"] + spent["reference_flops"]) / whole
        return {"updates": run.step, **mine, **spent, "share_of_gold": share}
