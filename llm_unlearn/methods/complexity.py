"""Local complexity of pre-activations: how many neurons switch within a neighbourhood, counted, and as a penalty.

Pure functions of tensors; imports torch only. A neighbourhood is the cross-polytope x +- r u_p of P orthonormal
directions; V = 2P vertices. `z_VN` holds the pre-activation of each of N neurons (of samples, positions, channels, laid
end to end) at every vertex.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["crossed", "soft_local_complexity"]


def crossed(z_VN: Tensor) -> Tensor:
    """Which neurons' hyperplanes cut the neighbourhood: (N,) bool, sign(z_v) != sign(z_0) at any vertex v.

    Source: Humayun et al. 2024, arXiv:2402.15555, section 3.1, and the authors' code, which compares with vertex 0; the
    centre is no vertex. A pre-activation of exactly 0 has a sign of its own.

    Args:
        z_VN: (V, N) pre-activations at the vertices, V >= 2.
    """
    if z_VN.dim() != 2 or len(z_VN) < 2:
        raise ValueError(f"crossed: want (V, N) with at least 2 vertices, got {tuple(z_VN.shape)}")
    signs_VN = z_VN.sign()
    return (signs_VN[1:] != signs_VN[:1]).any(0)


def soft_local_complexity(layers: Sequence[Tensor], *, reach: float = 2.0) -> Tensor:
    """Differentiable stand-in for the share of neurons that switch near the data. () in [0, 1], to be made small.

        L = mean_N relu( 1 - |mean_v z_v| / (reach * max_v |z_v - mean_v z_v|) )

    This construction is ours: Humayun et al. 2024 (arXiv:2402.15555) count crossings and train against none, and the
    regulariser behind the published "spline" control is not public. Where a layer is affine over the neighbourhood,
    mean_v z_v is its value at the centre, the maximum is the farthest it gets from that at a vertex, and with reach = 1
    a term is above 0 exactly where `crossed` counts the neuron. A larger reach pushes hyperplanes out of a
    neighbourhood that many times as wide. Numerator and denominator grow alike with the pre-activation, so the penalty
    cannot be met by scaling weights, only by moving hyperplanes away from the data. A neuron that is constant over the
    neighbourhood has no hyperplane there and adds 0.

    Args:
        layers: per layer the pre-activations z_VN, (V, N) each; the mean is over all neurons of all layers.
        reach: width of the neighbourhood kept clear, in units of the one the vertices span, > 0.

    Raises:
        ValueError: no layer, fewer than 2 vertices, or reach not > 0.
    """
    if not reach > 0:
        raise ValueError(f"soft_local_complexity: reach must be > 0, got {reach}")
    if not layers or any(z.dim() != 2 or len(z) < 2 for z in layers):
        shapes = ", ".join(str(tuple(z.shape)) for z in layers) or "none"
        raise ValueError(f"soft_local_complexity: want (V, N) per layer with at least 2 vertices, got {shapes}")
    return torch.cat([_nearness(z_VN, reach) for z_VN in layers]).mean()


def _nearness(z_VN: Tensor, reach: float) -> Tensor:
    centre_N = z_VN.mean(0)
    spread_N = (z_VN - centre_N).abs().amax(0)
    # rounding leaves a trace of spread in a neuron that is constant
    moves_N = spread_N > 16 * torch.finfo(z_VN.dtype).eps * centre_N.abs()
    ratio_N = centre_N.abs() / (reach * torch.where(moves_N, spread_N, torch.ones_like(spread_N)))
    return torch.where(moves_N, (1 - ratio_N).relu(), torch.zeros_like(ratio_N))
