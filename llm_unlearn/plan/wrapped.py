"""Memory of a step whose gradient a function of `methods.gradients` makes: whole float32 gradients, several at once.

Counted from the wrappers' own code, local names included: what a name still refers to is not given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llm_unlearn.plan.activations import Pass, step_peak
from llm_unlearn.plan.shape import Shape


@dataclass(frozen=True)
class Stage:
    """A gradient being taken: of which term, beside how many others, and whether at other weights than the step's."""

    term: str
    held: int
    shifted: bool = False


# the stages of a step, and the most gradients at once between them; a moving average is in Memory.extra
STAGES: Mapping[str, tuple[tuple[Stage, ...], int]] = {
    "gru": ((Stage("forget", 0), Stage("retain", 1)), 6),
    # SAM in training: one loss, which goes by the name of the passes' term
    "nearby_worst": ((Stage("forget", 0), Stage("forget", 2, shifted=True)), 2),
    "sam": ((Stage("forget", 0), Stage("forget", 2, shifted=True), Stage("retain", 1)), 4),
    "orthopenalty": (
        (
            Stage("forget", 0),
            Stage("retain", 1),
            Stage("forget", 5, shifted=True),
            Stage("retain", 6, shifted=True),
        ),
        8,
    ),
}
BY_ITEM = "orthograd"
AVERAGES = frozenset({"gru"})  # wrappers that remember one gradient


def wrapped_peak(
    shape: Shape, passes: Sequence[Pass], wrapper: str, *, trained: int, n_micro: int, world: int
) -> tuple[int, int]:
    """Return (activations, gradients) in bytes at the moment of a wrapped step when their sum is largest.

    `passes` name their terms; `trained` are the elements that gradients are kept for, reached by a loss or not.
    """
    whole = 4 * trained
    if wrapper == BY_ITEM:
        return _item_peak(shape, passes, whole, n_micro, world)
    stages, most = STAGES[wrapper]
    moments = [(0, most * whole)]
    for stage in stages:
        own = [work for work in passes if work.term == stage.term]
        beside = (stage.held + 1) * whole + (shape.weight_bytes * trained if stage.shifted else 0)
        moments.append(_taken(shape, own, beside, n_micro))
    return max(moments, key=sum)


def _item_peak(shape: Shape, passes: Sequence[Pass], whole: int, n_micro: int, world: int) -> tuple[int, int]:
    """The same with a gradient per item of the retain batch, of all processes together once each has made its own."""
    forget = [work for work in passes if work.term == "forget"]
    retain = [work for work in passes if work.term == "retain"]
    own = retain[0].batch.rows * n_micro
    every = own * world
    single = [replace(work, batch=replace(work.batch, rows=1, answers=work.batch.longest)) for work in retain]
    stacked = 2 * own + (every if world > 1 else 0)
    gram = 2 * 8 * every * shape.largest  # both factors of a tensor's Gram matrix in float64
    return max(
        _taken(shape, forget, whole, n_micro),
        _taken(shape, single, (own + 1) * whole, 1),
        (0, (1 + stacked) * whole),
        (0, (1 + every) * whole + gram),
        (0, (5 + every) * whole),
        key=sum,
    )


def _taken(shape: Shape, passes: Sequence[Pass], beside: int, n_micro: int) -> tuple[int, int]:
    """A gradient taken by autograd.grad, which gives all tensors at once; those of the last micro-batch are still there
    while the next is worked through.
    """
    activations, gradients = step_peak(shape, passes, gradients_kept=False)
    last = shape.weight_bytes * shape.trainable if n_micro > 1 else 0
    return activations, gradients + beside + last
