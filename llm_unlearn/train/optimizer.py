"""The optimizers the loop trains with."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from llm_unlearn.config import Config
from llm_unlearn.errors import UserError
from llm_unlearn.train.config import OptimConfig

IDLE = {"adamw": ("momentum",), "sgd": ("betas", "eps")}
"""Optimizer -> the settings it does not read."""


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Return the optimizer of a model's trained weights, in one group that decays and one that does not.

    `decay=matrices` spares what has fewer than two dimensions (biases, gains of norms); embeddings are matrices.

    adamw (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2): the weights shrink by lr * weight_decay per step,
    whatever the gradient. sgd, as in torch: weight decay is L2, g <- g + weight_decay * w before the momentum,
    v <- momentum * v + g (v = g at the first step), w <- w - lr * v; clipping comes before all of it. The usual recipe
    of image classifiers is lr .1 with the cosine schedule, momentum .9, weight decay 5e-4 on all weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    spared = [p for p in trained if config.decay == "matrices" and p.dim() < 2]
    chosen = {id(p) for p in spared}
    groups = [
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def n_moments(config: OptimConfig) -> int:
    """Return how many numbers the optimizer remembers per weight: adamw two, sgd one where it has momentum."""
    return 2 if config.optimizer == "adamw" else int(config.momentum > 0)


def check_optimizer(config: Config) -> None:
    """Refuse a run's setting that its optimizer does not read: one that is not the recipe's default of `optim`.

    Raises UserError; call it before anything is written.
    """
    optim: OptimConfig = config.optim  # pyright: ignore[reportAttributeAccessIssue]
    usual = type(config).model_fields["optim"].get_default(call_default_factory=True)
    for name in IDLE[optim.optimizer]:
        default = getattr(usual, name)
        if getattr(optim, name) != default:
            shown = list(default) if isinstance(default, tuple) else default
            raise UserError(
                f"optim.{name} has no effect with optim.optimizer={optim.optimizer}; remove it, or set {shown} again"
            )
