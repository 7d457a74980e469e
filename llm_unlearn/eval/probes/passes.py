"""Passes over items that several probes make: losses, gradients, logits, features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.batches import Batch, Item, collate, length_sorted
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import MAX_TOKENS
from llm_unlearn.methods.losses import mean_by_row, token_logprobs

TokenLoss = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), labels (N,) -> (N,) or (N, ...)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log p of each answer token: (N,) nats."""
    return -token_logprobs(logits_NV, labels_N)[0]


def margin_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Minus the margin of each answer token, z_y - mean of the other logits: (N,).

    Its gradient does not vanish where the answer is certain, as that of cross-entropy does by the factor 1 - p.
    """
    logits_NV = logits_NV.float()
    right_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    return (logits_NV.sum(-1) - right_N) / (logits_NV.shape[-1] - 1) - right_N


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches(model: torch.nn.Module, items: Sequence[Item], max_tokens: int = MAX_TOKENS) -> Iterator[Batch]:
    """Yield the items as batches on the model's device, longest first. Raises UserError for no items."""
    if not items:
        raise UserError("no items to look at; the split is empty for this data and request")
    device = next(model.parameters()).device
    for group in length_sorted(items, max_tokens):
        yield collate([items[i] for i in group]).to(device)


def trained_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights a gradient is taken of, by name without the wrapper's prefix; tied ones once."""
    return {name.removeprefix("lm."): p for name, p in model.named_parameters() if p.requires_grad}


def mean_gradients(model: Any, items: Sequence[Item], losses: Sequence[TokenLoss]) -> list[list[Tensor]]:
    """Return, for each loss, the gradient of its mean over all answer tokens: one float32 tensor per trained weight.

    One forward pass for all losses, in the mode the model is in.
    """
    weights = list(trained_weights(model).values())
    sums = [[torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in losses]
    total = sum(item.n_answer for item in items)
    for batch in batches(model, items):
        logits_NV = model(batch.inputs, batch.index_N)
        for k, loss in enumerate(losses):
            whole = loss(logits_NV, batch.labels_N).sum() / total
            grads = torch.autograd.grad(whole, weights, allow_unused=True, retain_graph=k < len(losses) - 1)
            for mine, grad in zip(sums[k], grads, strict=True):
                if grad is not None:
                    mine += grad
    return sums


@torch.no_grad()
def answer_values(model: Any, items: Sequence[Item], value: TokenLoss) -> Tensor:
    """Return value(logits, labels) of all answer tokens: (N, ...) in the order of `batches`, one batch at a time.

    In eval mode; logits are float32.
    """
    with evaluating(model):
        return torch.cat([value(model(b.inputs, b.index_N).float(), b.labels_N) for b in batches(model, items)])


@torch.no_grad()
def features(model: Any, items: Sequence[Item], layer: int) -> Tensor:
    """Return a layer's output for each item, in order: (n, H) float64, mean over the item's answer positions.

    Raises UserError for a layer the model does not have.
    """
    check_layer(model, layer)
    out: list[Tensor] = [torch.empty(0)] * len(items)
    device = next(model.parameters()).device
    for group in length_sorted(items, MAX_TOKENS):
        batch = collate([items[i] for i in group]).to(device)
        hidden_NH = model(batch.inputs, batch.index_N, layer).double()
        means = [mean_by_row(column, batch.row_N, batch.n_rows) for column in hidden_NH.unbind(1)]
        for i, row in zip(group, torch.stack(means, 1), strict=True):
            out[i] = row
    return torch.stack(out)


def check_layer(model: Any, layer: int) -> None:
    """Raise UserError for a layer the model does not have."""
    last = n_layers(model) - 1
    if not 0 <= layer <= last:
        raise UserError(f"layer {layer}: the model has layers 0 to {last}; give one of them")


def n_layers(model: Any) -> int:
    """Return how many layers `model(..., layer=k)` has, k from 0. Raises UserError for a model that does not say."""
    config = getattr(model.lm, "config", None)
    for place, name in ((model, "n_layers"), (model.lm, "n_layers"), (config, "num_hidden_layers")):
        if isinstance(n := getattr(place, name, None), int):
            return n
    raise UserError(f"{type(model.lm).__name__}: does not say how many layers it has (config.num_hidden_layers)")
