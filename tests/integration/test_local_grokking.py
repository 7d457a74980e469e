"""Local grokking's program on made-up data, and its comparison by hand."""

from __future__ import annotations

import json

import pytest

from llm_unlearn.report.local_grokking import PUBLISHED, compare, lines_grid, nearest_half
from llm_unlearn.report.tables import grids_markdown


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("local_grokking")


@pytest.fixture(scope="module")
def ran(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    argv = ["--quick", "--jobs", "1", "--runs", str(folder / "runs"), "--out", str(folder / "out.json")]
    program.main(argv)
    return folder, argv, json.loads((folder / "out.json").read_text())


@pytest.mark.integration
def test_every_draw_of_both_groups_is_unlearned_and_set_beside_the_unseen(ran):
    folder, _, told = ran
    assert told["left_out"] == []
    places = {(r["kind"], r["matched"], r["seed"], r["method"]) for r in told["rows"]}
    assert len(told["rows"]) == len(places) == 2 * 2 * 3 * 2
    assert all(0 <= r[name] <= 1 for r in told["rows"] for name in ("forget", "retain", "start", "unseen"))
    assert any(r["forget"] < r["start"] for r in told["rows"])
    groups = told["groups"]
    assert min(groups["questions"].values()) == max(min(n) for n in groups["by_early_epoch"].values())
    frequency = groups["standardised_difference"]["frequency"]
    assert abs(frequency["matched"]) <= 0.25 < abs(frequency["as_published"])
    gold = json.loads((next((folder / "runs").glob("unseen-*")) / "run.json").read_text())
    n_forgotten = len(
        json.loads(next((folder / "runs").glob("data-*/manifest.json")).read_text())["meta"]["forget_rows"]
    )
    assert gold["train_items"] == 120 - n_forgotten < 120
    lines = [line for line in told["lines"] if line["measure"] == "forget"]
    assert [line["method"] for line in lines] == ["ga", "idk"]
    assert all(line[way]["difference"]["n"] == 3 for line in lines for way in ("as_published", "matched"))


@pytest.mark.integration
def test_what_is_finished_is_not_run_again(program, ran, monkeypatch):
    folder, argv, told = ran
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
    monkeypatch.setattr("llm_unlearn.train.loop.train", None)
    program.main(argv)
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()} == before
    assert json.loads((folder / "out.json").read_text())["lines"] == told["lines"]


def row(kind, seed, forget, **changes):
    plain = {"matched": False, "size": 50, "method": "ga", "unseen": 0.1, "retain": 0.9}
    return {"kind": kind, "seed": seed, "forget": forget, **plain, **changes}


def test_differences_are_over_paired_draws():
    early, late = (0.3, 0.4, 0.5), (0.5, 0.5, 0.9)
    rows = [row("local_grok", s, v) for s, v in enumerate(early)] + [
        row("local_ungrok", s, v, unseen=0.2) for s, v in enumerate(late)
    ]
    rows += [row("local_grok", 3, 0.0), {**row("local_ungrok", 4, 0.0), "error": "diverged"}]
    lines = {line["measure"]: line for line in compare(rows, ["ga"], 50)}
    line = lines["forget"]["as_published"]
    assert line["seeds"] == [0, 1, 2], "a draw without its partner does not count"
    assert line["difference"]["mean"] == pytest.approx((-0.2 - 0.1 - 0.4) / 3)
    assert line["difference"]["lo"] < line["difference"]["mean"] < line["difference"]["hi"]
    assert lines["above_unseen"]["as_published"]["difference"]["mean"] == pytest.approx(-0.7 / 3 + 0.1)
    assert lines["forget"]["published"] == PUBLISHED["forget"]["ga"]
    assert lines["forget"]["matched"] == {"seeds": [], "values": [[], []]}
    text = grids_markdown([lines_grid(list(lines.values()))])
    assert "| forget, 50 examples | GA | 0.344 / 0.518 | -0.174 | 0.400 / 0.633 | -0.233 [" in text
    assert text.count("\n| ") == 2 + 3


def test_the_rate_that_leaves_half():
    rows = [{"method": "ga", "lr": lr, "forget": v} for lr, v in (("1", 0.9), ("1", 0.7), ("2", 0.5), ("2", 0.3))]
    assert nearest_half(rows)["ga"]["lr"] == "2"
    diverged = [*rows, {"method": "ga", "lr": "2", "error": "x"}, {"method": "npo", "lr": "1", "error": "x"}]
    assert {m: its["lr"] for m, its in nearest_half(diverged).items()} == {"ga": "1"}
