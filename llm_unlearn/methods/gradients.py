"""Steps that rewrite gradients: they wrap any method that has a forget and a retain term. Pure functions; torch only.

A gradient is a list of float32 tensors, one per trained parameter, always in the same order; products and norms run
over all of them together. A wrapper gets an oracle (`Gradients`), asks it for the gradients it needs and returns the
step's gradient; what it remembers between steps it keeps in `memory`, which the run saves with its state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_unlearn.methods.spec import Knob, check_knobs, hint

__all__ = [
    "GRADIENTS",
    "Gradient",
    "Gradients",
    "Memory",
    "add",
    "check_gradient",
    "cosine_slopes",
    "dot",
    "gru",
    "nearby_worst",
    "orthograd",
    "orthopenalty",
    "project_out",
    "rectify",
    "sam",
]

Memory = MutableMapping[str, list[Tensor]]
RANK_TOLERANCE = 1e-5  # of the largest eigenvalue of the Gram matrix: directions below it are rounding noise


class Gradients(Protocol):
    """Gradients of one step's terms, over all its micro-batches and processes; terms are `forget` and `retain`, without
    their weights gamma and alpha.
    """

    def __call__(self, term: str, shift: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the gradient of a term at the present weights, or at the weights plus `shift`."""
        ...

    def rows(self, term: str) -> list[Tensor]:
        """Return the term's gradient item by item: B rows in every tensor, which add up to the whole."""
        ...


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product of two gradients: () float32."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def add(*parts: tuple[float | Tensor, Sequence[Tensor]]) -> list[Tensor]:
    """Weighted sum of gradients, each given as (weight, gradient)."""
    first, *others = parts
    out = [first[0] * t for t in first[1]]
    for weight, gradient in others:
        out = [o + weight * t for o, t in zip(out, gradient, strict=True)]
    return out


def rectify(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> list[Tensor]:
    """Take out of a forget gradient what would raise the retain loss: g_f - min(0, <g_f, g_r>) / ||g_r||^2 * g_r.

    The nearest gradient to `forget` whose product with `retain` is not negative; `forget` itself where they agree, or
    where `retain` is zero.
    """
    square = dot(retain, retain)
    if not square > 0:
        return list(forget)
    conflict = dot(forget, retain).clamp(max=0.0)
    return add((1.0, forget), (-conflict / square, retain))


def project_out(gradient: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Project a gradient on the complement of the span of B others: g - A^T (A A^T)^+ A g, with the rows of A scaled to
    length one.

    Args:
        gradient: tensors of the parameters' shapes.
        rows: for every parameter (B, *shape); linearly dependent or zero rows are allowed.
    """
    flat = [r.flatten(1) for r in rows]
    length_B = torch.stack([r.square().sum(1) for r in flat]).sum(0).sqrt()
    scale_B1 = torch.where(length_B > 0, 1 / length_B, 0.0)[:, None]
    # B x B is small: in float64 its small eigenvalues are those of the rows, not of the rounding
    gram_BB = torch.stack([r.double() @ r.double().T for r in flat]).sum(0) * (scale_B1 * scale_B1.T).double()
    values_B, vectors_BB = torch.linalg.eigh(gram_BB)
    kept = values_B > RANK_TOLERANCE * values_B.max().clamp(min=torch.finfo(torch.float64).tiny)
    inverse_B = torch.where(kept, 1 / values_B.where(kept, torch.ones_like(values_B)), 0.0)
    out = [g.flatten() for g in gradient]
    for _ in range(2):  # once more takes out what rounding left of the first projection
        along_B = torch.stack([r @ g for r, g in zip(flat, out, strict=True)]).sum(0) * scale_B1[:, 0]
        weight_B = (vectors_BB @ (inverse_B * (vectors_BB.T @ along_B.double()))).float() * scale_B1[:, 0]
        out = [g - weight_B @ r for g, r in zip(out, flat, strict=True)]
    return [o.view_as(g) for o, g in zip(out, gradient, strict=True)]


def cosine_slopes(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cosine of two gradients, c = <a, b> / (||a|| ||b||), and its derivatives by both.

        dc/da = (b/||b|| - c a/||a||) / ||a||,    dc/db the same with a and b exchanged

    Returns zeros where a or b is zero: there the cosine is not defined.
    """
    length_a, length_b = dot(a, a).sqrt(), dot(b, b).sqrt()
    if not (length_a > 0 and length_b > 0):
        zero = [torch.zeros_like(t) for t in a]
        return torch.zeros_like(length_a), zero, zero
    c = dot(a, b) / (length_a * length_b)
    by_a = add((1 / (length_a * length_b), b), (-c / length_a**2, a))
    by_b = add((1 / (length_a * length_b), a), (-c / length_b**2, b))
    return c, by_a, by_b


def gru(gradients: Gradients, memory: Memory, *, gamma: float, alpha: float, ema: float = 0.8) -> list[Tensor]:
    """Rectify the forget gradient against a moving average of the retain gradient: rectify(gamma g_f, h) + alpha g_r.

        h <- ema * g_r + (1 - ema) * h,    h = 0 before the first step

    Source: Wang et al. 2025, arXiv:2503.09117 (GRU), section 3; the average as in the authors' code, where 0.8 is the
    weight of the present gradient. The paper steps along the rectified forget gradient alone, which is alpha=0.
    """
    forget, retain = gradients("forget"), gradients("retain")
    if "retain" in memory:
        past = [m.to(r.device) for m, r in zip(memory["retain"], retain, strict=True)]
        memory["retain"] = add((ema, retain), (1 - ema, past))
    else:
        memory["retain"] = add((ema, retain))
    return add((1.0, rectify(add((gamma, forget)), memory["retain"])), (alpha, retain))


def orthograd(gradients: Gradients, memory: Memory, *, gamma: float, alpha: float) -> list[Tensor]:
    """Project the forget gradient on the complement of the span of the retain gradients of single items.

        gamma * (g_f - Q Q^T g_f) + alpha * g_r,    Q an orthonormal basis of the retain items' gradients

    Source: Shamsian et al. 2025, arXiv:2503.02312 (OrthoGrad), method section: one gradient per item of the retain
    batch, and the retain gradient added. The basis comes from the Gram matrix instead of their QR decomposition, so
    that dependent gradients add no direction of rounding noise; the projection is the same.
    """
    forget, rows = gradients("forget"), gradients.rows("retain")
    return add((gamma, project_out(forget, rows)), (alpha, [r.sum(0) for r in rows]))


def orthopenalty(
    gradients: Gradients, memory: Memory, *, gamma: float, alpha: float, weight: float = 1.0, radius: float = 0.01
) -> list[Tensor]:
    """Penalise the squared cosine of forget and retain gradient: gamma g_f + alpha g_r + weight * grad cos^2(g_f, g_r).

        grad cos^2 = 2 c (H_f u + H_r v),    c = cos(g_f, g_r), u = dc/dg_f, v = dc/dg_r (`cosine_slopes`)
        H u ~ ||u|| / radius * (g(theta + radius u/||u||) - g(theta))

    The two Hessian-vector products are forward differences, one more gradient of each term, because fused attention has
    no second derivative. Their error is of the order of `radius`.
    Source: Mandal and Gottwald 2025, arXiv:2506.04712 (UNO), who add a penalty on the cosine of the two gradients to
    the retain loss (gamma=0 here). That it is the square, and finite differences, are choices of this package.
    """
    forget, retain = gradients("forget"), gradients("retain")
    c, by_forget, by_retain = cosine_slopes(forget, retain)
    parts: list[tuple[float | Tensor, Sequence[Tensor]]] = [(gamma, forget), (alpha, retain)]
    for term, here, slope in (("forget", forget, by_forget), ("retain", retain, by_retain)):
        length = dot(slope, slope).sqrt()
        if length > 0:
            there = gradients(term, add((radius / length, slope)))
            scale = 2 * weight * c * length / radius
            parts += [(scale, there), (-scale, here)]
    return add(*parts)


def nearby_worst(gradient: Callable[[Sequence[Tensor] | None], list[Tensor]], rho: float) -> list[Tensor]:
    """Gradient of a loss where it is worst within a ball around the weights, to first order.

        g(w + e),    e = rho * g(w) / ||g(w)||_2,    the norm over all parameters together

    Source: Foret et al. 2021, arXiv:2010.01412 (SAM), eq. 2 with p = 2 and eq. 3 (the term with the Hessian dropped).

    Args:
        gradient: returns the gradient at the weights (None), or at the weights plus a shift; asked once or twice.
        rho: radius of the ball, > 0. Where the gradient at the weights is zero, that is the answer.
    """
    here = gradient(None)
    length = dot(here, here).sqrt()
    return gradient(add((rho / length, here))) if length > 0 else here


def sam(gradients: Gradients, memory: Memory, *, gamma: float, alpha: float, rho: float = 0.01) -> list[Tensor]:
    """Take the forget gradient where the forget loss is worst nearby, the retain gradient where the weights are.

        gamma * g_f(theta + rho g_f/||g_f||) + alpha * g_r(theta)

    Source: Fan et al. 2025, arXiv:2502.05374 (NPO+SAM), first-order solution of  min_theta max_{||e|| <= rho}
    forget(theta + e) + alpha retain(theta),  the norm over all parameters together.
    """
    forget = nearby_worst(lambda shift: gradients("forget", shift), rho)
    return add((gamma, forget), (alpha, gradients("retain")))


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A way to make a step's gradient out of those of the forget and the retain term."""

    name: str
    fn: Callable[..., list[Tensor]]
    params: Mapping[str, Knob] = field(default_factory=dict)
    formula: str
    source: str
    note: str = ""
    failure: str
    """How it is known to go wrong."""
    passes: tuple[int, int]
    """Forward and backward passes over the forget and over the retain batch in one step."""
    memory: str
    """What it holds beside model and optimizer."""
    copies: float | None
    """That, in copies of the trained weights; None where it depends on the batch."""


GRADIENTS: Mapping[str, Gradient] = {
    entry.name: entry
    for entry in (
        Gradient(
            name="gru",
            fn=gru,
            params={
                "ema": Knob(
                    default=0.8,
                    search=(0.8, 0.95, 1.0),
                    high=1.0,
                    closed=True,
                    low=1e-3,
                    help="weight of the present retain gradient in its moving average; 1 has no memory",
                )
            },
            formula="g_f - min(0, <g_f, h>) / |h|^2 h + alpha g_r, h the moving average of g_r",
            source="arXiv:2503.09117, section 3",
            note="The paper's step is the rectified forget gradient alone (alpha=0); here the retain term stays in the "
            "step with its weight.",
            failure="Removes one direction of conflict, that of the average: single retained items can still lose. A "
            "retain term without a gradient at the start (kl, embed) removes nothing in the first step.",
            passes=(1, 1),
            memory="three gradients",
            copies=3,
        ),
        Gradient(
            name="orthograd",
            fn=orthograd,
            formula="gamma (g_f - Q Q^T g_f) + alpha g_r, Q spanning the retain items' gradients",
            source="arXiv:2503.02312, method section",
            note="One gradient per retain item of the batch, as in the paper, each from a backward pass of its own. "
            "The paper trains adapters (lora), which also keeps the memory small.",
            failure="Needs a gradient per retain item of the whole batch in memory on every process, and a backward "
            "pass each, so it takes many times longer than its tokens say; with many more weights than items nearly "
            "all of the forget gradient is left.",
            passes=(1, 1),
            memory="a gradient per retain item of the whole batch",
            copies=None,
        ),
        Gradient(
            name="orthopenalty",
            fn=orthopenalty,
            params={
                "weight": Knob(default=1.0, search=(0.1, 1.0, 10.0), closed=True, help="weight of the penalty"),
                "radius": Knob(
                    default=0.01, search=(0.01,), help="length of the finite-difference step over all weights"
                ),
            },
            formula="gamma g_f + alpha g_r + weight grad cos^2(g_f, g_r)",
            source="arXiv:2506.04712",
            note="The paper adds a penalty on the cosine to the retain loss alone (gamma=0); the square is ours. "
            "Hessian-vector products by forward differences.",
            failure="The differences drown in rounding under bf16, and where both gradients are tiny the cosine is "
            "that of noise.",
            passes=(2, 2),
            memory="five gradients and a copy of the trained weights",
            copies=6,
        ),
        Gradient(
            name="sam",
            fn=sam,
            params={
                "rho": Knob(default=0.01, search=(0.001, 0.01, 0.1), help="length of the perturbation over all weights")
            },
            formula="gamma g_f(theta + rho g_f / |g_f|) + alpha g_r(theta)",
            source="arXiv:2502.05374",
            failure="rho is a length over all weights, so it means less the larger the model; too large, the forget "
            "gradient is that of another model.",
            passes=(2, 1),
            memory="two gradients and a copy of the trained weights",
            copies=3,
        ),
    )
}


def check_gradient(name: str, params: Mapping[str, Any]) -> dict[str, float]:
    """Check a wrapper's name and hyper-parameters and complete them with its defaults.

    Raises:
        ValueError: an unknown wrapper, or what `spec.check_knobs` refuses.
    """
    if name not in GRADIENTS:
        raise ValueError(f"unknown gradient '{name}' in method.gradient{hint(name, [*GRADIENTS, 'none'])}")
    return check_knobs(f"gradient {name}", GRADIENTS[name].params, params)
