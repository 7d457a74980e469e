"""Size of weights, scale of logits, and rank of weights and features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.batches import Item
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.gradients import groups_of
from llm_unlearn.eval.probes.passes import answer_values, trained_weights


def weight_norms(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Return {group of weights: {"norm" (Euclidean), "rms" (per weight), "weights" (how many)}}; groups as `groups_of`.

    Trained weights only, tied ones once.
    """
    squares: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for name, w in trained_weights(model).items():
        for group in groups_of(name):
            squares[group] += float(w.detach().double().square().sum())
            counts[group] += w.numel()
    return {
        g: {"norm": square**0.5, "rms": (square / counts[g]) ** 0.5, "weights": counts[g]}
        for g, square in squares.items()
    }


def logit_scale(model: Any, items: Sequence[Item]) -> dict[str, float]:
    """Return how far apart logits are at answer positions.

    Returns:
        {"std" (over the vocabulary, mean over tokens), "margin" (z_y - largest other logit, mean), "margin_mean" (z_y -
        mean of the other logits, mean), "loss" (nats per token), "tokens"}.
    """
    values_N4 = answer_values(model, items, _scales)
    means = values_N4.double().mean(0).tolist()
    return {**dict(zip(("std", "margin", "margin_mean", "loss"), means, strict=True)), "tokens": len(values_N4)}


def effective_rank(matrix: Tensor) -> float:
    """Return exp(H(s / sum s)) of a matrix' singular values s: from 1 (rank one) to min(shape) (all equal); nan for 0.

    Source: Roy and Vetterli 2007, EUSIPCO, definition 1.

    Args:
        matrix: (m, n), or a convolution's (out, in, height, width), read as (out, the rest).
    """
    if matrix.dim() < 2:
        raise UserError(f"effective rank is of a matrix, got shape {tuple(matrix.shape)}")
    s = torch.linalg.svdvals(matrix.detach().flatten(1).double())
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def effective_ranks(model: torch.nn.Module) -> dict[str, float]:
    """Return the effective rank of every trained matrix and convolution, by name."""
    return {name: effective_rank(w) for name, w in trained_weights(model).items() if w.dim() >= 2}


def feature_rank(features_nH: Tensor) -> float:
    """Return the effective rank of features, the mean over rows taken off: at most min(n - 1, H)."""
    if len(features_nH) < 2:
        raise UserError(f"the rank of features needs at least 2 rows, got {len(features_nH)}; raise --items")
    return effective_rank(features_nH - features_nH.mean(0))


def _scales(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    right_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    others_NV = logits_NV.scatter(-1, labels_N[:, None], float("-inf"))
    mean_N = (logits_NV.sum(-1) - right_N) / (logits_NV.shape[-1] - 1)
    columns = (
        logits_NV.std(-1, correction=0),
        right_N - others_NV.amax(-1),
        right_N - mean_N,
        logits_NV.logsumexp(-1) - right_N,
    )
    return torch.stack(columns, 1)
