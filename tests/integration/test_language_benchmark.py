"""The language study's program: what the declared design plans, and once through at toy size."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_unlearn.cli import app
from llm_unlearn.errors import UserError
from llm_unlearn.eval.packed import unpack
from llm_unlearn.study.arms import wanted
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.reproduce import reproduce
from llm_unlearn.study.tune import Choice, plan_tuning, with_settings

ROOT = Path(__file__).resolve().parents[2]
DESIGN = ROOT / "recipes/configs/study/language.yaml"


ENTRY = {"settings": {"optim": {"lr": 1e-3}}, "feasible": True, "shortfall": 0.0, "damage": 0.0, "trials": 1}


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("language")


@pytest.fixture(scope="module")
def study(program):
    return program.study_config(Namespace(study=None, quick=False, overrides=[]))


def test_the_design_is_as_declared(study):
    cells, primary = wanted(study), study.primary
    core = {(w.checkpoint, w.method) for w in cells if w.scenario == "author" and w.seed < 5}
    assert {(k, m) for k in ("fit", "grok", "easy") for m in study.methods} < core
    assert len(study.methods) >= 10
    for kind in {kind for pair in primary.contrasts for kind in pair}:
        for method in primary.methods:
            seeds = {w.seed for w in cells if (w.scenario, w.checkpoint, w.method) == ("author", kind, method)}
            assert len(seeds) == 10
    three = set(primary.methods)
    for scenario in ("fact", "relation", "random", "author2", "author8"):
        assert {(w.checkpoint, w.method) for w in cells if w.scenario == scenario} == {
            (k, m) for k in ("fit", "grok", "easy") for m in three
        }
    assert {k for k, _ in core} == {"early", "fit", "fit_scaled", "fit_normed", "grok", "post", "easy", "twin", "sam"}
    sha = hashlib.sha256(DESIGN.read_bytes()).hexdigest()
    assert {c.facts["design"] for c in plan(study)} == {sha}


def test_every_place_is_tuned_with_the_same_budget_on_seeds_of_its_own(study):
    trials = [c.spec for c in plan_tuning(study) if c.kind == "tune"]
    tried = Counter((t["scenario"], t["checkpoint"], t["method"]) for t in trials)
    assert set(tried) == {(w.scenario, w.checkpoint, w.method) for w in wanted(study)}
    assert set(tried.values()) == {3 * study.tune.trials}
    assert {t["seed"] for t in trials} == {100, 101, 102}


def test_what_tuning_never_reached_is_left_out(program, study):
    everything = wanted(study)

    def found(*lacking: tuple[str, str]) -> list[Choice]:
        pairs = {(w.checkpoint, w.method) for w in everything}
        return [Choice("", k, m, None if (k, m) in lacking else {"optim.lr": 1e-3}, None, 1, 1) for k, m in pairs]

    assert with_settings(everything, found()) == (everything, [])
    post = [("post", m) for m in study.primary.methods]
    left, left_out = with_settings(everything, found(*post, ("easy", "ga")))
    assert left_out == ["author easy ga", "post"]
    assert set(everything) - set(left) == {
        w for w in everything if w.checkpoint == "post" or (w.checkpoint, w.method) == ("easy", "ga")
    }
    no_ga = found(*((w.checkpoint, "ga") for w in everything))
    assert with_settings(everything, no_ga)[1] == ["ga"]
    # what is trained for the others stays the same: what the primary's runs began from still fits
    trained = {c.id for c in plan(study, program.cells_of(study, ["primary"])) if c.kind == "train"}
    assert trained <= {c.id for c in plan(study, left)}
    with pytest.raises(UserError, match="nothing is left to run: .* no trial of tuning has a result"):
        with_settings(everything, found(*{(w.checkpoint, w.method) for w in everything}))


def test_the_primary_alone_plans_the_same_cells_as_the_whole(program, study, tmp_path):
    only = program.cells_of(study, ["primary"])
    assert len(only) == 90, "3 methods x 3 checkpoints x 10 seeds"

    def tuned(name: str, places: dict[str, list[str]]) -> StudyConfig:
        settings = {kind: dict.fromkeys(methods, ENTRY) for kind, methods in places.items()}
        content = {"seeds": [100], "scenarios": ["author"], "updates": 9, "checkpoints": settings, "by_scenario": {
            "author": settings}}  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
        return study.model_copy(update={"tuned": str(tmp_path / name)})

    every = {w.checkpoint: list(study.methods) for w in wanted(study)}
    whole = {cell.id: cell.label for cell in plan(tuned("whole.yaml", every))}
    partly = tuned("partly.yaml", dict.fromkeys(("fit", "grok", "easy"), list(study.primary.methods)))
    first = plan(partly, only)
    assert {cell.id: cell.label for cell in first}.items() <= whole.items()
    assert Counter(cell.kind for cell in first) == {"train": 40, "unlearn": 90}
    with pytest.raises(UserError, match="has no checkpoint|has no settings"):
        plan(partly)


def test_the_parts_of_the_study_are_all_of_it(program, study):
    parts = {name: set(program.cells_of(study, [name])) for name in program.PARTS}
    assert {name: len(cells) for name, cells in parts.items()} == {
        "primary": 90, "methods": 135, "checkpoints": 90, "scenarios": 225}  # fmt: skip
    assert set().union(*parts.values()) == set(wanted(study)) == set(program.cells_of(study, []))
    assert program.cells_of(study, ["methods", "primary"]) == [
        w for w in wanted(study) if w in parts["methods"] | parts["primary"]
    ]
    single = {name: set(program.cells_of(study, [name])) for name in study.scenarios if name != "author"}
    assert set().union(*single.values()) == parts["scenarios"]
    assert sum(map(len, single.values())) == len(parts["scenarios"])
    with pytest.raises(UserError, match="unknown part 'author'"):
        program.cells_of(study, ["author"])  # of the primary contrast; it is in three parts
    with pytest.raises(UserError, match="unknown part 'method'; did you mean"):
        program.cells_of(study, ["method"])
    with pytest.raises(UserError, match="no primary contrast"):
        program.cells_of(study.model_copy(update={"primary": None}), ["methods"])


def test_the_primary_first_then_the_rest_in_two_ways(program, tmp_path, monkeypatch, capsys):
    folder, results = tmp_path / "study", tmp_path / "results"
    argv = ["--quick", "--parts", "primary", "--study", str(folder), "--results", str(results), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["language.py", *argv, "--probe-seeds", "1"])
    program.main()
    assert "primary: graddiff, easy minus twin: " in capsys.readouterr().out
    first = json.loads((results / "language_quick.json").read_text())
    assert first["cells"] == {"tuning": {"ok": 8, "not run yet": 2}, "measured": {"ok": 12, "not run yet": 1}}
    assert first["left_out"] == []
    assert first["command"] == "python benchmarks/language.py --quick --parts primary --probe-seeds 1"
    with pytest.raises(SystemExit) as refused:
        program.main()
    told = capsys.readouterr().err
    assert refused.value.code == 2
    assert "language_quick.json: is there already; go on from it with --from" in told
    before = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    _reproduced(results / "language_quick.json", tmp_path)  # of a part; the whole's file has more of the same

    quick = program.study_config(Namespace(study=str(folder), quick=True, overrides=[]))
    whole = _as_read(program.measure(quick, 1, 1)[0])
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}.items(), "went on from it"
    _checked(whole)

    elsewhere = program.study_config(Namespace(study=str(tmp_path / "fresh"), quick=True, overrides=[]))
    held = {key: value for key, value in first["digests"].items() if not key.startswith("seed2 ")}
    kept = [n for n, o in enumerate(unpack(first["outcomes"])) if o.seed != 2]
    runs = [first["outcomes"]["runs"][n] for n in kept]
    partly = {**first, "digests": held, "outcomes": {**first["outcomes"], "runs": runs}}
    partly |= {key: [row for row in first[key] if not _of_seed2(row)] for key in ("trainings", "probes")}
    joined = _as_read(program.measure(elsewhere, 1, 1, parts=["primary"], before=partly)[0])
    made = [json.loads(p.read_text())["label"] for p in (tmp_path / "fresh/cells").iterdir()]
    assert len(made) == 8, "seed 2's four trainings and four runs, with the settings of the file: no trial"
    assert all("seed2" in label for label in made)
    for key in first.keys() - {"cost", "trainings", "outcomes", "command"}:
        assert joined[key] == first[key], key
    assert joined["retrained_otherwise"] == []
    assert {row["run"] for row in joined["trainings"]} == {row["run"] for row in first["trainings"]}
    assert {_result(o) for o in unpack(joined["outcomes"])} == {_result(o) for o in unpack(first["outcomes"])}
    other = elsewhere.model_copy(update={"relearn": None})
    with pytest.raises(UserError, match=r"is of another study \(relearn differ\)"):
        program.measure(other, 1, before=first)
    with pytest.raises(UserError, match="nothing is left to run"):
        program.measure(elsewhere, 1, 1, parts=["primary"], before=first)


def _as_read(content: dict) -> dict:
    return json.loads(json.dumps(content))


def _of_seed2(row: dict) -> bool:
    return row.get("seed") == 2 or "seed2" in row.get("run", "")


def _result(outcome) -> str:
    return json.dumps([str(outcome.folder), {name: line["value"] for name, line in outcome.metrics.items()}])


def _checked(content: dict) -> None:
    """The whole at toy size, `fit` never reached."""
    assert content["cells"] == {"tuning": {"ok": 8, "without result": 2}, "measured": {"ok": 12}}
    assert content["left_out"] == ["fit"], "60 steps memorise nothing"
    assert [c.split("/")[-1] for c in content["censored"]] == ["seed100 never reached 'fit'"]
    (design,) = content["designs"]
    assert design.startswith(hashlib.sha256(DESIGN.read_bytes()).hexdigest() + " with seeds=[0, 1, 2] ")
    outcomes = unpack(content["outcomes"])
    assert len(outcomes) == 12
    assert {(row["seed"], row["checkpoint"]) for row in content["probes"]} == {(0, "easy"), (0, "twin")}
    assert all("alignment, ce: cos(all forget, all retain)" in row["lines"] for row in content["probes"])
    assert all(o.number("kept_at_level") is not None for o in outcomes)
    assert all({"relearn_acc", "neighbour_acc"} <= o.metrics.keys() for o in outcomes)
    assert any("forget_through_acc" in o.metrics for o in outcomes), "a small world may hold out no such question"


def _reproduced(results: Path, tmp_path: Path) -> None:
    """A cell comes again to the last bit elsewhere, from the file of results alone; a changed digest is noticed."""
    label = "seed1 author twin npo"
    found = reproduce(results, label, tmp_path / "elsewhere")
    assert found.identical, found
    assert len(list((tmp_path / "elsewhere/cells").iterdir())) == 3, "the cell, its start model and gold, no others"
    content = json.loads(results.read_text())
    content["digests"][label] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(content))
    argv = ["study", "reproduce", str(tmp_path / "other.json"), label, "--out", str(tmp_path / "elsewhere")]
    told = CliRunner().invoke(app, argv)
    assert told.exit_code == 1
    assert f"{label}: not the same (committed {'0' * 16}: {found.found})" in told.stdout
    with pytest.raises(UserError, match="no finished cell 'seed1 author twin npp'; did you mean"):
        reproduce(results, "seed1 author twin npp", tmp_path / "elsewhere")
    (tmp_path / "old.json").write_text(json.dumps({k: v for k, v in content.items() if k != "digests"}))
    with pytest.raises(UserError, match="holds no digests of cells; run the program that made it again"):
        reproduce(tmp_path / "old.json", label, tmp_path / "elsewhere")
