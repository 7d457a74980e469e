"""Forget requests over images: classes, shares of classes, sub-classes, random images; and what is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.seeding import rng

if TYPE_CHECKING:
    from llm_unlearn.data.splits import Request, Scenario

CLASS, SUBCLASS = "class:", "subclass:"
KINDS = ("class", "subclass", "random")


def draw_images(corpus: Corpus, scenario: Scenario) -> frozenset[str]:
    """Return what a scenario asks to be forgotten: ids of images, of a class or of a sub-class.

    class: `classes`, or `size` of them drawn by the seed; with `share`, that share of each one's images. subclass:
    `size` sub-classes of different classes. random: `share` of all images, or `size` of them. Draws of one seed are
    nested. A whole class is forgotten as such: its test images are then no longer asked of gold either.

    Raises UserError for another kind, an unknown class, more than half of what there is, and a draw that leaves a class
    that is not forgotten as a whole without images to retain.
    """
    train = corpus.split("train")
    if scenario.kind not in KINDS:
        raise UserError(f"scenario.kind={scenario.kind}: is for questions; images have {', '.join(KINDS)}")
    draw = rng(scenario.seed, "forget", scenario.kind)
    if scenario.kind == "random":
        n = scenario.size if scenario.share is None else round(scenario.share * len(train))
        facts = _first([row.fact_id for row in train], n, draw, "images")
    elif scenario.kind == "subclass":
        facts = _subclasses(train, scenario, draw)
    else:
        chosen = _classes(corpus, scenario, draw)
        if scenario.share is None:
            return frozenset(f"{CLASS}{name}" for name in chosen)
        facts = [fact for name in chosen for fact in _share_of(train, name, scenario, draw)]
    if not facts:
        raise UserError(
            f"forget set is empty: share {scenario.share} of {len(train)} images is none; raise scenario.share"
        )
    return _leaving_all(train, frozenset(facts))


def image_splits(corpus: Corpus, request: Request) -> dict[str, tuple[QARow, ...]]:
    """Return what is measured: `forget`, `retain`; of the images never trained on `test` (whatever is not asked to be
    forgotten), `holdout` (those like the forgotten: what a model that never saw the forgotten makes of them) and
    `bystander` (those of classes nothing is forgotten of; absent where there are none). With validation images, which
    choose and are never measured, `val` and `val_holdout` are to them what `test` and `holdout` are to the test images.
    """
    train = corpus.split("train")
    forget = [train[i] for i in request.forget]
    gone = {row.answer for row in forget}

    def apart(rows: Sequence[QARow]) -> tuple[list[QARow], list[QARow]]:
        asked = [row for row in rows if not request.touches(row)]
        return asked, [row for row in rows if request.touches(row)] or [row for row in rows if row.answer in gone]

    test, val = corpus.split("test"), corpus.splits.get("val", ())
    splits = {
        "forget": forget,
        "retain": [train[i] for i in request.retain],
        **dict(zip(("test", "holdout"), apart(test), strict=True)),
        "bystander": [row for row in test if row.answer not in gone],
        **dict(zip(("val", "val_holdout"), apart(val), strict=True)),
    }
    return {name: tuple(rows) for name, rows in splits.items() if rows}


def _classes(corpus: Corpus, scenario: Scenario, draw) -> list[str]:
    names = list(corpus.meta["classes"])
    for name in scenario.classes:
        if name not in names:
            raise UserError(f"unknown class '{name}' in scenario.classes{suggest(name, names)}")
    return list(scenario.classes) or _first(names, scenario.size, draw, "classes")


def _subclasses(train: Sequence[QARow], scenario: Scenario, draw) -> list[str]:
    by_class: dict[str, list[str]] = {}
    for row in train:
        for fact in row.facts:
            if fact.startswith(SUBCLASS) and fact not in by_class.setdefault(row.answer, []):
                by_class[row.answer].append(fact)
    if not by_class:
        raise UserError("scenario.kind=subclass: this data has no sub-classes; set data.image.clusters=2")
    chosen = list(scenario.classes) or _first(sorted(by_class), scenario.size, draw, "classes with sub-classes")
    for name in chosen:
        if name not in by_class:
            raise UserError(f"unknown class '{name}' in scenario.classes{suggest(name, by_class)}")
    return [sorted(by_class[name])[int(draw.integers(len(by_class[name])))] for name in chosen]


def _share_of(train: Sequence[QARow], name: str, scenario: Scenario, draw) -> list[str]:
    ids = [row.fact_id for row in train if row.answer == name]
    assert scenario.share is not None
    return [ids[int(i)] for i in draw.permutation(len(ids))[: round(scenario.share * len(ids))]]


def _first(pool: Sequence[str], n: int, draw, what: str) -> list[str]:
    if n > len(pool) // 2:
        raise UserError(f"scenario asks for {n} {what} of {len(pool)}; forget at most half ({len(pool) // 2})")
    return [pool[int(i)] for i in draw.permutation(len(pool))[:n]]


def _leaving_all(train: Sequence[QARow], facts: frozenset[str]) -> frozenset[str]:
    kept = Counter(row.answer for row in train if facts.isdisjoint(row.facts))
    if empty := sorted({row.answer for row in train} - kept.keys()):
        raise UserError(
            f"scenario leaves no images of class {', '.join(empty)} to retain; forget fewer, or the class as a whole "
            "(kind=class without share)"
        )
    return facts
