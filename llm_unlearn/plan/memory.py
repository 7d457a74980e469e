"""Memory of one process under each engine.

What is divided among N processes follows Rajbhandari et al. 2020 (arXiv:1910.02054, section 5): ZeRO-1 divides the
optimizer state, ZeRO-2 the gradients too, ZeRO-3 (and FSDP2 with every decoder layer a unit) also the weights, which
are gathered layer by layer. Working buffers are those of the shipped launch configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from llm_unlearn.plan.activations import Pass, heap_holes, step_peak
from llm_unlearn.plan.shape import Shape
from llm_unlearn.plan.wrapped import AVERAGES, wrapped_peak

Engine = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
BUCKET = 50_000_000  # elements of DeepSpeed's reduce and gather buckets in recipes/launch


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what they are for, at the worst moment of a step; `saving`, `loading` and `ready` (a
    mask or targets made before the first step) are peaks of their own, which on a CPU fall on the same memory, and so
    do the data and holes in glibc's heap.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    reference: int
    extra: int
    buffers: int
    data: int
    heap: int
    saving: int
    loading: int
    ready: int

    @property
    def step(self) -> int:
        """Peak of a training step."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.reference + self.extra
        ) + self.buffers

    @property
    def peak(self) -> int:
        """Data and the largest of step (with the holes it leaves), saving, loading and getting ready: what a CPU needs.
        An accelerator needs `step`, or `ready` where that is more.
        """
        return self.data + max(self.step + self.heap, self.saving, self.loading, self.ready)

    def to_json(self) -> dict[str, int]:
        """Return every part, the step's total and the peak, in bytes."""
        return {**asdict(self), "step": self.step, "peak": self.peak}


@dataclass(frozen=True)
class Beside:
    """What a run needs beside model, optimizer and the passes of a step.

    Attributes:
        reference: a frozen copy of the start model (none under LoRA).
        untrained: a frozen model of the same size that was never trained.
        grokfast: a running mean of the gradients.
        best: the best weights so far (on the CPU).
        pretrained: weights come from files, which are mapped while they are copied.
        gold: a gold model is read before the first step.
        frozen: share of the trained weights that a mask freezes; None without a mask.
        wrapper: what makes a step's gradient, a key of wrapped.STAGES, or orthograd.
        moments: how many numbers per weight the optimizer remembers.
        ready: bytes that making targets or a mask takes before the first step, beside the weights and the reference.
    """

    reference: bool = False
    untrained: bool = False
    grokfast: bool = False
    best: bool = False
    pretrained: bool = False
    gold: bool = False
    frozen: float | None = None
    wrapper: str | None = None
    moments: int = 2
    ready: int = 0

    @property
    def whole(self) -> bool:
        """Whether whole weights and gradients are needed, which engines that shard them do not have."""
        return self.wrapper is not None or self.frozen is not None


def memory(
    shape: Shape,
    updates: Sequence[Sequence[Pass]],
    engine: Engine,
    world: int,
    beside: Beside | None = None,
    *,
    n_micro: int = 1,
    data: int = 0,
    glibc: bool = False,
) -> Memory:
    """Return the memory of one of `world` processes.

    Args:
        shape: the model.
        updates: for each sort of update, the forward passes of a process' largest micro-batch.
        engine: who holds what; `one` is for a world of one.
        world: number of processes.
        beside: what else is held.
        n_micro: micro-batches of a step.
        data: bytes of the encoded items and the rows they come from.
        glibc: whether CPU tensors come from glibc's heap as it is by default.
    """
    beside, trained = beside or Beside(), shape.trainable
    shape = replace(shape, trainable=_reached(shape, updates))
    w, p, t = shape.weight_bytes, shape.parameters, shape.trainable
    split_weights, split_gradients, split_optimizer = SPLIT[engine]
    deepspeed = engine.startswith("zero")
    if beside.wrapper is None:
        peaks = [step_peak(shape, passes, gradients_kept=n_micro > 1) for passes in updates]
    else:
        sizes = {"trained": trained, "n_micro": n_micro, "world": world}
        peaks = [wrapped_peak(shape, passes, beside.wrapper, **sizes) for passes in updates]
    activations, gradients = max(peaks, key=sum)
    # DeepSpeed holds an fp32 copy of what it updates, and fp32 moments; in bf16 the model itself is 16-bit
    in_16_bit = deepspeed and shape.autocast_bytes is not None
    state = (4 * (1 + beside.moments) if deepspeed else beside.moments * w) * t
    weights = _share((2 if in_16_bit else w) * p, world, split_weights)
    optimizer = _share(state, world, split_optimizer)
    held = weights + optimizer
    copy = w * p * ((beside.reference and not shape.adapted) + beside.untrained)
    remembered, kept = _remembered(shape, beside, trained)
    if deepspeed or split_gradients:
        gradients = max(gradients, w * t)
    # only what is trained is saved
    saved = _share((2 if in_16_bit else w) * trained, world, split_weights) + optimizer + remembered
    return Memory(
        weights=weights,
        gradients=_share(gradients // (2 if in_16_bit else 1), world, split_gradients),
        optimizer=optimizer,
        activations=activations,
        reference=_share(copy, world, split_weights),
        extra=remembered + kept,
        buffers=_buffers(shape, engine),
        data=data,
        heap=max(heap_holes(shape, passes) for passes in updates) if glibc else 0,
        saving=held + remembered + kept + copy + saved,
        loading=(1 + beside.pretrained + beside.gold) * w * p,
        ready=w * p + copy + beside.ready if beside.ready else 0,
    )


def _remembered(shape: Shape, beside: Beside, trained: int) -> tuple[int, int]:
    """Bytes held from step to step: what the saved state has of them, and the values of masked weights, which are in
    the weights already.
    """
    w = shape.weight_bytes
    remembered = w * shape.trainable if beside.grokfast else 0
    remembered += 4 * trained if beside.wrapper in AVERAGES else 0
    remembered += w * trained if beside.best else 0
    if beside.frozen is None:
        return remembered, 0
    return remembered + trained, round(w * trained * beside.frozen)  # a byte a weight says which are frozen


SPLIT: dict[Engine, tuple[bool, bool, bool]] = {  # weights, gradients, optimizer
    "one": (False, False, False),
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}


def _reached(shape: Shape, updates: Sequence[Sequence[Pass]]) -> int:
    """Trained elements that get a gradient at all: AdamW makes no state for those above what every loss reads."""
    passes = [work for each in updates for work in each]
    depths = [shape.layers if work.depth is None else work.depth for work in passes]
    if any(work.reads != "hidden" for work in passes):
        return shape.trainable
    head = 0 if shape.tied or not shape.base_trains else shape.head_parameters
    return shape.trainable - (shape.layers - max(depths)) * shape.layer_trainable - head


def _share(size: int, world: int, split: bool) -> int:
    return -(-size // world) if split else size


def _buffers(shape: Shape, engine: Engine) -> int:
    """Bytes an engine works in: DDP's gradient buckets; the units gathered at once (one in use, the next on its way,
    embeddings and head throughout), under FSDP2 with the last layer, which is no unit of its own, and their whole
    gradients; DeepSpeed's two reduce buckets.
    """
    w = shape.weight_bytes
    bucket = 2 * w * min(BUCKET, shape.trainable)
    gathered = w * (2 * shape.layer_parameters + shape.other_parameters)
    if engine == "ddp":
        return w * shape.trainable
    if engine == "fsdp2":
        whole = min(3 * shape.layer_parameters + shape.other_parameters, shape.parameters)
        return w * (whole + min(2 * shape.layer_trainable + shape.other_trainable, shape.trainable))
    if engine == "zero3":
        return gathered + bucket
    return bucket if engine in ("zero1", "zero2") else 0
