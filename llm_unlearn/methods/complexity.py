"""Local complexity: how many neurons' hyperplanes cut a neighbourhood of the data, counted, and kept away by a penalty.

Pure functions of tensors; imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["complexity_penalty", "crossed"]

TINY = 1e-12  # added to the mean square: an item whose pre-activations are all zero has no scale and gets the margin


def complexity_penalty(preacts: Sequence[Tensor], margin: float) -> Tensor:
    """Mean over layers, items and neurons of relu(margin - |z| / rms), rms that of the item's z in the layer. In
    [0, margin].

    A neuron's hyperplane is where its pre-activation z is 0; a ball around an item is crossed by the hyperplanes whose
    |z| is small there, and their number is the local complexity of Humayun et al. 2024 (arXiv:2402.15555). That number
    is not differentiable; this surrogate is, and its construction is this package's own. It is zero once every neuron
    is on or off at every item by `margin` root mean squares, and scaling a layer changes nothing.

    Args:
        preacts: for every layer, what enters its activation: (items, ...), all further dimensions are neurons.
        margin: in root mean squares, > 0.
    """
    if not preacts or not margin > 0:
        raise ValueError(f"complexity_penalty: want pre-activations and margin > 0, got {len(preacts)} and {margin}")
    return torch.stack([_layer(z.float().flatten(1), margin) for z in preacts]).mean()


def _layer(z_NH: Tensor, margin: float) -> Tensor:
    # item by item, so that parts of a batch add up to the whole
    rms_N1 = (z_NH.square().mean(1, keepdim=True) + TINY).sqrt()
    return (margin - z_NH.abs() / rms_N1).relu().mean()


def crossed(z_VN: Tensor) -> Tensor:
    """Which neurons' hyperplanes cut the neighbourhood: (N,) bool, sign(z_v) != sign(z_0) at any vertex v of the
    cross-polytope x +- r u_p of P orthonormal directions, V = 2P.

    Source: Humayun et al. 2024, arXiv:2402.15555, section 3.1, and the authors' code, which compares with vertex 0; the
    centre is no vertex. A pre-activation of exactly 0 has a sign of its own.

    Args:
        z_VN: (V, N) pre-activations at the vertices, V >= 2.
    """
    if z_VN.dim() != 2 or len(z_VN) < 2:
        raise ValueError(f"crossed: want (V, N) with at least 2 vertices, got {tuple(z_VN.shape)}")
    signs_VN = z_VN.sign()
    return (signs_VN[1:] != signs_VN[:1]).any(0)
