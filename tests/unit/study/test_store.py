"""The study's records: one whole file per cell, whatever happens to the writer."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.study.matrix import Cell
from llm_unlearn.study.store import SCHEMA_VERSION, Store, environment

CELL = Cell("abc", "train", "seed0", {"seed": 0})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "study")


def cell(name: object) -> Cell:
    return Cell(f"id{name}", "unlearn", f"cell {name}", {"seed": name})


def test_a_record_says_what_was_run_and_where(store):
    assert store.read(CELL) is None
    store.write(CELL, "ok", {"value": 1.5}, seconds=2.0)
    record = store.read(CELL)
    assert {k: record[k] for k in ("id", "kind", "label", "spec", "status", "result", "seconds")} == {
        "id": "abc", "kind": "train", "label": "seed0", "spec": {"seed": 0}, "status": "ok",
        "result": {"value": 1.5}, "seconds": 2.0,
    }  # fmt: skip
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["environment"] == environment()
    assert record["environment"]["versions"]["torch"]


@pytest.mark.parametrize("blow", [KeyboardInterrupt, OSError])
def test_a_writer_killed_before_the_rename_leaves_the_old_record(blow, store, monkeypatch):
    store.write(CELL, "failed", error="first")

    def killed(*_args):
        raise blow

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises((KeyboardInterrupt, UserError)):
        store.write(CELL, "ok", {"value": 1})
    assert store.read(CELL)["error"] == "first"
    monkeypatch.undo()
    store.write(CELL, "ok", {"value": 1})
    assert store.read(CELL)["status"] == "ok"
    assert [p.name for p in store.folder.iterdir()] == ["abc.json"]


def test_only_failed_and_missing_cells_are_to_be_run(store):
    cells = [cell(s) for s in ("ok", "censored", "failed", "missing")]
    for c in cells[:3]:
        store.write(c, c.id.removeprefix("id"))
    assert [store.done(c) for c in cells] == [True, True, False, False]
    assert store.status(cells) == {c.id.removeprefix("id"): [c] for c in cells}


def test_what_can_run_now_waits_for_nothing_without_a_result(store):
    train = [Cell(name, "train", name, {}) for name in "abcd"]
    cells = [*train, *(Cell(f"{c.id}-x", "unlearn", c.id, {}, (c.id,)) for c in train)]
    assert store.ready(cells) == [0, 1, 2, 3]
    for c, status in zip(train, ("ok", "censored", "failed"), strict=False):
        store.write(c, status)
    assert store.ready(cells) == [2, 3, 4, 5]
    store.write(cells[4], "ok")
    assert store.ready(cells) == [2, 3, 5]


def test_a_record_of_a_newer_version_is_refused(store):
    store.write(CELL, "ok")
    path = store.folder / "abc.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA_VERSION + 1}))
    for look in (store.read, store.done, lambda c: store.status([c])):
        with pytest.raises(UserError, match=r"abc\.json: written by a newer version.*update llm-unlearn"):
            look(CELL)


def _write_some(study, numbers):
    for number in numbers:
        Store(study).write(cell(number), "ok", {"value": number})


def test_writers_side_by_side_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_write_some, [tmp_path] * 8, [range(k, 64, 8) for k in range(8)]))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(_write_some, [tmp_path] * 2, [range(64, 72), range(72, 80)]))
    found = [Store(tmp_path).read(cell(k)) for k in range(80)]
    assert [record["result"]["value"] for record in found] == list(range(80))
    assert len(list((tmp_path / "cells").iterdir())) == 80


def test_writers_of_one_cell_leave_one_whole_record(store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: store.write(CELL, "ok", {"value": [k] * 500}), range(32)))
    values = store.read(CELL)["result"]["value"]
    assert values == [values[0]] * 500
    assert [p.name for p in store.folder.iterdir()] == ["abc.json"]
