"""Similarity of features: centred kernel alignment, unbiased between paired rows, and as the paper prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.draws import stratum
from llm_unlearn.seeding import rng

MIN_ROWS = 4
QUANTILES = (0.025, 0.5, 0.975)


def hsic1(k_nn: Tensor, l_nn: Tensor) -> Tensor:
    """Unbiased estimator of HSIC from two kernel matrices of the same n rows: () of any sign.

        1 / (n (n - 3)) * [ tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) * 1'KL1 ],  diagonals of K, L set to 0

    Source: Song et al. 2012, JMLR 13, eq. 5; Nguyen et al. 2021, arXiv:2010.15327, eq. 3.

    Raises UserError for fewer than 4 rows.
    """
    n = len(k_nn)
    if n < MIN_ROWS:
        raise UserError(f"CKA needs at least {MIN_ROWS} rows, got {n}; raise --items or choose a larger split")
    off = 1 - torch.eye(n, dtype=k_nn.dtype, device=k_nn.device)
    k_nn, l_nn = k_nn * off, l_nn * off
    sums = k_nn.sum(0), l_nn.sum(0)
    within = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return ((k_nn * l_nn).sum() + within - 2 / (n - 2) * (sums[0] @ sums[1])) / (n * (n - 3))


def cka(x_nH: Tensor, y_nH: Tensor, batch: int | None = None) -> float:
    """Unbiased linear CKA of two feature matrices whose rows belong together: 1 if alike, about 0 if unrelated.

        HSIC1(K, L) / sqrt( HSIC1(K, K) * HSIC1(L, L) ),  K = X X', L = Y Y'

    Source: Nguyen et al. 2021, arXiv:2010.15327, eqs. 2-4: over batches the three HSIC1 terms are averaged before the
    ratio is taken.

    Args:
        x_nH: (n, H1) features.
        y_nH: (n, H2) features of the same n rows, by another model or layer, or of rows matched with them.
        batch: rows of a batch, >= 4; a smaller remainder joins the last one. Default: all at once.

    Returns:
        The value; nan where one side does not vary. Raises UserError for fewer than 4 rows, or unequal numbers of them.
    """
    if len(x_nH) != len(y_nH):
        raise UserError(f"CKA compares paired rows, got {len(x_nH)} and {len(y_nH)}; give the same rows to both")
    if batch is not None and batch < MIN_ROWS:
        raise UserError(f"CKA needs batches of at least {MIN_ROWS} rows, got {batch}; raise the batch")
    n = len(x_nH)
    size = min(batch or n, n)
    starts = [b for b in range(0, n, size or 1) if n - b >= min(MIN_ROWS, n)] or [0]
    terms = []
    for begin, end in zip(starts, [*starts[1:], n], strict=True):
        k, l = (part[begin:end].double() for part in (x_nH, y_nH))  # noqa: E741
        k, l = k - k.mean(0), l - l.mean(0)  # noqa: E741  # changes nothing but rounding: HSIC1 does not mind a shift
        k, l = k @ k.T, l @ l.T  # noqa: E741
        terms.append(torch.stack([hsic1(k, l), hsic1(k, k), hsic1(l, l)]))
    kl, kk, ll = torch.stack(terms).mean(0).tolist()
    return kl / float(np.sqrt(kk * ll)) if kk > 0 and ll > 0 else float("nan")


def cka_biased(x_nH: Tensor, y_nH: Tensor) -> float:
    """Biased linear CKA, in [0, 1]: |Yc'Xc|_F^2 / (|Xc'Xc|_F |Yc'Yc|_F), columns centred.

    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3. Well above 0 for unrelated rows unless n is far above
    the number of features.
    """
    x, y = (f.double() - f.double().mean(0) for f in (x_nH, y_nH))
    length = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / length) if length > 0 else float("nan")


def cka_paper(x_nH: Tensor, y_mH: Tensor, *, n_shuffles: int = 100, seed: int = 0) -> dict[str, Any]:
    """Return the CKA of arXiv:2512.03437, biased and between rows that have no pairing, with its null.

    Forget features against retain features, of the longer as many rows as the shorter has, drawn by the seed. There is
    no pairing, so any order of the rows is as good as the one given: only a value outside the null's range would say
    something.

    Returns:
        {"value", "null_mean", "null_quantiles" (2.5, 50, 97.5 % over shuffles of the retain rows), "n"}.

    Raises UserError for fewer than 4 rows.
    """
    n = min(len(x_nH), len(y_mH))
    if n < MIN_ROWS:
        raise UserError(f"CKA needs at least {MIN_ROWS} rows, got {n}; raise --items or choose a larger split")
    x, y = (f if len(f) == n else f[_drawn(len(f), n, seed)] for f in (x_nH, y_mH))
    orders = (torch.from_numpy(rng(seed, "cka", k).permutation(n)) for k in range(n_shuffles))
    null = np.array([cka_biased(x, y[order.to(y.device)]) for order in orders])
    return {
        "value": cka_biased(x, y),
        "null_mean": float(null.mean()),
        "null_quantiles": [float(q) for q in np.quantile(null, QUANTILES)],
        "n": n,
    }


def _drawn(m: int, n: int, seed: int) -> list[int]:
    return sorted(int(i) for i in rng(seed, "cka", "rows").permutation(m)[:n])


def shuffle_null(x_nH: Tensor, y_nH: Tensor, *, n_shuffles: int = 100, seed: int = 0) -> list[float]:
    """Return the 2.5, 50 and 97.5 % quantiles of unbiased CKA over shuffles of the second's rows."""
    orders = (torch.from_numpy(rng(seed, "cka", k).permutation(len(y_nH))) for k in range(n_shuffles))
    null = [cka(x_nH, y_nH[order.to(y_nH.device)]) for order in orders]
    return [float(q) for q in np.quantile(null, QUANTILES)]


def matched_rows(forget: Sequence[QARow], retain: Sequence[QARow], seed: int) -> tuple[list[int], list[int]]:
    """Pair each forget row with a retain row of its stratum (relation and wording; class), each used once.

    Returns the paired numbers of both; forget rows without a partner left are left out.
    """
    order = rng(seed, "cka", "pairs").permutation(len(retain))
    waiting: dict[tuple[str, ...], list[int]] = {}
    for i in order:
        waiting.setdefault(stratum(retain[int(i)]), []).append(int(i))
    pairs = [(i, left.pop()) for i, row in enumerate(forget) if (left := waiting.get(stratum(row)))]
    return [i for i, _ in pairs], [j for _, j in pairs]
