"""Tasks of the loop that need nothing but a model and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from llm_unlearn.data.batches import Batch, collate
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.methods.fitting import FitLoss, cross_entropy
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.order import rank_slice, step_items


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, how many there are, and in how many micro-batches it works through its share
    of a step.
    """

    rank: int = 0
    world: int = 1
    n_micro: int = 1


def n_micro_batches(batch_size: int, micro_batch: int | None, world: int) -> int:
    """Return how many forward passes a process makes per step. Raises UserError when the batch does not divide among
    the processes.
    """
    if batch_size % world:
        raise UserError(
            f"loop.batch_size={batch_size} does not divide among {world} processes; choose a multiple of {world}"
        )
    share = batch_size // world
    if micro_batch is None or micro_batch >= share:
        return 1
    if share % micro_batch:
        raise UserError(f"loop.micro_batch={micro_batch} does not divide the {share} items of a process and step")
    return share // micro_batch


class FitTask:
    """Fitting the answers: fine-tuning and grokking. The step's loss is the mean over all answer tokens of the global
    batch of `objective`, the negative log-likelihood unless another is given.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batch_size: int,
        seed: int,
        place: Place,
        pad_id: int = 0,
        objective: FitLoss = cross_entropy,
    ) -> None:
        if not items:
            raise UserError("the training set is empty; check data and scenario")
        self.items, self.batch_size, self.seed, self.place, self.pad_id = items, batch_size, seed, place, pad_id
        self.objective = objective
        self.n_micro = place.n_micro
        self.tokens = Counter[str]()

    def drawn(self, step: int) -> dict[str, tuple[np.ndarray, Sequence[Item]]]:
        """Return the items of a step over all processes: {"train": ((batch,) numbers, what they number)}."""
        return {"train": (step_items(len(self.items), self.batch_size, step, self.seed), self.items)}

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, float]]:
        """Yield (batch, its share of the step's answer tokens)."""
        order, _ = self.drawn(step)["train"]
        total = sum(self.items[i].n_answer for i in order)
        for k in range(self.n_micro):
            batch = collate(
                [self.items[i] for i in rank_slice(order, self.place.rank, self.place.world, k, self.n_micro)],
                self.pad_id,
            )
            yield batch, batch.n_tokens / total

    def loss(self, model: nn.Module, micro: tuple[Batch, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's part of the mean answer-token loss."""
        batch, share = micro
        batch = batch.to(next(model.parameters()).device)
        count_pass(self.tokens, batch)
        return self.objective(model(batch.inputs, batch.index_N), batch.labels_N) * share, {}
