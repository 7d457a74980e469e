"""Encoded items to tensors: right-padded inputs, and the flat list of positions that predict an answer token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.images import Picture, stacked
from llm_unlearn.data.tokenise import Encoded, Item, only_texts


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of B items. No attention mask: with right padding and causal attention no real token ever sees a pad.

    Attributes:
        inputs: (B, T) token ids, the last answer token left out, since nothing is predicted from it; or (B, C, H, W)
            images, each of which predicts one token, its class.
        index_N: (N,) positions in the flattened (B * T) input whose next token is an answer token.
        labels_N: (N,) those answer tokens.
        row_N: (N,) which of the B items each belongs to.
    """

    inputs: Tensor
    index_N: Tensor
    labels_N: Tensor
    row_N: Tensor

    @property
    def n_rows(self) -> int:
        """B, the number of items."""
        return self.inputs.shape[0]

    @property
    def n_tokens(self) -> int:
        """N, the number of answer tokens."""
        return self.labels_N.shape[0]

    @property
    def n_inputs(self) -> int:
        """How many tokens, padding included, or images a model reads."""
        return self.n_rows if self.inputs.is_floating_point() else self.inputs.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.inputs, self.index_N, self.labels_N, self.row_N)))


def collate(items: Sequence[Item], pad_id: int = 0) -> Batch:
    """Pad B texts on the right, or stack B images. Which id pads is of no consequence to any result."""
    if isinstance(items[0], Picture):
        return Batch(*stacked(items))
    return _padded(only_texts(items), pad_id)


def _padded(items: Sequence[Encoded], pad_id: int) -> Batch:
    lengths = np.asarray([len(item.ids) - 1 for item in items])
    counts = np.asarray([item.n_answer for item in items])
    width = int(lengths.max())
    inputs = np.full((len(items), width), pad_id, dtype=np.int64)
    for i, item in enumerate(items):
        inputs[i, : lengths[i]] = item.ids[:-1]
    row = np.repeat(np.arange(len(items)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.asarray([item.start - 1 for item in items])
    labels = np.concatenate([item.ids[item.start :] for item in items])
    index = row * width + starts[row] + within
    return Batch(torch.from_numpy(inputs), torch.from_numpy(index), torch.from_numpy(labels), torch.from_numpy(row))


def length_sorted(items: Sequence[Item], max_tokens: int) -> Iterator[list[int]]:
    """Yield groups of item numbers of similar length, longest first, each at most `max_tokens` once padded (one item
    always fits).
    """
    order = sorted(range(len(items)), key=lambda i: (-items[i].n_inputs, i))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * (items[group[0]].n_inputs + 1) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
