"""Optimizers: against the formulas by hand, who decays, and settings that would have no effect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.train.config import OptimConfig
from llm_unlearn.train.finetune import FinetuneConfig
from llm_unlearn.train.optimizer import check_optimizer, make_optimizer
from llm_unlearn.unlearn.config import UnlearnConfig


def descend(config, steps=3):
    """Weights of a linear layer after steps along a fixed gradient; beside it the start and the gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    start = [p.detach().clone() for p in layer.parameters()]
    gradient = [torch.randn_like(p) for p in layer.parameters()]
    optimizer = make_optimizer(layer, config)
    for _ in range(steps):
        for p, g in zip(layer.parameters(), gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return list(layer.parameters()), start, gradient


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_by_hand(decay, momentum):
    config = OptimConfig(optimizer="sgd", lr=0.1, momentum=momentum, weight_decay=0.5, decay=decay)
    ended, start, gradient = descend(config)
    for weight, w, g in zip(ended, start, gradient, strict=True):
        decays = 0.5 if decay == "all" or w.dim() >= 2 else 0.0
        v = torch.zeros_like(w)
        for _ in range(3):
            v = momentum * v + g + decays * w
            w = w - 0.1 * v
        torch.testing.assert_close(weight.detach(), w)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_decays_what_it_is_told_to(decay):
    ended, start, gradient = descend(OptimConfig(lr=0.1, weight_decay=0.5, decay=decay, eps=1e-12), steps=1)
    for weight, w, g in zip(ended, start, gradient, strict=True):
        decays = 0.5 if decay == "all" or w.dim() >= 2 else 0.0
        torch.testing.assert_close(weight.detach(), w * (1 - 0.1 * decays) - 0.1 * g.sign())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_every_trained_weight_is_held_once(tiny_lm, optimizer, decay):
    made = make_optimizer(tiny_lm, OptimConfig(optimizer=optimizer, decay=decay, weight_decay=0.7))
    held = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in made.param_groups) == len(held) == len(list(tiny_lm.parameters()))
    for name, p in tiny_lm.named_parameters():
        assert held[id(p)] == (0.0 if "norm" in name and decay == "matrices" else 0.7), name


@pytest.mark.parametrize("recipe", [GrokConfig, FinetuneConfig, UnlearnConfig])
@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"momentum": 0.5}, "optim.momentum has no effect with optim.optimizer=adamw"),
        (
            {"optimizer": "sgd", "betas": [0.9, 0.95]},
            r"optim.betas has no effect with optim.optimizer=sgd; remove it",
        ),
        ({"optimizer": "sgd", "eps": 1e-6}, "optim.eps has no effect with optim.optimizer=sgd"),
    ],
)
def test_a_setting_without_effect_is_refused(recipe, optim, said):
    with pytest.raises(UserError, match=said) as caught:
        check_optimizer(build_config(recipe, {"optim": optim}))
    assert "\n" not in str(caught.value)
    check_optimizer(build_config(recipe, {"optim": {"optimizer": "sgd", "momentum": 0.5}}))
    check_optimizer(recipe())
