"""The program that compares starts: a toy run of it, and its ratios by hand."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from llm_unlearn.errors import Diverged


@pytest.fixture(scope="module")
def program(load_benchmark):
    return load_benchmark("pretrained_start")


@pytest.mark.integration
def test_arms_start_from_one_seeds_models_and_tell_what_they_took(program, tmp_path):
    argv = [
        "--quick",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--epochs",
        "10",
        "--arms",
        "pretrained, hops; scratch, distilled; pretrained, apart",
    ]
    argv += ["--arm", "sam", "init", '["sam.rho=0.01", "loop.max_steps=25"]', "loop.max_steps=100"]
    program.main([*argv, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    rows = {row["arm"]: row for row in told["rows"]}
    assert list(rows) == ["scratch", "pretrained, hops", "scratch, distilled", "pretrained, apart", "sam"]
    assert "no checkpoint 'grok'" in rows["scratch, distilled"]["error"], "so short a run has no grokked teacher"
    assert rows["scratch"]["before"] == {"flops": 0, "cpu_seconds": 0}
    pretraining = told["pretraining"][0]
    assert rows["pretrained, hops"]["before"]["flops"] == pretraining["cost"]["flops"] > 0
    assert 0 <= pretraining["known"] <= 1
    assert rows["pretrained, hops"]["train_items"] - rows["scratch"]["train_items"] == 3 * 120
    assert rows["pretrained, apart"]["spent"]["flops"] == pytest.approx(3 * rows["scratch"]["spent"]["flops"], rel=0.05)
    assert rows["sam"]["spent"]["updates"] == 25
    assert rows["sam"]["spent"]["flops"] == pytest.approx(rows["scratch"]["spent"]["flops"] / 4 * 2, rel=0.05)
    assert {line["reached"] for line in told["lines"] if line["to"] == "t_gen"} == {0}


def test_ratios_are_by_seed_and_of_those_that_got_there(program):
    def row(arm, seed, cpu, extra=0.0):
        at = {"updates": cpu * 10, "flops": cpu * 1e9, "cpu_seconds": cpu}
        return {"arm": arm, "seed": seed, "to": {"t_fit": at, "t_gen": at if seed < 3 else None},
                "before": {"flops": 0.0, "cpu_seconds": extra}}  # fmt: skip

    rows = [row("scratch", seed, 100.0) for seed in range(4)]
    rows += [row("text", seed, cpu, extra=30.0) for seed, cpu in enumerate((20.0, 50.0, 125.0, 50.0))]
    lines = program.against_scratch(Namespace(arms={"scratch": 0, "text": 0}, seeds=4), rows)
    line = next(line for line in lines if (line["arm"], line["to"]) == ("text", "t_gen"))
    assert (line["reached"], line["of"], line["cpu_seconds"]) == (3, 4, 65.0)
    ratio = line["cpu_seconds_ratio"]
    assert ratio["mean"] == pytest.approx(0.5), "(.2 .5 1.25)^(1/3)"
    assert ratio["ci"][0] < 0.5 < ratio["ci"][1]
    assert line["cpu_seconds_ratio_with_before"]["mean"] == pytest.approx((0.5 * 0.8 * 1.55) ** (1 / 3))
    assert line["flops_ratio_with_before"]["mean"] == pytest.approx(0.5)
    assert "updates_ratio_with_before" not in line


def test_an_arm_pays_for_its_start_and_its_teacher(program):
    text, teacher = {"cost": {"flops": 1.0, "cpu_seconds": 2.0}}, {"flops": 10.0, "cpu_seconds": 20.0, "updates": 5}
    spent = {name: program.before(arm, text, teacher)["flops"] for name, arm in program.ARMS.items()}
    assert spent == {
        "scratch": 0, "scratch, distilled": 10, "pretrained": 1, "pretrained, hops": 1, "pretrained, distilled": 11,
        "pretrained, sam": 1, "pretrained, apart": 1,
    }  # fmt: skip


@pytest.mark.integration
def test_memorised_models_forget_and_are_probed_on_one_arms_data(program, tmp_path, monkeypatch):
    argv = ["--quick", "--seeds", "1", "--jobs", "1", "--epochs", "10", "--arms", "pretrained, hops"]
    argv += ["optim.weight_decay=0.1", "loop.max_steps=700", "watch.until=fit"]
    program.main([*argv, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    brought = {(row["arm"], row["checkpoint"]): row for row in told["brought"]}
    assert list(brought) == [("scratch", "fit"), ("pretrained, hops", "fit")], "nothing grokked; no model twice"
    for row in brought.values():
        values = row["values"]
        assert values["retain_acc"][0] > 0.9
        assert values["retain_acc"][1] == pytest.approx(1 / 100), "rows of the first arm's data"
        assert values["graddiff, kept_at_level"][0] <= 1
        assert values["npo, updates"][0] % 2 == 0
        assert values["npo, came to the level"][0] in (0, 1)
        assert -1 <= values["alignment, ce: cos(all forget, all retain)"][0] <= 1
    scratch, hops = (row["values"] for row in brought.values())
    assert scratch["gold, forget_inf_acc"] == hops["gold, forget_inf_acc"], "one gold for all"
    assert {row["gold"] for row in brought.values()} == {"fit"}
    assert told["forgetting"] == {"authors": 2, "updates": 200, "lr": 1e-4}

    def breaks(*_):
        raise Diverged("numbers ceased to be finite")

    monkeypatch.setattr(program, "forget", breaks)
    args = program.parse([*argv, "--runs", str(tmp_path / "runs")])
    values = program.brings((args, 0, "scratch", "fit"))["values"]
    assert values["npo, came to the level"] == (0.0, 0.0), "counted, and not silently left out"
    assert "npo, kept_at_level" not in values


def test_a_model_never_reached_is_a_row_that_says_so(program, tmp_path):
    args = program.parse(["--quick", "--runs", str(tmp_path)])
    row = program.brings((args, 0, "pretrained", "grok"))
    assert "values" not in row
    assert "reached neither" in row["error"]
    assert program.reached(tmp_path, "grok") == ""
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit/config.json").write_text("{}")
    assert program.reached(tmp_path, "grok") == f"{tmp_path}@fit"
    for arm in ("scratch", "gold", "pretrained"):
        (tmp_path / "seed0" / arm / "fit").mkdir(parents=True)
        (tmp_path / "seed0" / arm / "fit/config.json").write_text("{}")
    row = program.brings((args, 0, "pretrained", "grok"))
    assert (row["checkpoint"], "values" in row) == ("fit", False)
    assert "does not say what data" in row["error"], "what cannot be opened costs its own row and no other"


def test_a_toy_writes_a_file_of_its_own(program):
    assert program.parse(["--quick"]).out.name == "pretrained_start_quick.json"
    assert program.parse([]).out.name == "pretrained_start.json"
