"""Modules: which neurons an answer rests on, how far those of two items overlap, how alike gradients are in there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_unlearn.data.batches import Item
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.draws import kinship
from llm_unlearn.eval.probes.gradients import EXACT_FLOATS
from llm_unlearn.eval.probes.passes import batches, cross_entropy, evaluating
from llm_unlearn.models.preactivations import activation_modules
from llm_unlearn.seeding import rng

TOP_SHARE = 0.1
LEAST_ITEMS = 8
NULL_DRAWS = 20
FIELDS = ("overlap", "rho", "predicted", "measured")


def module_overlap(
    model: Any, items: Sequence[Item], rows: Sequence[QARow], n_forget: int, *, top: float = TOP_SHARE, seed: int = 0
) -> dict[str, Any]:
    """Return, over pairs of items, how far their modules overlap (p), how alike their gradients are within what they
    share (rho), and whether the product is the correlation of their gradients, as m independent modules would have it.

        a_ij = |sum over positions of act_j * dL_i/dact_j|     M_i = the `top` share of all neurons, by a_ij > 0
        p = mean |M_i n M_k| / |M_i|, both ways     rho = mean cos(g_i, g_k) over the weights of neurons in M_i n M_k
        predicted = p * rho     measured = mean cos(g_i, g_k) over the weights of all neurons

    Source of p * rho: arXiv:2512.03437, appendix D, which measures neither factor. What stands for a module here is one
    unit of a layer that feeds an activation function: in a language model a neuron of an MLP (of a gated one its act
    times gradient is that of the product with the other branch), in an image model a channel. Its weights are the row
    (filter) of the linear layer or convolution that the activation reads; g is the gradient of an item's mean
    cross-entropy. |M_i n M_k| / |M_i| is the conditional overlap that the model needs, the mean of both directions
    where few neurons act at all and masks are smaller; masks drawn at random overlap by `top`. Pairs that share
    nothing, or whose gradient is zero there, have no rho.

    Args:
        model: AnswerModel or its counterpart for images.
        items: n of them, the n_forget ones to forget first; the longer the gradients, the fewer are read.
        rows: the rows they belong to.
        n_forget: how many are to be forgotten.
        top: share of the neurons in a mask, in (0, 1).
        seed: of the random masks.

    Returns:
        {"neurons", "top", "items", "null_overlap" (2.5, 50, 97.5 % of p under random masks), "by": {which: {"overlap",
        "rho", "predicted", "measured", "pairs"}}} for "all", every kinship, and "FF", "FR", "RR".

    Raises UserError for a model none of whose activation functions reads a linear layer or convolution.
    """
    with evaluating(model):
        width = sum(layer.weight.numel() for layer in _feeding(model, items[0]))
        keep = _spread(len(items), n_forget, max(LEAST_ITEMS, EXACT_FLOATS // width))
        found = [_attributed(model, items[i]) for i in keep]
    scores_nJ = torch.stack([score for score, _ in found])
    masks_nJ = _top(scores_nJ, top) & (scores_nJ > 0)
    gradients = [torch.stack(layer) for layer in zip(*(rows for _, rows in found), strict=True)]  # (n, J_layer, D)
    pairs: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    inside = sum(i < n_forget for i in keep)
    for i, k in combinations(range(len(keep)), 2):
        block = "FF" if k < inside else "RR" if i >= inside else "FR"
        values = _pair(gradients, masks_nJ, i, k)
        for which in ("all", kinship(rows[keep[i]], rows[keep[k]]), block):
            pairs[which].append(values)
    return {
        "neurons": masks_nJ.shape[1],
        "top": top,
        "items": len(keep),
        "null_overlap": _null(masks_nJ.shape[0], masks_nJ.shape[1], top, seed),
        "by": {which: _summary(values) for which, values in pairs.items()},
    }


def _pair(gradients: Sequence[Tensor], masks_nJ: Tensor, i: int, k: int) -> tuple[float, float, float]:
    """Return (overlap, rho, cosine over all) of two items."""
    shared_J = masks_nJ[i] & masks_nJ[k]
    dots = torch.cat([(g[i] * g[k]).sum(1) for g in gradients]).double()
    squares = [torch.cat([g[at].square().sum(1) for g in gradients]).double() for at in (i, k)]
    sizes = [max(1, int(masks_nJ[at].sum())) for at in (i, k)]
    overlap = int(shared_J.sum()) * (1 / sizes[0] + 1 / sizes[1]) / 2
    return overlap, _cosine(dots, squares, shared_J), _cosine(dots, squares, torch.ones_like(shared_J))


def _cosine(dots_J: Tensor, squares: Sequence[Tensor], use_J: Tensor) -> float:
    length = float((squares[0][use_J].sum() * squares[1][use_J].sum()).sqrt())
    return float(dots_J[use_J].sum()) / length if length > 0 else float("nan")


def _summary(values: Sequence[tuple[float, ...]]) -> dict[str, float]:
    overlap, rho, measured = (_mean(column) for column in zip(*values, strict=True))
    return {**dict(zip(FIELDS, (overlap, rho, overlap * rho, measured), strict=True)), "pairs": len(values)}


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if v == v]
    return float(np.mean(known)) if known else float("nan")


def _top(scores_nJ: Tensor, top: float) -> Tensor:
    count = max(1, round(top * scores_nJ.shape[1]))
    masks = torch.zeros_like(scores_nJ, dtype=torch.bool)
    return masks.scatter_(1, scores_nJ.topk(count, dim=1).indices, True)


def _null(n: int, width: int, top: float, seed: int) -> list[float]:
    means = []
    for draw in range(NULL_DRAWS):
        generator = rng(seed, "modules", draw)
        drawn = _top(torch.from_numpy(generator.random((n, width))), top).double()
        table = drawn @ drawn.T
        means.append(float((table.sum() - table.trace()) / (n - 1) / table.trace()))
    return [float(q) for q in np.quantile(means, (0.025, 0.5, 0.975))]


def _spread(n: int, n_forget: int, most: int) -> list[int]:
    """Return at most `most` item numbers, as many to forget as to retain where there are."""
    f, r = list(range(n_forget)), list(range(n_forget, n))
    half = max(most // 2, most - len(r))
    return f[:half] + r[: most - len(f[:half])]


@contextmanager
def _watched(model: Any, seen: list[tuple[Any, Tensor]]) -> Iterator[None]:
    """Collect (the layer an activation function reads, what the function makes of it), in calling order."""
    made: list[tuple[Any, Tensor]] = []

    def keep(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made.append((module, output))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    def read(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((layer, output) for layer, value in made if value is inputs[0])

    hooks += [m.register_forward_hook(read) for m in activation_modules(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _feeding(model: Any, item: Item) -> list[Any]:
    seen: list[tuple[Any, Tensor]] = []
    (batch,) = batches(model, [item])
    with _watched(model, seen), torch.no_grad():
        model(batch.inputs, batch.index_N)
    layers = [layer for layer, _ in seen if layer.weight.requires_grad]
    if not layers:
        raise UserError(
            f"modules: no activation function of {type(model.lm).__name__} reads a linear layer or convolution that is "
            "trained; leave it out with --which"
        )
    return layers


def _attributed(model: Any, item: Item) -> tuple[Tensor, list[Tensor]]:
    """Return an item's attributions (J,) over all layers' neurons and its gradients, (J_layer, D) of each layer."""
    seen: list[tuple[Any, Tensor]] = []
    (batch,) = batches(model, [item])
    with _watched(model, seen):
        loss = cross_entropy(model(batch.inputs, batch.index_N), batch.labels_N).mean()
    trained = [(layer, act) for layer, act in seen if layer.weight.requires_grad]
    weights, acts = [layer.weight for layer, _ in trained], [act for _, act in trained]
    grads = torch.autograd.grad(loss, [*acts, *weights])
    scores = []
    for (layer, act), slope in zip(trained, grads, strict=False):
        part = act.detach() * slope
        # a convolution's units are its channels, (B, C, H, W); of a linear layer they come last
        scores.append((part.sum((0, 2, 3)) if isinstance(layer, nn.Conv2d) else part.flatten(0, -2).sum(0)).abs())
    rows = [g.detach().flatten(1).float().cpu() for g in grads[len(acts) :]]
    return torch.cat(scores).float().cpu(), rows
