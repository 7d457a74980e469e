"""How large a run's batches get, and the sorts of updates they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_unlearn.data.tokenise import Item
from llm_unlearn.plan.activations import BatchShape, Pass

LOOKED_AT = 200  # steps whose batches are formed, to know how long they get


@dataclass(frozen=True)
class Update:
    """A sort of optimizer step: the passes of a process' largest micro-batch and of a mean one, tokens of a step over
    all processes without padding, and the share of the run's steps that are of this sort.
    """

    largest: Sequence[Pass]
    typical: Sequence[Pass]
    real_tokens: float
    share: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """The largest micro-batch, a mean one, and the tokens of a step without padding."""

    largest: BatchShape
    mean: BatchShape
    real_tokens: float


def batch_sizes(items: Sequence[Item], drawn: np.ndarray, share: int) -> Sizes:
    """Return the sizes of the micro-batches that steps are divided into.

    Args:
        items: what is drawn from.
        drawn: (steps, batch) numbers of items.
        share: items of a micro-batch, on one process.
    """
    length = np.array([item.n_inputs for item in items])
    answer = np.array([item.n_answer for item in items])
    numbers = drawn.reshape(-1, share)
    widths, answers = length[numbers].max(1), answer[numbers]
    worst = int(np.argmax(widths * share + answers.sum(1)))
    largest = BatchShape(share, int(widths[worst]), int(answers[worst].sum()), int(answers[worst].max()))
    mean = replace(
        largest,
        width=round(float(widths.mean())),
        answers=round(float(answers.sum(1).mean())),
        longest=round(float(answers.max(1).mean())),
    )
    return Sizes(largest, mean, float(length[numbers].sum()) / len(drawn))
