"""Hessian of the loss: largest eigenvalue and trace, at the model's own loss or at a loss given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_unlearn.data.batches import Item
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import answer_values, batches, cross_entropy, evaluating, trained_weights

MAX_ITEMS = 512
MAX_BETA = 2.0**20
Vector = Sequence[Tensor]


class Hessian:
    """Products of the Hessian of the mean cross-entropy over answer tokens, logits divided by a temperature.

    Args:
        model: AnswerModel or its counterpart for images.
        items: the items; the first 512 are read.
        temperature: what logits are divided by.
    """

    def __init__(self, model: Any, items: Sequence[Item], temperature: float = 1.0) -> None:
        self.model, self.items, self.temperature = model, items[:MAX_ITEMS], temperature
        self.weights = list(trained_weights(model).values())
        self.products = 0

    def __call__(self, vector: Vector) -> list[Tensor]:
        """Return H v: one tensor per trained weight, from a double backward pass over all items."""
        out = [torch.zeros_like(w) for w in self.weights]
        total = sum(item.n_answer for item in self.items)
        # fused attention has no second derivative
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH):
            for batch in batches(self.model, self.items):
                logits_NV = self.model(batch.inputs, batch.index_N).float() / self.temperature
                loss = cross_entropy(logits_NV, batch.labels_N).sum() / total
                grads = torch.autograd.grad(loss, self.weights, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(grads, vector, strict=True) if g is not None and g.requires_grad]
                along = torch.stack([(g * v).sum() for g, v in pairs]).sum()
                for mine, part in zip(out, torch.autograd.grad(along, self.weights, allow_unused=True), strict=True):
                    if part is not None:
                        mine += part
        self.products += 1
        return out

    def draw(self, generator: torch.Generator, *, signs: bool) -> list[Tensor]:
        """Return a random vector: Rademacher signs, or Gaussian of length 1."""
        drawn = [torch.randn(w.shape, generator=generator).to(w) for w in self.weights]
        return [v.sign() for v in drawn] if signs else _unit(drawn)


def top_eigenvalue(
    hessian: Hessian, *, iterations: int = 50, tolerance: float = 1e-3, seed: int = 0
) -> dict[str, float | int | bool]:
    """Return the largest eigenvalue of the Hessian, by power iteration.

    Power iteration finds the eigenvalue of largest modulus; where that one is negative, a second run on H - lambda I
    finds the largest. Source: von Mises and Pollaczek-Geiringer 1929; the Rayleigh quotient is reported.

    Returns:
        {"value", "iterations" (products made), "converged" (relative change at or below the tolerance within
        `iterations` products of a run), "residual" (|Hv - lambda v| / |lambda|: an eigenvalue lies that near)}.
    """
    value, n, converged, residual = _power(hessian, 0.0, iterations, tolerance, seed)
    if value < 0:
        shifted, more, converged, residual = _power(hessian, value, iterations, tolerance, seed + 1)
        value, n = shifted, n + more
    return {"value": value, "iterations": n, "converged": converged, "residual": residual}


def trace(hessian: Hessian, *, samples: int = 20, seed: int = 0) -> dict[str, float | int]:
    """Return Hutchinson's estimate of the trace: mean over Rademacher vectors of z'Hz, with its standard error.

    Source: Hutchinson 1990. Returns {"value", "se", "samples"}; unbiased.
    """
    if samples < 2:
        raise UserError(f"the trace needs at least 2 random vectors for a standard error, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        z = hessian.draw(generator, signs=True)
        found.append(_dot(z, hessian(z)))
    values = torch.tensor(found, dtype=torch.float64)
    return {"value": float(values.mean()), "se": float(values.std() / samples**0.5), "samples": samples}


def mean_loss(logits_NV: Tensor, labels_N: Tensor, beta: float = 1.0) -> float:
    """Mean cross-entropy of logits times beta, in nats per token."""
    return float(cross_entropy(logits_NV.double() * beta, labels_N).double().mean())


def temperature_for_loss(logits_NV: Tensor, labels_N: Tensor, target: float, *, tolerance: float = 1e-4) -> float:
    """Return the temperature that logits are divided by for a given mean loss.

    The loss is convex in beta = 1 / temperature and falls from log V at 0 to its least; on that stretch bisection finds
    the target, to a relative `tolerance` of the loss.

    Raises UserError for a target that no temperature on it gives.
    """
    most = 1.0
    while _slope(logits_NV, labels_N, most) < 0 and most < MAX_BETA:
        most *= 2
    lo, hi = 0.0, most
    for _ in range(60 if _slope(logits_NV, labels_N, most) >= 0 else 0):  # to the least loss
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if _slope(logits_NV, labels_N, middle) < 0 else (lo, middle)
    lo, best = 0.0, hi
    bounds = mean_loss(logits_NV, labels_N, best), mean_loss(logits_NV, labels_N, 0.0)
    if not bounds[0] < target < bounds[1]:
        raise UserError(
            f"no temperature gives a mean loss of {target:g}: it goes from {bounds[0]:.4g} to {bounds[1]:.4g}; give a "
            "loss between them"
        )
    hi = best
    for _ in range(100):
        middle = (lo + hi) / 2
        loss = mean_loss(logits_NV, labels_N, middle)
        if abs(loss - target) <= tolerance * target:
            break
        lo, hi = (middle, hi) if loss > target else (lo, middle)
    return 2 / (lo + hi)


def curvature(
    model: Any,
    items: Sequence[Item],
    *,
    loss: float | None = None,
    iterations: int = 50,
    tolerance: float = 1e-3,
    samples: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Return top eigenvalue and trace of the Hessian of the mean loss over at most 512 items.

    Near zero loss both are near zero whatever the landscape, so models are compared at one `loss`, which a temperature
    on their logits brings about.

    Returns:
        {"top": `top_eigenvalue`, "trace": `trace`, "top_scaled" (top times the squared norm of the trained weights: the
        same for a model whose weights are all twice as large and that computes the same), "loss", "temperature", "n"}.
    """
    items = items[:MAX_ITEMS]
    temperature = 1.0
    if loss is not None:
        logits_NV = answer_values(model, items, lambda logits, _: logits)
        labels_N = answer_values(model, items, lambda _, labels: labels)
        temperature = temperature_for_loss(logits_NV, labels_N, loss)
        del logits_NV
    own = answer_values(model, items, lambda logits, labels: cross_entropy(logits / temperature, labels))
    hessian = Hessian(model, items, temperature)
    top = top_eigenvalue(hessian, iterations=iterations, tolerance=tolerance, seed=seed)
    return {
        "top": top,
        "trace": trace(hessian, samples=samples, seed=seed),
        "top_scaled": float(top["value"]) * sum(float(w.detach().double().square().sum()) for w in hessian.weights),
        "loss": float(own.double().mean()),
        "temperature": temperature,
        "n": len(items),
    }


def _power(
    hessian: Hessian, shift: float, iterations: int, tolerance: float, seed: int
) -> tuple[float, int, bool, float]:
    """Return (eigenvalue of H of largest distance from `shift`, products, converged, relative residual)."""
    v = hessian.draw(torch.Generator().manual_seed(seed), signs=False)
    value, residual = 0.0, float("inf")
    for n in range(1, iterations + 1):
        product = hessian(v)
        before, value = value, _dot(v, product)
        away = [p - value * x for p, x in zip(product, v, strict=True)]
        residual = _dot(away, away) ** 0.5 / abs(value) if value else float("inf")
        turned = [p - shift * x for p, x in zip(product, v, strict=True)]
        if _dot(turned, turned) == 0:  # every direction is alike: the Hessian is shift * I
            return shift, n, True, 0.0
        if n > 1 and abs(value - before) <= tolerance * max(abs(value), tolerance * abs(shift)):
            return value, n, True, residual
        v = _unit(turned)
    return value, iterations, False, residual


def _slope(logits_NV: Tensor, labels_N: Tensor, beta: float) -> float:
    """Derivative of the mean loss by beta: mean of E_p[z] - z_y."""
    logits_NV = logits_NV.double()
    expected_N = ((logits_NV * beta).softmax(-1) * logits_NV).sum(-1)
    return float((expected_N - logits_NV.gather(-1, labels_N[:, None])[:, 0]).mean())


def _dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum())


def _unit(v: Vector) -> list[Tensor]:
    length = _dot(v, v) ** 0.5
    return [x / length for x in v]
