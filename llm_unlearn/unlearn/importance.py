"""What every weight means to a set of items: squared gradients item by item, and the gradient of the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.batches import Batch, collate, length_sorted
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.methods.losses import token_logprobs
from llm_unlearn.models.causal import AnswerModel

MAX_TOKENS = 4_096  # of a padded batch whose gradient is one


def mean_squared_gradients(
    model: AnswerModel, items: Sequence[Item], accelerator: Any
) -> tuple[dict[str, Tensor], int]:
    """Return (name -> mean over items of the squared gradient of log p(answer | question), tokens this process read).

    The diagonal of the empirical Fisher information: observed answers, log-probabilities summed over the answer, one
    forward and backward pass an item, so that nothing is held but one gradient and one float32 sum per weight.
    Trainable parameters only, tied ones once, in eval mode. With several processes each takes every so many-th item,
    and all end with the same sums.

    Raises UserError when a sum is not finite.
    """
    mine = items[accelerator.process_index :: accelerator.num_processes]
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in _trained(model).items()}
    for item in mine:
        for name, grad in _gradient(model, collate([item])).items():
            sums[name] += grad.float().square()
    return _over(sums, len(items), accelerator), sum(item.n_inputs for item in mine)


def mean_gradient(model: AnswerModel, items: Sequence[Item], accelerator: Any) -> tuple[dict[str, Tensor], int]:
    """Return (name -> gradient of the mean loss over all answer tokens, float32; tokens read on this process).

    In eval mode, at the weights as they are, batch by batch. Raises UserError when it is not finite.
    """
    mine = items[accelerator.process_index :: accelerator.num_processes]
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in _trained(model).items()}
    tokens = 0
    for group in length_sorted(mine, MAX_TOKENS):
        batch = collate([mine[i] for i in group])
        tokens += batch.n_inputs
        for name, grad in _gradient(model, batch).items():
            sums[name] -= grad.float()
    return _over(sums, sum(item.n_answer for item in items), accelerator), tokens


def pooled(parts: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Return the mean over the items of several sets, from (mean, number of items) of each."""
    total = sum(n for _, n in parts)
    return {name: torch.stack([mean[name] * (n / total) for mean, n in parts]).sum(0) for name in parts[0][0]}


def _trained(model: AnswerModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradient(model: AnswerModel, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of the summed answer log-probability; one that nothing reads has none."""
    trained = _trained(model)
    batch = batch.to(next(iter(trained.values())).device)
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        logp_N, _ = token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)
        grads = torch.autograd.grad(logp_N.sum(), list(trained.values()), allow_unused=True)
    model.train(was_training)
    return {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}


def _over(sums: dict[str, Tensor], n: int, accelerator: Any) -> dict[str, Tensor]:
    for name, values in sums.items():
        whole = accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values
        sums[name] = whole / n
        if not torch.isfinite(sums[name]).all():
            raise UserError(f"the gradient of '{name}' is not finite; hold the weights in another type (dtype=float32)")
    return sums
