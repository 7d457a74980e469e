"""A penalty that keeps the training items away from the hyperplanes of a network's neurons. Pure; torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["complexity_penalty"]

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
