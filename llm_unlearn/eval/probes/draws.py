"""Which rows are compared with which: groups of retain rows made like the forget set, and who is akin to whom."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.data.images import ImageRow
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.seeding import rng

Stratum = tuple[str, ...] | None


@dataclass(frozen=True)
class Draw:
    """Row numbers of one resample: n rows to forget, and two disjoint groups of n to retain.

    `matched` is the share of rows whose stratum retain has too: there all three groups are of one composition. The
    others stand for a stratum that is forgotten as a whole.
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
    order a group takes from every stratum as many rows as the forget rows have there, at most half of what is kept of
    it: forget rows beyond that are left out, else the first group would be of their classes and the second of others. A
    stratum that is forgotten as a whole is stood for by rows of strata that nothing is forgotten of. Authors are not
    asked everything in every wording, so strata of whole authors are relations whatever the wording.

    Args:
        forget: rows asked to be forgotten.
        retain: rows to be kept.
        n_draws: number of draws.
        seed: same seed, same draws.
        max_rows: most rows a group may have; beyond, or with fewer than twice as many rows to retain in a stratum, the
            forget rows are a subset, drawn unit after unit too and the same in every draw.

    Raises UserError for an empty forget set, or fewer than 2 retain rows.
    """
    if not forget:
        raise UserError("the forget set is empty; give data with a forget request (eval: --data, --forget-split)")
    if len(retain) < 2:
        raise UserError(f"retain holds {len(retain)} rows, two groups need at least 2; lower scenario.size")
    unit = _unit_of(forget, retain)
    gone = _units(forget, unit, rng(seed, "probe", "forget"))
    order, hops = [i for rows in gone for i in rows], {row.hop for row in forget}
    asked, kept = _strata(forget, retain, wording=unit is not _author)
    mine = _take(asked, order, Counter({key: n // 2 for key, n in Counter(kept).items()}))[:max_rows]
    if not mine:  # a row is kept of each stratum, and cannot be in two groups
        asked, kept = [None] * len(forget), [None] * len(retain)
        mine = order[: min(len(retain) // 2, max_rows)]
    wanted, least = Counter(asked[i] for i in mine), min(map(len, gone)) / 2
    draws = []
    for k in range(n_draws):
        units = _units(retain, unit, rng(seed, "probe", "retain", k))
        # like with like first: as many steps to answer, and no handful of rows in place of a whole relation
        units.sort(key=lambda rows: (retain[rows[0]].hop not in hops, len(rows) < least))
        halves = [[i for rows in units[side::2] for i in rows] for side in (0, 1)]
        # a half may run short of a stratum: the rest comes from what the other group leaves
        first = _take(kept, [*halves[0], *halves[1]], wanted)
        taken = set(first)
        second = _take(kept, [i for i in [*halves[1], *halves[0]] if i not in taken], wanted)
        draws.append(Draw(tuple(sorted(mine)), tuple(first), tuple(second), 1 - wanted[None] / len(mine)))
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


def _strata(forget: Sequence[QARow], retain: Sequence[QARow], *, wording: bool) -> tuple[list[Stratum], list[Stratum]]:
    """Return the stratum of every row; None where only one of the two sets has it."""
    sides = [[stratum(row, wording=wording) for row in rows] for rows in (forget, retain)]
    both = set(sides[0]) & set(sides[1])
    asked, kept = ([key if key in both else None for key in side] for side in sides)
    return asked, kept


def _take(strata: Sequence[Stratum], order: Sequence[int], wanted: Counter[Stratum]) -> list[int]:
    """Return row numbers in the order given, of every stratum as many as wanted or as there are."""
    left, chosen = Counter(wanted), []
    for i in order:
        if left[strata[i]] > 0:
            left[strata[i]] -= 1
            chosen.append(i)
    return chosen
