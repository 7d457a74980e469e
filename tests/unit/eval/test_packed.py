"""Outcomes in one small file and back: every number and every table stays what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.eval.compare import primary_of
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.packed import pack, unpack
from llm_unlearn.report.paper import paper

MEASURES = ("test_acc", "test_acc~drop", "forget_acc~gold", "unlearning_balance", "updates_to_target",
            "retain_at_target", "updates_to_gold_acc", "seconds_to_gold_acc", "flops_to_gold_acc")  # fmt: skip
PRIMARY = {"measure": "test_acc~drop", "methods": ["ga"], "contrasts": [["grok", "fit"]], "scenario": "half",
           "bound": 0.02}  # fmt: skip


def run(kind: str, seed: int, method: str = "ga", scenario: str = "half") -> Outcome:
    third = 1 / 3 + seed / 7
    beside = {
        "test_acc": (0.9 - third / 3, 0.93, 0.91, 790),
        "retain_acc": (0.95, 1.0, 1.0, 360),
        "forget_acc": (third, 1 / 3, 1.0, 40),
    }
    keys = ("value", "gold", "start", "n")
    metrics = {name: dict(zip(keys, values, strict=True)) | {"ci": [0.0, 1.0]} for name, values in beside.items()}
    if method == "scrub":
        metrics["bystander_acc"] = {"value": 0.5, "gold": 0.5, "start": 0.5, "n": 700}
    path = [
        {
            "step": 5 * i,
            "forget_acc": f,
            "forget_prob": f - 0.01,
            "retain_acc": 1 - i / 10,
            "test_acc": 0.9,
            "x": 1,
        }
        for i, f in enumerate((1.0, 2 / 3, third))
    ]
    cost = {"updates": 10, "train_seconds": 1.23456789, "flops": 123456789, "reference_flops": 0}
    return Outcome(
        Path(f"{scenario}/{kind}/{method}{seed}"), method, kind, seed, metrics, path, 1 / 3 + 0.05, cost, {},
        start_step=100 + seed, request=f"r{seed}{scenario}", signs=["empty"] if seed == 4 else [], stop="max_steps",
        kept_faults=["below_floor"], architecture="cnn", start_train_acc=1.0, start_held_out_acc=0.8, control=False,
        scenario=scenario, primary=PRIMARY,
    )  # fmt: skip


@pytest.fixture
def outcomes():
    some = [run(kind, seed, m) for kind in ("fit", "grok") for seed in range(5) for m in ("ga", "scrub")]
    control = replace(run("easy", 0), control=True, match="grok", target=None, primary=None, trajectory=[])
    return [*some, run("grok", 0, scenario="class"), control]


def test_numbers_and_tables_stay_what_they_were(outcomes):
    back = unpack(json.loads(json.dumps(pack(outcomes))))
    assert [(o.method, o.checkpoint, o.seed, o.scenario, o.metrics.keys()) for o in back] == [
        (o.method, o.checkpoint, o.seed, o.scenario, o.metrics.keys()) for o in outcomes
    ]
    for a, b in zip(outcomes, back, strict=True):
        for measure in MEASURES:
            if a.number(measure) is None:
                assert b.number(measure) is None
            else:
                assert b.number(measure) == pytest.approx(a.number(measure), rel=1e-4, abs=2e-6), measure
        assert (a.collapsed, a.control, a.match, a.request, a.primary) == (
            b.collapsed, b.control, b.match, b.request, b.primary)  # fmt: skip
    assert outcomes[0].number("updates_to_gold_acc") == 10.0, "reached by a third that equals gold's third"
    assert paper(back) == paper(outcomes)
    assert primary_of(back[:-1]).contrasts[0].mean == pytest.approx(primary_of(outcomes[:-1]).contrasts[0].mean)


def test_what_is_shared_is_written_once(outcomes):
    content = pack(outcomes)
    places = {(o.scenario, o.checkpoint, o.seed, len(o.metrics)) for o in outcomes}
    assert len(content["places"]) == len(places) == 22
    assert "x" not in content["runs"][0]["trajectory"]
    assert len(json.dumps(content["runs"][0])) < 500


def test_another_schema_is_refused(outcomes):
    with pytest.raises(UserError, match="file: schema 2, this version reads 1"):
        unpack({**pack(outcomes), "schema_version": 2}, "file")
