"""Which rows are compared with which: groups of retain rows made like the forget set, and who is akin to whom."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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

    Where the forget set holds whole authors, so do the groups, and where it holds whole classes or relations, so do
    they: rows are taken unit after unit in a random order, the two groups from different units. Rows of one author or
    class have more in common than those of many, and a group of scattered rows would be no null for that. Within that
    order a group takes from every stratum as many rows as the forget rows have there, and then any others: a forgotten
    class has no stratum in retain. Authors are not asked everything in every wording, so strata of whole authors are
    relations whatever the wording.

    Args:
        forget: rows asked to be forgotten.
        retain: rows to be kept.
        n_draws: number of draws.
        seed: same seed, same draws.
        max_rows: most rows a group may have; beyond, or with fewer than twice as many rows to retain, the forget rows
            are a subset, drawn unit after unit too and the same in every draw.

    Raises UserError for an empty forget set, or fewer than 2 retain rows.
    """
    if not forget:
        raise UserError("the forget set is empty; give data with a forget request (eval: --data, --forget-split)")
    if len(retain) < 2:
        raise UserError(f"retain holds {len(retain)} rows, two groups need at least 2; lower scenario.size")
    n = min(len(forget), len(retain) // 2, max_rows)
    unit = _unit_of(forget, retain)
    key = partial(stratum, wording=unit is not _author)
    gone = _units(forget, unit, rng(seed, "probe", "forget"))
    mine = [i for rows in gone for i in rows][:n]
    wanted, hops = Counter(key(forget[i]) for i in mine), {row.hop for row in forget}
    keys, least = [key(row) for row in retain], min(map(len, gone)) / 2
    draws = []
    for k in range(n_draws):
        units = _units(retain, unit, rng(seed, "probe", "retain", k))
        # like with like first: as many steps to answer, and no handful of rows in place of a whole relation
        units.sort(key=lambda rows: (retain[rows[0]].hop not in hops, len(rows) < least))
        halves = [[i for rows in units[side::2] for i in rows] for side in (0, 1)]
        # a half may run short of a stratum: the rest comes from what the other group leaves
        first, exact = _take(keys, [*halves[0], *halves[1]], wanted, n, set())
        second, also = _take(keys, [*halves[1], *halves[0]], wanted, n, set(first))
        draws.append(Draw(tuple(sorted(mine)), tuple(first), tuple(second), (exact + also) / (2 * n)))
    return draws


def _author(row: QARow) -> str | None:
    return row.author or None


def _kind(row: QARow) -> str | None:
    return " ".join(stratum(row, wording=False))


def _scattered(_row: QARow) -> None:
    return None


def _unit_of(forget: Sequence[QARow], retain: Sequence[QARow]) -> Callable[[QARow], str | None]:
    """Return what the forget set holds the whole of: classes or relations, authors, or nothing but rows."""
    asked = {_kind(row) for row in forget}
    alike = {row.author for row in retain if _kind(row) in asked}
    if not alike:
        return _kind
    gone = {row.author for row in forget}
    return _author if "" not in gone and gone.isdisjoint(alike) else _scattered


def _units(rows: Sequence[QARow], unit: Callable[[QARow], str | None], draw: np.random.Generator) -> list[list[int]]:
    """Return the row numbers of every unit, units and the rows within them in a random order."""
    units: dict[str, list[int]] = defaultdict(list)
    for i in draw.permutation(len(rows)):
        units[unit(rows[i]) or f"#{i}"].append(int(i))
    return list(units.values())


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
