"""What a comparison is told about a run: which seed counts, and from where the run started."""

from __future__ import annotations

import json

from llm_unlearn.unlearn.facts import comparison_facts, study_facts, write_study_facts

OUTCOME = {
    "method": "npo",
    "origin": {"config": {"seed": 7}, "start_kind": "grok", "request": "r1"},
    **{key: key.upper() for key in ("steps", "kept_step", "stop", "target", "cost", "alarms", "kept_faults")},
}


def test_the_seed_is_that_of_the_start_model():
    facts = comparison_facts(OUTCOME, {"config": {"seed": 3}, "step": 900})
    assert facts == {
        "method": "npo", "checkpoint": "grok", "seed": 3, "start_step": 900, "unlearn_seed": 7, "request": "r1",
        "start_train_acc": None, "start_held_out_acc": None,
        "steps": "STEPS", "kept_step": "KEPT_STEP", "stop": "STOP", "target": "TARGET", "cost": "COST",
        "alarms": "ALARMS", "kept_faults": "KEPT_FAULTS",
    }  # fmt: skip


def test_a_start_model_that_says_nothing_counts_by_the_seed_of_unlearning():
    stranger = {**OUTCOME, "origin": {"config": {"seed": 7}, "start_kind": None, "request": "r1"}}
    facts = comparison_facts(stranger, {})
    assert (facts["checkpoint"], facts["seed"], facts["unlearn_seed"]) == ("start", 7, 7)


def test_nets_are_told_apart_and_language_models_are_not():
    images = {"data": {"kind": "digits"}}
    for trained, arch in (
        ({**images, "model": {"net": {"arch": "resnet8"}}}, "resnet8"),
        ({**images, "model": {"net": None}}, "cnn"),
        ({**images, "model": "runs/digits/unlearn/grok/scrub"}, None),
        ({**images, "model": {"net": None, "name": "runs/other@grok"}}, None),
        ({"data": {"kind": "world"}, "model": {"net": None}}, None),
        ({}, None),
    ):
        assert comparison_facts(OUTCOME, {"config": {"seed": 3, **trained}, "step": 9}).get("architecture") == arch


def test_how_well_the_start_model_had_learned_is_read_off_its_curve_at_its_step(tmp_path):
    lines = [(800, 0.9, 0.3), (900, 1.0, 0.4), (1000, 1.0, 0.9)]
    told = [json.dumps({"step": s, "train_acc": t, "held_out_acc": h}) for s, t, h in lines]
    (tmp_path / "curve.jsonl").write_text("\n".join(told))
    outcome = {**OUTCOME, "origin": {**OUTCOME["origin"], "start": f"{tmp_path}@grok"}}
    facts = comparison_facts(outcome, {"config": {"seed": 3}, "step": 900})
    assert (facts["start_train_acc"], facts["start_held_out_acc"]) == (1.0, 0.4)
    unseen = comparison_facts(outcome, {"config": {"seed": 3}, "step": 950})
    assert (unseen["start_train_acc"], unseen["start_held_out_acc"]) == (None, None)


def test_what_a_study_calls_a_run_stays_with_it(tmp_path):
    assert study_facts(tmp_path) == {}
    write_study_facts(tmp_path, {"checkpoint": "easy", "primary": None})
    assert study_facts(tmp_path) == {"checkpoint": "easy", "primary": None}
