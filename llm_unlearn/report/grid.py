"""The form every table has before it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["start", "gold", "method", "collapsed", "section"]


@dataclass(frozen=True)
class Row:
    """One line of a grid; `kind` says how it may be styled. A section row has one cell."""

    cells: tuple[str, ...]
    kind: RowKind = "method"


@dataclass(frozen=True)
class Grid:
    """A table of text with what is to be said below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
