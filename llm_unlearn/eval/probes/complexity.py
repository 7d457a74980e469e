"""Local complexity: how finely a model's hyperplanes cut up the space around its data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import Batch, Item, collate
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import evaluating
from llm_unlearn.methods.losses import mean_by_row
from llm_unlearn.models.preactivations import neighbourhood_shape, orthonormal, points, vertices

RADIUS, DIRECTIONS, DIRECTIONS_RESNET = 0.005, 25, 20
RELATIVE_RADIUS = 0.05  # at a tenth of it a small language model has one crossing an input, too few to compare
CHUNK = 64  # items of one batch: a flag per neuron and item is held


@torch.no_grad()
def local_complexity(
    model: Any,
    items: Sequence[Item],
    *,
    radius: float = RADIUS,
    relative: bool = False,
    n_directions: int = DIRECTIONS,
    seed: int = 0,
    float64: bool = False,
) -> dict[str, Any]:
    """Return the local complexity of a model around its inputs.

        LC(x) = sum over layers of #{neurons whose pre-activation has another sign at a vertex than at vertex 0}

    over the 2P vertices x +- r u_p of a cross-polytope, u_p orthonormal, the same for all inputs of one shape; mean
    over inputs. Source: Humayun et al. 2024, arXiv:2402.15555 (P = 25, r = .005; the authors' ResNet code takes P = 20,
    `DIRECTIONS_RESNET`). Neurons are the inputs of activation modules, every place of a channel one of its own. A text
    is moved in the space of its token embeddings, all positions at once (T x d), and its neurons are counted at answer
    positions, mean over them.

    Args:
        radius: r, Euclidean length of each vertex' offset; with `relative` in units of the mean length of the inputs,
            since a fixed r mistakes a larger embedding for a simpler model.
        n_directions: P; no more than the dimension are taken.
        float64: run a double-precision copy of the model, as the authors' code does.

    Returns:
        {"lc", "se" (of the mean over inputs), "share" (of all neurons), "per_layer": {name: {"lc", "neurons",
        "share"}}, "radius" (absolute), "directions", "n"}.

    Raises UserError for a model without activation modules, or no items.
    """
    if not items:
        raise UserError("no items to take the local complexity around; the split is empty")
    if not radius > 0:
        raise UserError(f"local complexity: radius must be > 0, got {radius:g}")
    model = deepcopy(model).double() if float64 else model
    crossings: dict[str, list[np.ndarray]] = defaultdict(list)
    neurons: dict[str, int] = {}
    used = 0
    with evaluating(model):
        parts = list(_same_shape(model, items))
        if relative:
            radius *= _mean_length(model, parts)
        for batch in parts:
            shape = neighbourhood_shape(model, batch.inputs)
            directions = orthonormal(shape, n_directions, seed)
            used = max(used, len(directions))
            for name, crossed in _crossed(model, batch, directions, radius).items():
                count = crossed.sum(1).double()
                text = not batch.inputs.is_floating_point()
                per_item = mean_by_row(count, batch.row_N, batch.n_rows) if text else count
                crossings[name].append(per_item.cpu().numpy())
                neurons[name] = crossed.shape[1]
    layers = {name: np.concatenate(counts) for name, counts in crossings.items()}
    whole = np.sum(list(layers.values()), 0)
    return {
        "lc": float(whole.mean()),
        "se": float(whole.std(ddof=1) / np.sqrt(len(whole))) if len(whole) > 1 else float("nan"),
        "share": float(whole.mean() / sum(neurons.values())),
        "per_layer": {
            name: {"lc": float(lc.mean()), "neurons": neurons[name], "share": float(lc.mean() / neurons[name])}
            for name, lc in layers.items()
        },
        "radius": radius,
        "directions": used,
        "n": len(items),
    }


def _same_shape(model: Any, items: Sequence[Item]) -> Iterator[Batch]:
    """Yield batches without padding, so that what an item counts does not depend on its neighbours."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    lengths: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        lengths[item.n_inputs].append(item)
    for _, group in sorted(lengths.items()):
        for begin in range(0, len(group), CHUNK):
            batch = collate(group[begin : begin + CHUNK]).to(device)
            inputs = batch.inputs.to(dtype) if batch.inputs.is_floating_point() else batch.inputs
            yield Batch(inputs, batch.index_N, batch.labels_N, batch.row_N)


def _mean_length(model: Any, parts: Sequence[Batch]) -> float:
    return float(torch.cat([points(model, batch.inputs).double().flatten(1).norm(dim=1) for batch in parts]).mean())


def _crossed(model: Any, batch: Batch, directions: Tensor, radius: float) -> dict[str, Tensor]:
    """As `methods.complexity.crossed`, (rows, neurons) per layer, one vertex in memory at a time."""
    signs: dict[str, Tensor] = {}
    crossed: dict[str, Tensor] = {}
    for at in vertices(model, batch.inputs, batch.index_N, directions, radius):
        for name, z in at.items():
            sign = z.sign().to(torch.int8)
            if name not in signs:
                signs[name], crossed[name] = sign, torch.zeros_like(sign, dtype=torch.bool)
            else:
                crossed[name] |= sign != signs[name]
    return crossed
