"""Do forgetting and keeping pull at the same weights? Cosines of mean gradients, with their null.

The paper's number is the cosine of the gradients of whole sets (`cos_whole`), which is near 1 for any two sets whose
items share a direction. So beside it stand groups of equal size and composition, the same cosine between two groups
that are both kept (the null), and the excess of one over the other. All cosines keep their sign.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import Item
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.draws import Draw, kinship
from llm_unlearn.eval.probes.passes import (
    TokenLoss,
    answer_values,
    cross_entropy,
    evaluating,
    margin_loss,
    mean_gradients,
    trained_weights,
)

Gradient = Sequence[Tensor]
EXACT_FLOATS, SKETCH = 1 << 28, 4096  # all gradients of a pairwise probe in 1 GB, else sketched to this many numbers
QUANTILES = (0.025, 0.5, 0.975)


def groups_of(name: str) -> tuple[str, ...]:
    """Return the groups a weight belongs to: "all", its numbered block ("model.layers.0"), and its part of the block
    ("model.layers.0.self_attn"); without a number in its name, "all" and its module.
    """
    path = name.rsplit(".", 1)[0].split(".")
    at = next((i for i, part in enumerate(path) if re.fullmatch(r"\d+", part)), None)
    if at is None:
        return "all", ".".join(path)
    return tuple(dict.fromkeys(("all", ".".join(path[: at + 1]), ".".join(path[: at + 2]))))


def products(a: Gradient, b: Gradient) -> np.ndarray:
    """Inner product of two gradients, weight by weight: (P,) float64 for P tensors."""
    return np.array([float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)])


def cosine(dot: float, square_a: float, square_b: float) -> float:
    """Cosine from an inner product and two squared lengths; nan where a length is 0."""
    length = float(np.sqrt(square_a * square_b))
    return float(np.clip(dot / length, -1, 1)) if length > 0 else float("nan")


def gradient_alignment(
    model: Any, forget: Sequence[Item], retain: Sequence[Item], draws: Sequence[Draw], squares: Gradient | None = None
) -> dict[str, Any]:
    """Return cosines between the gradients of forget and retain groups, by variant of the loss and group of weights.

        cos_FR = mean_k cos(g_F, g_R1k)     cos_RR = mean_k cos(g_R1k, g_R2k)     excess = cos_FR - cos_RR

    where g is the gradient of the mean loss over a group's answer tokens. Variants: `ce` (cross-entropy), `margin`
    (minus the logit of the answer above the mean of the others), `temperature` (cross-entropy of logits over their
    standard deviation over the vocabulary, root mean square over all forget tokens: one number, held constant) and,
    with `squares`, `adam` (ce gradients over sqrt(v) + 1e-8; weights with v = 0, such as embeddings of tokens
    that none of its items has, are left out: Adam would never divide their gradient by nothing).

    Args:
        model: AnswerModel or its counterpart for images.
        forget: items asked to be forgotten.
        retain: items to be kept.
        draws: from `draws.draw_groups`.
        squares: v, per trained weight, from `item_gradients`.

    Returns:
        {"n", "draws", "matched", "logit_std", "cos_whole" (cos(g_F, g_R), ce, of all that is given), "variants":
        {variant: {group of weights: {"cos_FR", "cos_RR", "excess", "null_quantiles" (2.5, 50, 97.5 % of cos(R1, R2)),
        "cos_pooled" (with the sum over all draws), "angle_FR" in degrees, "norm_F", "norm_R", "norm_ratio",
        "collateral" (mean g_F . g_R1)}}}}. Ascent on the forget loss with a small step eta raises the retain loss by
        eta * collateral.
    """
    with evaluating(model):
        f, r = (mean_gradients(model, items, [cross_entropy])[0] for items in (forget, retain))
        fr, ff, rr = (float(products(*pair).sum()) for pair in ((f, r), (f, f), (r, r)))
        mine = [forget[i] for i in draws[0].forget]
        scale = float(answer_values(model, mine, _variance).mean().sqrt())
        losses: dict[str, TokenLoss] = {
            "ce": cross_entropy,
            "margin": margin_loss,
            "temperature": partial(_tempered, scale=scale),
        }
        take = partial(_variants, model, losses, squares)
        own = take(mine)
        sums = {variant: [torch.zeros_like(t) for t in g] for variant, g in own.items()}
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for draw in draws:
            first, second = (take([retain[i] for i in group]) for group in (draw.first, draw.second))
            for variant, g in own.items():
                a, b = first[variant], second[variant]
                found[variant].append(np.stack([products(*p) for p in ((g, a), (a, b), (a, a), (b, b))]))
                sums[variant] = [s + x + y for s, x, y in zip(sums[variant], a, b, strict=True)]
    names = list(trained_weights(model))
    return {
        "n": len(mine),
        "draws": len(draws),
        "matched": float(np.mean([draw.matched for draw in draws])),
        "logit_std": scale,
        "cos_whole": cosine(fr, ff, rr),
        "variants": {
            variant: _by_group(names, products(g, g), np.stack(found[variant]), g, sums[variant])
            for variant, g in own.items()
        },
    }


def item_gradients(
    model: Any, items: Sequence[Item], seed: int, exact_floats: int = EXACT_FLOATS
) -> tuple[Tensor, list[Tensor]]:
    """Return every item's gradient of its mean cross-entropy, and their mean squares.

    Args:
        items: n of them, one forward and backward pass each.
        exact_floats: above so many numbers in all, gradients are sketched to 4,096 numbers each (count sketch: every
            weight is added, with a random sign, to a random one of them; inner products stay right on average, cosines
            to about 1 / sqrt(4096)).

    Returns:
        (gradients (n, D) float32, v: mean over items of the squared gradient, per trained weight, float32). v is what
        Adam's second moment would be with beta2 near 1 and batches of one item; that of real training, over batches, is
        smaller and less noisy.
    """
    weights = list(trained_weights(model).values())
    width = sum(w.numel() for w in weights)
    exact = len(items) * width <= exact_floats
    rows = torch.zeros(len(items), width if exact else SKETCH)
    squares = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    with evaluating(model):
        for row, item in zip(rows, items, strict=True):
            gradient = mean_gradients(model, [item], [cross_entropy])[0]
            for square, g in zip(squares, gradient, strict=True):
                square += g.square() / len(items)
            row.copy_(torch.cat([g.flatten().cpu() for g in gradient]) if exact else _sketch(gradient, seed))
    return rows, squares


def pair_cosines(gradients: Tensor, rows: Sequence[QARow], n_forget: int) -> dict[str, dict[str, float]]:
    """Return mean and mean absolute cosine over pairs of items' gradients.

    Args:
        gradients: (n, D), from `item_gradients`.
        rows: the n rows they belong to, the n_forget forget rows first.

    Returns:
        {which: {"mean", "mean_abs", "pairs"}} for "all", for each kinship ("same_class", or "same_author" and
        "same_relation"; "other") and for pairs of two forget rows ("FF"), one of each ("FR") and two retain rows
        ("RR"). Pairs with a gradient of zero have no cosine and are left out; what no pair is of is absent.
    """
    lengths = gradients.norm(dim=1, keepdim=True)
    unit = (gradients / lengths.where(lengths > 0, torch.ones_like(lengths))).double()
    table, some = (unit @ unit.T).numpy(), (lengths > 0).squeeze(1).numpy()
    found: dict[str, list[float]] = defaultdict(list)
    for i, j in combinations(range(len(rows)), 2):
        if some[i] and some[j]:
            block = "FF" if j < n_forget else "RR" if i >= n_forget else "FR"
            for which in ("all", kinship(rows[i], rows[j]), block):
                found[which].append(float(table[i, j]))
    if not found:
        raise UserError("no two items have a gradient; the model's loss is flat here")
    return {
        which: {"mean": float(np.mean(c)), "mean_abs": float(np.mean(np.abs(c))), "pairs": len(c)}
        for which, c in found.items()
    }


def _variance(logits_NV: Tensor, _labels_N: Tensor) -> Tensor:
    return logits_NV.var(-1, correction=0)


def _tempered(logits_NV: Tensor, labels_N: Tensor, scale: float) -> Tensor:
    return cross_entropy(logits_NV.float() / max(scale, 1e-12), labels_N)


def _variants(
    model: Any, losses: dict[str, TokenLoss], squares: Gradient | None, items: Sequence[Item]
) -> dict[str, list[Tensor]]:
    out = dict(zip(losses, mean_gradients(model, items, list(losses.values())), strict=True))
    if squares is not None:
        out["adam"] = [(g / (v.sqrt() + 1e-8)).where(v > 0, 0.0) for g, v in zip(out["ce"], squares, strict=True)]
    return out


def _by_group(
    names: Sequence[str], square_P: np.ndarray, found_K4P: np.ndarray, own: Gradient, total: Gradient
) -> dict[str, dict[str, Any]]:
    members: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        for group in groups_of(name):
            members[group].append(i)
    pooled, whole = products(own, total), products(total, total)
    return {
        group: _summary(
            float(square_P[at].sum()), found_K4P[:, :, at].sum(-1), float(pooled[at].sum()), float(whole[at].sum())
        )
        for group, at in members.items()
    }


def _summary(square: float, found_K4: np.ndarray, pooled: float, whole: float) -> dict[str, Any]:
    """Summary of K draws of (g_F . g_1, g_1 . g_2, |g_1|^2, |g_2|^2)."""
    across = np.array([cosine(fr, square, aa) for fr, _, aa, _ in found_K4])
    null = np.array([cosine(rr, aa, bb) for _, rr, aa, bb in found_K4])
    norm, norms = float(np.sqrt(square)), np.sqrt(found_K4[:, 2])
    return {
        "cos_FR": float(across.mean()),
        "cos_RR": float(null.mean()),
        "excess": float(across.mean() - null.mean()),
        "null_quantiles": [float(q) for q in np.quantile(null, QUANTILES)],
        "cos_pooled": cosine(pooled, square, whole),
        "angle_FR": float(np.degrees(np.arccos(across)).mean()),
        "norm_F": norm,
        "norm_R": float(norms.mean()),
        "norm_ratio": norm / float(norms.mean()) if norms.mean() > 0 else float("nan"),
        "collateral": float(found_K4[:, 0].mean()),
    }


def _sketch(gradient: Gradient, seed: int) -> Tensor:
    out = torch.zeros(SKETCH)
    draw = torch.Generator().manual_seed(seed)  # the same for every item
    for g in gradient:
        flat = g.flatten().cpu()
        place = torch.randint(2 * SKETCH, (len(flat),), generator=draw)
        out.index_add_(0, place // 2, torch.where(place % 2 == 0, flat, -flat))
    return out
