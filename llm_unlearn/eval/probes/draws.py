"""Which rows are compared with which: groups of retain rows made like the forget set, and who is akin to whom."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from llm_unlearn.data.images import ImageRow
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.seeding import rng


@dataclass(frozen=True)
class Draw:
    """Row numbers of one resample: n rows to forget, and two disjoint groups of n to retain.

    `matched` is the share of the 2n that lie in the stratum of the forget row they stand for.
    """

    forget: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    matched: float


def stratum(row: QARow, *, wording: bool = True) -> tuple[str, ...]:
    """What a comparison holds equal: an image's class; a question's relation and, with `wording`, its template."""
    if isinstance(row, ImageRow):
        return (row.answer,)
    return (row.relation, row.template) if wording else (row.relation,)


def kinship(a: QARow, b: QARow) -> str:
    """How two rows are related: "same_class" or "other" of images; else "same_author", "same_relation" or "other"."""
    if isinstance(a, ImageRow):
        return "same_class" if a.answer == b.answer else "other"
    if a.author and a.author == b.author:
        return "same_author"
    return "same_relation" if a.relation and a.relation == b.relation else "other"


def draw_groups(
    forget: Sequence[QARow], retain: Sequence[QARow], n_draws: int, seed: int, max_rows: int = 10**9
) -> list[Draw]:
    """Draw groups of retain rows of the forget set's size and composition, two disjoint ones per draw.

    A group takes from every stratum as many rows as the forget rows have there, and the rest from any other where
    retain has too few (a forgotten class has none). Where the forget set holds whole authors, so do the groups: rows
    are taken author after author in a random order, the two groups from different halves of the authors; questions of
    one author have more in common than those of many, and a group of scattered rows would be no null for that. Authors
    are not asked everything in every wording, so strata are then relations whatever the wording.

    Args:
        forget: rows asked to be forgotten.
        retain: rows to be kept.
        n_draws: number of draws.
        seed: same seed, same draws.
        max_rows: most rows a group may have; beyond, or with fewer than twice as many rows to retain, the forget rows
            are a random subset, the same in every draw.

    Raises UserError for an empty forget set, or fewer than 2 retain rows.
    """
    if not forget:
        raise UserError("the forget set is empty; give data with a forget request (eval: --data, --forget-split)")
    if len(retain) < 2:
        raise UserError(f"retain holds {len(retain)} rows, two groups need at least 2; lower scenario.size")
    n = min(len(forget), len(retain) // 2, max_rows)
    mine = sorted(int(i) for i in rng(seed, "probe", "forget").permutation(len(forget))[:n])
    gone, asked = {row.author for row in forget}, {stratum(row, wording=False) for row in forget}
    alike = {row.author for row in retain if stratum(row, wording=False) in asked}
    whole = "" not in gone and gone.isdisjoint(alike)
    key = partial(stratum, wording=not whole)
    wanted = Counter(key(forget[i]) for i in mine)
    keys = [key(row) for row in retain]
    draws = []
    for k in range(n_draws):
        halves = _halves(retain, whole, rng(seed, "probe", "retain", k))
        # a half may run short of a stratum: the rest comes from what the other group leaves
        first, exact = _take(keys, [*halves[0], *halves[1]], wanted, n, set())
        second, also = _take(keys, [*halves[1], *halves[0]], wanted, n, set(first))
        draws.append(Draw(tuple(mine), tuple(first), tuple(second), (exact + also) / (2 * n)))
    return draws


def _halves(retain: Sequence[QARow], whole: bool, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return the retain rows in two halves, each in a random order: author after author, or row by row."""
    units: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(retain):
        units[row.author if whole and row.author else f"#{i}"].append(i)
    names = list(units)
    order = [names[int(k)] for k in draw.permutation(len(names))]
    sides = order[0::2], order[1::2]
    return [i for name in sides[0] for i in units[name]], [i for name in sides[1] for i in units[name]]


def _take(
    keys: Sequence[tuple[str, ...]], order: Sequence[int], wanted: Counter, n: int, taken: set[int]
) -> tuple[list[int], int]:
    """Return n row numbers in the order given, strata first, and how many of them are in a stratum wanted."""
    left, free = Counter(wanted), [i for i in order if i not in taken]
    chosen: list[int] = []
    for i in free:
        if left[keys[i]] > 0:
            left[keys[i]] -= 1
            chosen.append(i)
    exact, have = len(chosen), set(chosen)
    chosen += [i for i in free if i not in have][: n - exact]
    return chosen, exact
