"""Plans: a pure function of the config, with ids that follow every knob."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.table import METRICS
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import Cell, plan

BASE: dict[str, Any] = {
    "out": "s",
    "seeds": [0, 1],
    "checkpoints": ["fit", "grok"],
    "methods": {"npo": {}, "ga": {"optim": {"lr": 3e-4}}},
    "grok": {"data": {"preset": "world12"}, "scenario": {"size": 2}},
}


def planned(**changes: Any) -> list[Cell]:
    return plan(build_config(StudyConfig, {**BASE, **changes}))


def ids(cells: list[Cell], kind: str = "") -> set[str]:
    return {c.id for c in cells if kind in ("", c.kind)}


def test_order_and_ids_are_those_of_the_config():
    config = build_config(StudyConfig, BASE)
    cells, before = plan(config), config.model_dump()
    assert plan(config) == cells == planned()
    assert config.model_dump() == before
    assert [c.label for c in cells] == [
        "seed0", "seed0-gold", "seed1", "seed1-gold",
        "seed0 fit npo", "seed0 fit ga", "seed0 grok npo", "seed0 grok ga",
        "seed1 fit npo", "seed1 fit ga", "seed1 grok npo", "seed1 grok ga",
    ]  # fmt: skip
    assert len(ids(cells)) == len(cells)
    outs = [c.spec["config"]["out"] for c in cells]
    assert len(set(outs)) == len(outs), "no two cells share a folder"


def test_unlearning_waits_for_its_model_and_its_gold():
    cells = {c.label: c for c in planned()}
    for label, cell in cells.items():
        seed = label[:5]
        model, gold = cells[seed], cells[f"{seed}-gold"]
        assert cell.after == (() if cell.kind == "train" else (model.id, gold.id))
        config = cell.spec["config"]
        assert config["seed"] == int(seed[4:])
        if cell.kind == "unlearn":
            kind = cell.spec["checkpoint"]
            assert config["model"] == f"{model.spec['config']['out']}@{kind}"
            assert config["gold"] == f"{gold.spec['config']['out']}@{kind}"


def test_a_seed_draws_world_request_and_weights_and_gold_differs_in_what_it_leaves_out():
    cells = {c.label: c.spec["config"] for c in planned()}
    model, gold = cells["seed1"], cells["seed1-gold"]
    assert (model["seed"], model["data"]["seed"], model["scenario"]["seed"]) == (1, 1, 1)
    assert {key for key in model if model[key] != gold[key]} == {"exclude", "out"}
    assert gold["exclude"] == "forget"


def test_what_a_method_changes_is_merged_into_the_common_settings():
    unlearn = {"optim": {"lr": 1e-5, "clip": 0.5}, "method": {"name": "ga", "params": {"beta": 3.0}, "alpha": 2.0}}
    methods = {"npo": {"optim": {"lr": 3e-4}}, "gentle": {"method": {"name": "npo", "params": {"beta": 0.5}}}}
    cells = {c.spec["method"]: c.spec["config"] for c in planned(unlearn=unlearn, methods=methods)[4:]}
    assert (cells["npo"]["optim"]["lr"], cells["npo"]["optim"]["clip"]) == (3e-4, 0.5)
    assert cells["gentle"]["optim"]["lr"] == 1e-5
    assert cells["npo"]["method"] == {**cells["npo"]["method"], "name": "npo", "params": {}, "alpha": 2.0}
    assert (cells["gentle"]["method"]["name"], cells["gentle"]["method"]["params"]) == ("npo", {"beta": 0.5})


TRAINING = [
    {"grok": {**BASE["grok"], "optim": {"lr": 1e-4}}},
    {"grok": {**BASE["grok"], "loop": {"save_every": 7}}},
    {"grok": {**BASE["grok"], "watch": {"ratio": 1.5}}},
    {"grok": {**BASE["grok"], "scenario": {"size": 3}}},
]
UNLEARNING = [
    {"unlearn": {"optim": {"clip": 0.5}}},
    {"unlearn": {"stop": {"items": 7}}},
    {"suite": "tofu"},
]


@pytest.mark.parametrize("change", TRAINING, ids=str)
def test_a_knob_of_training_changes_every_id(change):
    assert not ids(planned()) & ids(planned(**change))


@pytest.mark.parametrize("change", UNLEARNING, ids=str)
def test_a_knob_of_unlearning_leaves_training_as_it_is(change):
    before, after = planned(), planned(**change)
    assert ids(before, "train") == ids(after, "train")
    assert not ids(before, "unlearn") & ids(after, "unlearn")


def test_a_larger_study_keeps_the_cells_of_the_smaller():
    grown = planned(seeds=[0, 1, 2], checkpoints=["early", "fit", "grok"], methods={**BASE["methods"], "rmu": {}})
    assert ids(planned()) < ids(grown)
    tuned = planned(methods={**BASE["methods"], "npo": {"optim": {"lr": 1e-2}}})
    changed = [c.spec["method"] for c in tuned if c.id not in ids(planned())]
    assert changed == ["npo"] * 4


def test_one_forget_level_for_every_checkpoint_of_a_scenario():
    scenarios = {"all": {"kind": "author", "size": 2}, "some": {"kind": "fact", "size": 4}}
    cells = [c for c in planned(scenarios=scenarios, levels={"some": 0.25}) if c.kind == "unlearn"]
    found = {(c.spec["scenario"], c.spec["config"]["stop"]["target"]) for c in cells}
    assert found == {("all", None), ("some", 0.25)}
    with pytest.raises(UserError, match="unknown scenario 'none' in levels; known: all, some"):
        planned(scenarios=scenarios, levels={"none": 0.25})


def test_a_metric_with_a_new_meaning_is_evaluated_again(monkeypatch):
    before = planned()
    monkeypatch.setitem(METRICS, "truth_ratio", replace(METRICS["truth_ratio"], version=9))
    assert ids(before, "train") == ids(planned(), "train")
    assert not ids(before, "unlearn") & ids(planned(), "unlearn")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoints": ["grokk"]}, "did you mean 'grok'"),
        ({"checkpoints": ["grok", "grok"]}, "repeat"),
        ({"seeds": [1, 1]}, "repeat"),
        ({"methods": {"nop": {}}}, "did you mean 'npo'"),
        ({"methods": {"x": {"method": {"name": "nop"}}}}, "did you mean 'npo'"),
        ({"methods": {"npo": {"method": {"params": {"betta": 1.0}}}}}, "betta"),
        ({"methods": {"npo": {"method": {"params": {"beta": -1.0}}}}}, "beta"),
        ({"methods": {"x": {"method": "npo"}}}, "study method x"),
        ({"methods": {"npo": {"optim": {"lrr": 1.0}}}}, "optim.lrr"),
        ({"suite": "tofu_wrld"}, "did you mean 'tofu_world'"),
        ({"grok": {"data": {"preset": "world41"}}}, "did you mean 'world40'"),
        ({"grok": {"model": {"size": "wrld"}}}, "unknown model size 'wrld' in grok.model.size; did you mean 'world'"),
        *(
            ({"methods": {name: {"method": {"name": "npo"}}}}, "bad name")
            for name in ("a/b", "..", ".x", "a b", "", "é")
        ),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_anything_is_trained(change, said):
    with pytest.raises(UserError, match=said):
        planned(**change)


def test_what_a_study_does_not_use_is_not_checked():
    own = {"data": {"preset": "none", "path": "data/mine"}, "model": {"size": "none", "name": "runs/a@fit"}}
    assert planned(grok=own)
    assert planned(
        grok={"model": {"size": "none", "shape": {"hidden": 32}}}, methods={"npo-2.a_B": {"method": {"name": "npo"}}}
    )
