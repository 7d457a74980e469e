"""Controls as arms of a study, cells beyond the grid, and a primary contrast that can be judged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.config import build_config, dump_config
from llm_unlearn.data.schema import Corpus
from llm_unlearn.errors import UserError
from llm_unlearn.study.arms import pairs_of, seeds_of, wanted
from llm_unlearn.study.config import StudyConfig, load_study
from llm_unlearn.study.matrix import Cell, plan
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import plan_tuning

EASY = {"take": "fit", "changes": {"optim": {"weight_decay": 2.0}, "watch": {"until": "fit"}}, "match": "grok"}
TWIN = {"take": "last", "changes": {"watch": {"until": "max_steps"}, "loop": {"max_steps": 500}}}
BASE: dict[str, Any] = {
    "out": "s",
    "seeds": [0, 1],
    "checkpoints": ["fit", "grok", "easy"],
    "controls": {"easy": EASY, "twin": TWIN},
    "methods": {"npo": {}, "ga": {}},
    "tune": {"seeds": [7], "lrs": [1e-4, 1e-3], "trials": 2},
    "grok": {"data": {"preset": "world12"}, "scenario": {"size": 2}, "optim": {"lr": 5e-4}},
}
SCENARIOS = {"author": {"kind": "author", "size": 2}, "fact": {"kind": "fact", "size": 6}}
PRIMARY = {
    "measure": "forget_acc~gold",
    "methods": ["npo"],
    "contrasts": [["grok", "fit"], ["grok", "easy"]],
    "bound": 0.1,
}


def study(**changes: Any) -> StudyConfig:
    return build_config(StudyConfig, {**BASE, **changes})


def planned(**changes: Any) -> dict[str, Cell]:
    cells = plan(study(**changes))
    assert len({c.id for c in cells}) == len({c.spec["config"]["out"] for c in cells}) == len(cells)
    return {c.label: c for c in cells}


def trained(cells: dict[str, Cell]) -> list[str]:
    return [label for label, cell in cells.items() if cell.kind == "train"]


def test_a_control_is_trained_with_its_changes_and_so_is_its_gold():
    cells = planned(checkpoints=["fit", "easy"])
    assert trained(cells) == [
        "seed0", "seed0-gold", "easy/seed0", "easy/seed0-gold", "seed1", "seed1-gold", "easy/seed1", "easy/seed1-gold",
    ]  # fmt: skip
    main, easy, gold = (cells[name].spec["config"] for name in ("seed1", "easy/seed1", "easy/seed1-gold"))
    assert (easy["optim"]["weight_decay"], easy["optim"]["lr"], easy["watch"]["until"]) == (2.0, 5e-4, "fit")
    assert {key for key in main if main[key] != easy[key]} == {"optim", "watch", "out"}
    assert {key for key in easy if easy[key] != gold[key]} == {"exclude", "out"}
    assert Path(easy["out"]) == Path("s/controls/easy/seed1")


def test_the_cell_bears_the_name_of_the_control_and_starts_from_what_it_takes():
    cells = planned()
    cell, model, gold = cells["seed0 easy npo"], cells["easy/seed0"], cells["easy/seed0-gold"]
    assert cell.after == (model.id, gold.id)
    config = cell.spec["config"]
    assert (config["model"], config["gold"]) == ("s/controls/easy/seed0@fit", "s/controls/easy/seed0-gold@fit")
    assert Path(config["out"]) == Path("s/controls/easy/seed0/unlearn/easy/npo")
    assert cell.spec["checkpoint"] == cell.facts["checkpoint"] == "easy"
    assert (cell.facts["control"], cell.facts["match"]) == (True, "grok")
    assert "control" not in cells["seed0 grok npo"].facts


def test_what_no_checkpoint_needs_is_not_trained():
    alone = planned(checkpoints=["twin"])
    assert trained(alone) == ["twin/seed0", "twin/seed0-gold", "twin/seed1", "twin/seed1-gold"]
    assert alone["seed0 twin ga"].spec["config"]["model"] == "s/controls/twin/seed0@last"
    plain = {c.id for c in plan(study(controls={}, checkpoints=["fit", "grok"]))}
    assert {c.id for c in plan(study(checkpoints=["fit", "grok"]))} == plain, "a control that nobody lists"
    assert plain < {c.id for c in plan(study())}


def test_fit_scaled_is_of_the_main_run():
    cells = planned(checkpoints=["fit_scaled"])
    assert trained(cells) == ["seed0", "seed0-gold", "seed1", "seed1-gold"]
    config = cells["seed0 fit_scaled npo"].spec["config"]
    assert (config["model"], config["gold"]) == ("s/runs/seed0@fit_scaled", "s/runs/seed0-gold@fit_scaled")


def test_a_change_of_a_control_changes_its_cells_alone():
    before = {c.id: c.label for c in plan(study())}
    after = {c.id for c in plan(study(controls={"easy": {**EASY, "changes": {"watch": {"until": "fit"}}}}))}
    assert {label for found, label in before.items() if found not in after} == {
        label for label in before.values() if "easy" in label
    }


def test_scenarios_have_golds_in_every_arm():
    cells = planned(scenarios=SCENARIOS, checkpoints=["fit", "easy"], seeds=[0])
    assert trained(cells) == [
        "seed0", "seed0-gold-author", "seed0-gold-fact", "easy/seed0", "easy/seed0-gold-author", "easy/seed0-gold-fact",
    ]  # fmt: skip
    cell = cells["seed0 fact easy npo"]
    assert cell.after == (cells["easy/seed0"].id, cells["easy/seed0-gold-fact"].id)
    assert cell.spec["config"]["scenario"]["kind"] == "fact"
    assert (cell.spec["scenario"], cell.facts["scenario"]) == ("fact", "fact")


def test_extra_cells_are_planned_once_and_with_the_trainings_they_need():
    more = [
        {"seeds": [1, 2], "checkpoints": ["fit", "easy"], "methods": ["npo"]},
        {"checkpoints": ["early"]},
        {"seeds": [2], "checkpoints": ["easy"], "methods": ["npo"]},
    ]
    config = study(checkpoints=["fit", "grok"], extra=more)
    cells = [c.label for c in plan(config)]
    assert len(set(cells)) == len(cells)
    assert {label for label in cells if label not in planned(checkpoints=["fit", "grok"])} == {
        "seed2", "seed2-gold", "easy/seed1", "easy/seed1-gold", "easy/seed2", "easy/seed2-gold",
        "seed1 easy npo", "seed2 fit npo", "seed2 easy npo",
        "seed0 early npo", "seed0 early ga", "seed1 early npo", "seed1 early ga",
    }  # fmt: skip
    assert {c.id for c in plan(study(checkpoints=["fit", "grok"]))} < {c.id for c in plan(config)}
    assert seeds_of(config) == (0, 1, 2)
    assert pairs_of(config) == [
        (k, m) for k in ("fit", "grok") for m in ("npo", "ga")
    ] + [("easy", "npo"), ("early", "npo"), ("early", "ga")]  # fmt: skip


def test_scenarios_that_only_extra_cells_have():
    only = {"scenarios": ["fact"], "methods": ["npo"], "checkpoints": ["fit"], "seeds": [0]}
    config = study(scenarios=SCENARIOS, grid_scenarios=["author"], checkpoints=["fit"], controls={}, extra=[only])
    assert {(w.scenario, w.method, w.seed) for w in wanted(config)} == {
        ("author", "npo", 0), ("author", "ga", 0), ("author", "npo", 1), ("author", "ga", 1), ("fact", "npo", 0),
    }  # fmt: skip
    golds = [c.label for c in plan(config) if c.kind == "train" and "gold" in c.label]
    assert golds == ["seed0-gold-author", "seed0-gold-fact", "seed1-gold-author"]


def test_a_study_without_methods_trains_its_models():
    assert [c.label for c in plan(study(methods={}, seeds=[0]))] == [
        "seed0", "seed0-gold", "easy/seed0", "easy/seed0-gold",
    ]  # fmt: skip


def test_every_result_says_what_was_declared_beforehand_and_no_id_depends_on_it():
    plain, told = plan(study(seeds=[0, 1, 2])), plan(study(seeds=[0, 1, 2], primary=PRIMARY))
    assert [c.id for c in plain] == [c.id for c in told]
    facts = [c.facts for c in told if c.kind == "unlearn"]
    assert all(f["primary"] == {**PRIMARY, "scenario": "", "alpha": 0.05} for f in facts)
    assert len({f["study"] for f in facts}) == 1
    assert not {f["study"] for f in facts} & {c.facts["study"] for c in plain if c.kind == "unlearn"}
    elsewhere = plan(study(seeds=[0, 1, 2], primary=PRIMARY, out="t"))
    assert elsewhere[-1].facts["study"] == facts[-1]["study"], "the same design in another folder"


def test_controls_and_extra_cells_are_tuned_too():
    extra = [{"checkpoints": ["early"], "methods": ["ga"]}]
    cells = plan_tuning(study(checkpoints=["fit", "easy"], extra=extra))
    assert [c.label for c in cells if c.kind == "train"] == ["seed7", "seed7-gold", "easy/seed7", "easy/seed7-gold"]
    trials = [c for c in cells if c.kind == "tune"]
    assert {(c.spec["checkpoint"], c.spec["method"]) for c in trials} == {
        ("fit", "npo"), ("fit", "ga"), ("easy", "npo"), ("easy", "ga"), ("early", "ga"),
    }  # fmt: skip
    easy = next(c for c in trials if c.spec["checkpoint"] == "easy")
    assert easy.spec["config"]["model"] == "s/tune/controls/easy/seed7@fit"
    with pytest.raises(UserError, match="tune.seeds: has seed 7 of the study itself"):
        plan_tuning(study(extra=[{"seeds": [7]}]))


def test_tuning_tries_what_the_study_measures_and_where():
    extra = [{"scenarios": ["fact"], "checkpoints": ["grok"], "methods": ["npo"]}]
    some = study(scenarios=SCENARIOS, grid_scenarios=["author"], checkpoints=["fit", "easy"], extra=extra)

    def tried(config: StudyConfig) -> set[tuple[str, str, str]]:
        cells = plan_tuning(config)
        golds = {c.label for c in cells if c.kind == "train" and "gold" in c.label}
        needed = {c.after[1] for c in cells if c.kind == "tune"}
        assert {c.id for c in cells if c.label in golds} == needed, "no gold is trained for nothing"
        return {(c.spec["scenario"], c.spec["checkpoint"], c.spec["method"]) for c in cells if c.kind == "tune"}

    author = {("author", k, m) for k in ("fit", "easy") for m in ("npo", "ga")}
    assert tried(some) == author | {("fact", "grok", "npo")}
    alone = some.model_copy(update={"tune": some.tune.model_copy(update={"scenarios": ("author",)})})
    assert tried(alone) == author | {("author", "grok", "npo")}, "settings for the scenario that is not tuned on"


def test_runs_that_nothing_later_is_taken_of_end_at_grok():
    extra = [{"scenarios": ["fact"], "checkpoints": ["grok"], "methods": ["npo"]},
             {"seeds": [2], "scenarios": ["author"], "checkpoints": ["fit", "easy"], "methods": ["npo"]}]  # fmt: skip
    values = {"scenarios": SCENARIOS, "grid_scenarios": ["author"], "checkpoints": ["fit", "post"], "extra": extra}
    as_configured, as_needed = planned(**values), planned(**values, train="needed")

    def until(cells: dict[str, Cell]) -> dict[str, str]:
        return {label: cells[label].spec["config"]["watch"]["until"] for label in trained(cells)}

    earlier = {"seed0-gold-fact": "grok", "seed1-gold-fact": "grok", "seed2": "grok", "seed2-gold-author": "grok"}
    assert until(as_needed) == {**until(as_configured), **earlier}
    assert {until(as_configured)[name] for name in earlier} == {"post"}
    assert until(as_needed)["easy/seed2"] == "fit"
    tuning = {c.label: c for c in plan_tuning(study(**values, train="needed"))}
    assert until(tuning) == {"seed7": "post", "seed7-gold-author": "post", "seed7-gold-fact": "grok",
                             "easy/seed7": "fit", "easy/seed7-gold-author": "fit"}  # fmt: skip


def test_every_result_names_the_file_the_study_was_declared_in(tmp_path):
    file = tmp_path / "mine.yaml"
    dump_config(study(), file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    for overrides, design in (
        ([], sha),
        (["out=elsewhere", "tuned=null"], sha),
        (["seeds=[3]", "out=s"], f"{sha} with seeds=[3]"),
    ):
        config = load_study(file, overrides)
        cells = [*plan(config), *plan_tuning(config)]
        assert {c.facts["design"] for c in cells} == {design}
        plain = config.model_copy(update={"design": None})
        assert [c.id for c in cells] == [c.id for c in (*plan(plain), *plan_tuning(plain))], "no id depends on it"
        assert not any("design" in c.facts for c in plan(plain))
    Store(tmp_path).write(cells[0], "ok")
    record = Store(tmp_path).read(cells[0])
    assert record is not None
    assert record["design"] == design


def test_relearning_is_in_the_id_where_it_is_asked_for():
    plain, asked = planned(), planned(relearn={"facts": 2})
    assert {label for label in plain if plain[label].id == asked[label].id} == set(trained(plain))
    assert asked["seed0 fit npo"].spec["relearn"]["facts"] == 2


def test_data_whose_seed_draws_nothing_is_one_for_all_seeds(tmp_path, monkeypatch):
    """What kind the data is of is not asked: two draws are looked at."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"question": "q{i}?", "answer": "a{i}"}}\n' for i in range(20)))
    own = {"data": {"kind": "custom", "path": str(file)}, "scenario": {"kind": "random", "size": 4}}
    assert plan_tuning(study(grok=own, checkpoints=["fit"])), "the seeds draw other requests from it"
    forget = tmp_path / "forget.jsonl"
    forget.write_text('{"question": "q1?", "answer": "a1"}\n')
    given = {"data": {**own["data"], "forget_path": str(forget)}, "scenario": {}}
    with pytest.raises(UserError, match="seed7-gold forgets the same as the study's seed0-gold"):
        plan_tuning(study(grok=given, checkpoints=["fit"]))
    made = []
    monkeypatch.setattr(Corpus, "identity", property(lambda _: (made.append(0), len(made))[1]))
    assert plan_tuning(study(grok=given, checkpoints=["fit"])), "as if each seed drew a subset of its own"


def controls(**of: Any) -> dict[str, Any]:
    return {"controls": {"easy": {**EASY, **of}}}


BAD = [
    ({"checkpoints": ["eazy"]}, "unknown checkpoint kind 'eazy' in checkpoints; did you mean 'easy'"),
    ({"checkpoints": ["last"]}, "unknown checkpoint kind 'last'"),
    ({"controls": {"fit": EASY}, "checkpoints": ["fit"]}, "controls.fit: 'fit' has a meaning of its own"),
    ({"controls": {"gold": EASY}, "checkpoints": ["fit"]}, "controls.gold: .* meaning of its own"),
    ({"controls": {"a/b": EASY}, "checkpoints": ["a/b"]}, "bad name 'a/b' in controls"),
    (controls(take="final"), "take"),
    (controls(changes={"optim": {"lrr": 1.0}}), r"controls.easy.changes.*optim\.lr"),
    (controls(changes={"seed": 3}), "controls.easy.changes: seed is set per cell"),
    (controls(changes={"data": {"seed": 3}}), "controls.easy.changes: data.seed is set per cell"),
    (controls(changes={"data": {"preset": "world13"}}), "did you mean 'world12'"),
    (controls(take="grok"), "takes 'grok', and its training ends at watch.until=fit; let it train longer"),
    (controls(take="last"), "takes 'last', .*set changes: {watch: {until: max_steps}}"),
    (controls(match="grokk"), "unknown checkpoint 'grokk' in controls.easy.match; did you mean 'grok'"),
    (controls(match="easy"), "unknown checkpoint 'easy' in controls.easy.match"),
    ({"extra": [{"methods": ["nop"]}]}, r"unknown method 'nop' in extra\[0\].methods; did you mean 'npo'"),
    ({"extra": [{}, {"scenarios": ["fact"]}]}, r"unknown scenario 'fact' in extra\[1\].scenarios; there are none"),
    ({"extra": [{"seeds": [4, 4]}]}, r"extra\[0\].seeds \[4, 4\] repeat"),
    ({"extra": [{"checkpoint": ["fit"]}]}, "checkpoints"),
    ({"grid_scenarios": ["fat"], "scenarios": SCENARIOS}, "in grid_scenarios; did you mean 'fact'"),
    ({"primary": {**PRIMARY, "measure": "forget_ac"}}, "unknown measure 'forget_ac'; did you mean 'forget_acc'"),
    ({"primary": {**PRIMARY, "measure": "forget_acc~gld"}}, "unknown measure 'forget_acc~gld'"),
    ({"primary": {**PRIMARY, "measure": "updates_to_target~gold"}}, "unknown measure"),
    ({"primary": {**PRIMARY, "methods": ["rmu"]}}, "unknown method 'rmu' in primary.methods"),
    ({"primary": {**PRIMARY, "scenario": "fact"}}, "it has one scenario, leave it out"),
    ({"primary": PRIMARY, "scenarios": SCENARIOS}, "primary.scenario: '' is none of this study's"),
    ({"primary": {**PRIMARY, "bound": 0.0}}, "primary.bound"),
    ({"primary": {**PRIMARY, "contrasts": [["grok", "grok"]]}, "seeds": [0, 1, 2]}, "with itself"),
    ({"primary": {**PRIMARY, "contrasts": [["grok", "fit"]] * 2}}, "repeat"),
    ({"primary": {**PRIMARY, "contrasts": [["grok", "post"]]}}, "npo at grok and post has 0 seeds in common"),
    ({"primary": PRIMARY}, "npo at grok and fit has 2 seeds in common, and a paired difference needs 3"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_what_cannot_be_is_refused_in_one_line(change, said):
    with pytest.raises(UserError, match=said) as error:
        plan(study(**change))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=said):
        plan_tuning(study(**change))


@pytest.mark.parametrize("measure", ["forget_acc", "retain_acc~drop", "updates_to_target", "flops_to_gold_acc", "ues"])
def test_measures_that_a_comparison_has_can_be_primary(measure):
    assert plan(study(seeds=[0, 1, 2], primary={**PRIMARY, "measure": measure}))


def test_extra_seeds_count_for_the_primary():
    assert plan(study(primary=PRIMARY, extra=[{"seeds": [2], "methods": ["npo"]}]))
