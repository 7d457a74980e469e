"""Rules for the weights of the forget and the retain term, for methods that do not hold them fixed at gamma and alpha.

Every rule takes `done`, the share of the run's updates that are done, in [0, 1), and returns (gamma, alpha); its
hyper-parameters are keyword-only. Functions of the step alone, so that a resumed run goes on with the same weights.
"""

from __future__ import annotations

__all__ = ["decaying", "decaying_mixture", "mixture"]


def mixture(done: float, *, beta: float = 0.95) -> tuple[float, float]:
    """A fixed mixture: gamma = 1 - beta, alpha = beta.

    Source: NegGrad+ of Kurmanji et al. 2023, arXiv:2302.09880. beta = 1 is fine-tuning, beta = 0 ascent alone.
    """
    return 1.0 - beta, beta


def decaying_mixture(done: float, *, start: float = 0.5) -> tuple[float, float]:
    """A mixture that ends as descent alone: gamma = start (1 - done), alpha = 1 - gamma.

    Source: Trippa et al. 2024, arXiv:2403.14339; the authors' code lowers their alpha by as much after every epoch,
    down to 0 after the last, here it is lowered after every update.
    """
    gamma = start * (1.0 - done)
    return gamma, 1.0 - gamma


def decaying(done: float, *, strength: float = 5e-4) -> tuple[float, float]:
    """A penalty that fades beside a whole retain term: gamma = strength (1 - done), alpha = 1.

    Source: l1-sparse of Jia et al. 2023, arXiv:2304.04934; the authors' code lowers it after every epoch.
    """
    return strength * (1.0 - done), 1.0
