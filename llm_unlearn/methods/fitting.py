"""Losses a model is fitted with, by the name a config gives them. Pure functions; torch only.

Suffixes: N = answer tokens of the batch laid end to end (one per image), V = vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from llm_unlearn.methods.checks import not_empty
from llm_unlearn.methods.losses import nll, token_logprobs

__all__ = ["FIT_LOSSES", "FitLoss", "cross_entropy", "squared_error"]

FitLoss = Callable[[Tensor, Tensor], Tensor]
"""(N, V) logits and (N,) labels -> () mean over the N tokens."""


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood of the labels: L = -mean_N log softmax(logits)[label]. Nats per token, >= 0."""
    return nll(token_logprobs(logits_NV, labels_N)[0])


def squared_error(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Squared distance of the logits from the one-hot label: L = mean_N mean_V (logits - onehot)^2. >= 0.

    Source: Liu et al. 2022, arXiv:2210.01117 (Omnigrok), MNIST experiments; torch's MSELoss on one-hot targets. Of an
    answer with several tokens each counts as one classification among V; with a large vocabulary nearly all targets are
    0, and the gradient of each logit is 2 / (N V) times its error.

    Args:
        logits_NV: (N, V), any float dtype; computed in float32.
        labels_N: (N,) in [0, V).
    """
    not_empty("squared_error", logits_NV)
    logits_NV = logits_NV.float()
    # (z - onehot)^2 = z^2 - 2 z_label + 1 summed over V would cancel where the fit is good
    error_NV = logits_NV.scatter_add(-1, labels_N[:, None], -logits_NV.new_ones(len(labels_N), 1))
    return error_NV.square().mean()


FIT_LOSSES: Mapping[str, FitLoss] = {"ce": cross_entropy, "mse": squared_error}
