"""One-shot edits of weights. Pure functions on dicts of tensors (name -> weights); imports torch only.

`weights` are those of the start model; what comes back has the same names, shapes and dtypes and shares no memory with
it. Arithmetic is float32 or wider whatever the dtype. `*_importance` holds, for every weight, the mean over items of
the squared gradient of log p(answer | question): the diagonal of the empirical Fisher information (observed answers,
one gradient per item). A run reads the PARAMETER NAMES of these functions to know what to compute
(`spec.EDIT_VOCABULARY`); hyper-parameters are keyword-only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["fisher", "ssd", "task_vector"]

Weights = Mapping[str, Tensor]


def task_vector(weights: Weights, reinforced: Weights, *, lam: float = 1.0) -> dict[str, Tensor]:
    """Subtract what further training on the forget set adds.

        theta <- theta - lam * (theta_reinforced - theta)

    Source: Ilharco et al. 2023, arXiv:2212.04089, "forgetting via negation" (tau_new = -tau, theta_new = theta +
    lam * tau_new). There tau starts from the pretrained model; MUSE (arXiv:2407.06460, task vectors) starts it, as
    here, from the model that is to forget, with lam = 1.

    Args:
        weights: start model.
        reinforced: the start model after training on the forget set; same names and shapes.
        lam: scale, >= 0; 0 changes nothing.

    Raises:
        ValueError: lam < 0 or not a number, or names or shapes that differ.
    """
    _at_least_zero("task_vector", lam=lam)
    _fits("task_vector", weights, reinforced=reinforced)
    return {
        name: (_wide(theta) - lam * (_wide(reinforced[name]) - _wide(theta))).to(theta.dtype)
        for name, theta in weights.items()
    }


def fisher(
    weights: Weights, retain_importance: Weights, seed: int, *, alpha: float = 1e-3, floor: float = 1e-8
) -> dict[str, Tensor]:
    """Fisher forgetting: add noise where the retain set does not mind it.

        theta <- theta + alpha * (F_retain + floor)^(-1/4) * n,    n ~ N(0, 1),    alpha = (lambda sigma_h^2)^(1/4)

    Source: Golatkar et al. 2020, arXiv:1911.04933, scrubbing of deep networks with the Fisher information in place of
    the Hessian (diagonal). Differences: their code draws noise of standard deviation (alpha / (F + 1e-8))^(1/2), clamps
    it and resets the last layer of a forgotten class; the paper's power is followed here, and only `floor` limits the
    noise, to alpha * floor^(-1/4). Their F is an expectation over the model's own labels: a pass for each class,
    which ten classes allow and a vocabulary does not; here it is taken at the observed answers, of images as of texts.

    Args:
        weights: start model.
        retain_importance: F_retain, >= 0.
        seed: of the noise, which is drawn on the CPU, tensor after tensor: the same on every process and device.
        alpha: scale of the noise, >= 0; 0 changes nothing.
        floor: added to F, > 0.

    Raises:
        ValueError: a knob outside its domain, or names or shapes that differ.
    """
    _at_least_zero("fisher", alpha=alpha)
    if not floor > 0:
        raise ValueError(f"fisher: floor must be > 0, got {floor}; weights without a gradient would get infinite noise")
    _fits("fisher", weights, retain_importance=retain_importance)
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name, theta in weights.items():
        noise = torch.randn(theta.shape, generator=draw).to(theta.device)
        scale = alpha * (_wide(retain_importance[name]) + floor).pow(-0.25)
        out[name] = (_wide(theta) + scale * noise).to(theta.dtype)
    return out


def ssd(
    weights: Weights, forget_importance: Weights, all_importance: Weights, *, alpha: float = 10.0, lam: float = 1.0
) -> dict[str, Tensor]:
    """Selective synaptic dampening: shrink weights that matter more to the forget set than to all of the data.

        where I_forget > alpha * I_all:    theta <- theta * min(lam * I_all / I_forget, 1)

    Source: Foster et al. 2024, arXiv:2308.07707, selection and dampening (method section). Importance is the mean of
    squared gradients; the authors' code squares the gradient of a batch's mean loss, here each item has its own
    gradient, as in the paper's definition. All of the data includes the forget set, so that I_forget / I_all never
    exceeds (number of all items) / (number of forget items): an alpha at or above that ratio changes nothing.

    Args:
        weights: start model.
        forget_importance: I_forget, >= 0.
        all_importance: I_all, >= 0; of forget and retain set together.
        alpha: selection, > 0; inf changes nothing.
        lam: dampening, >= 0; no weight grows, whatever its value.

    Raises:
        ValueError: a knob outside its domain, or names or shapes that differ.
    """
    if not alpha > 0:
        raise ValueError(f"ssd: alpha must be > 0, got {alpha}")
    _at_least_zero("ssd", lam=lam)
    _fits("ssd", weights, forget_importance=forget_importance, all_importance=all_importance)
    out = {}
    for name, theta in weights.items():
        of_forget, of_all = _wide(forget_importance[name]), _wide(all_importance[name])
        # inf * 0 is nan, and no importance exceeds inf
        chosen = of_forget > alpha * of_all if math.isfinite(alpha) else torch.zeros_like(of_forget, dtype=torch.bool)
        factor = (lam * of_all / torch.where(chosen, of_forget, 1.0)).clamp(max=1.0)
        out[name] = torch.where(chosen, (_wide(theta) * factor).to(theta.dtype), theta)
    return out


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _at_least_zero(name: str, **knobs: float) -> None:
    for knob, value in knobs.items():
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{name}: {knob} must be finite and >= 0, got {value}")


def _fits(name: str, weights: Weights, **others: Weights) -> None:
    for what, other in others.items():
        if weights.keys() != other.keys():
            odd = sorted(weights.keys() ^ other.keys())[0]
            raise ValueError(f"{name}: weights and {what} do not have the same names (first: {odd})")
        for key, values in weights.items():
            if values.shape != other[key].shape:
                raise ValueError(
                    f"{name}: '{key}' is {tuple(values.shape)} in weights and {tuple(other[key].shape)} in {what}"
                )
