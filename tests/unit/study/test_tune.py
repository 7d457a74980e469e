"""Tuning: other seeds than the study's, equal budgets, the rule of choice, and a file that a study takes back."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.config import build_config, load_config
from llm_unlearn.data.qa import world_corpus
from llm_unlearn.data.schema import save_corpus
from llm_unlearn.data.world import preset
from llm_unlearn.errors import Diverged, UserError
from llm_unlearn.methods.table import METHODS
from llm_unlearn.study import cells as cells_module
from llm_unlearn.study.cells import run_cell
from llm_unlearn.study.config import StudyConfig
from llm_unlearn.study.matrix import plan
from llm_unlearn.study.store import Store
from llm_unlearn.study.tune import DIVERGED, Draw, Score, best, choices, draw_of, plan_tuning, score, write_tuned
from llm_unlearn.study.tuned import Tuned

LRS = (1e-4, 1e-3)
BASE: dict[str, Any] = {
    "out": "s",
    "seeds": [0, 1],
    "checkpoints": ["fit", "grok"],
    "methods": {"npo": {}, "ga": {"loop": {"max_steps": 500}}, "finetune": {}},
    "tune": {"seeds": [7, 8], "lrs": LRS, "trials": 4, "updates": 30},
    "grok": {"data": {"preset": "world12"}, "scenario": {"size": 2}},
}
SCENARIOS = {"author": {"kind": "author", "size": 2}, "fact": {"kind": "fact", "size": 6}}


def study(**changes: Any) -> StudyConfig:
    return build_config(StudyConfig, {**BASE, **changes})


def with_tune(**changes: Any) -> StudyConfig:
    return study(tune={**BASE["tune"], **changes})


def with_methods(methods: dict[str, Any], **changes: Any) -> StudyConfig:
    return study(methods=methods, tune={**BASE["tune"], **changes})


def trials(config: StudyConfig):
    return [cell for cell in plan_tuning(config) if cell.kind == "tune"]


def test_every_method_has_the_same_budget_at_every_checkpoint():
    cells = trials(study())
    count: dict[tuple, int] = {}
    for cell in cells:
        place = (cell.spec["seed"], cell.spec["checkpoint"], cell.spec["method"])
        count[place] = count.get(place, 0) + 1
        assert cell.spec["config"]["loop"]["max_steps"] == 30, "whatever the method's own section says"
    assert len(count) == 2 * 2 * 3
    assert set(count.values()) == {4}
    assert len({cell.id for cell in cells}) == len({cell.spec["config"]["out"] for cell in cells}) == len(cells)
    assert plan_tuning(study()) == plan_tuning(study())
    default = trials(with_tune(updates=None))
    assert {cell.spec["config"]["loop"]["max_steps"] for cell in default} == {60}, "the study's own"


def test_a_trial_runs_with_the_terms_wrapper_and_mask_that_the_study_asks_for():
    methods = {
        "scrub": {"method": {"retain": "nll"}},
        "distilled": {"method": {"name": "npo", "retain": "distil"}},
        "npo_sam": {},
        "graddiff": {"method": {"gradient": "gru", "mask": "saliency"}},
    }
    found: dict[str, set] = {}
    for cell in trials(with_methods(methods, trials=40)):
        method = cell.spec["config"]["method"]
        for section in ("params", "gradient_params", "mask_params"):
            found.setdefault(cell.spec["method"], set()).update(f"{section}.{key}" for key in method[section])
    assert found == {
        "scrub": {"params.msteps"},
        "distilled": {"params.beta", "params.kl_weight"},
        "npo_sam": {"params.beta", "gradient_params.rho"},
        "graddiff": {"gradient_params.ema", "mask_params.share"},
    }


def test_what_the_study_sets_is_the_same_in_every_trial():
    methods = {"ceu": {"method": {"params": {"skip": 0}}}, "npo": {"optim": {"lr": 5e-4}, "method": {"alpha": 3.0}}}
    for cell in trials(with_methods(methods)):
        config = cell.spec["config"]
        if cell.spec["method"] == "ceu":
            assert config["method"]["params"] == {"skip": 0.0}
            assert set(cell.spec["trial"]) == {"optim.lr"}
        else:
            assert (config["optim"]["lr"], config["method"]["alpha"]) == (5e-4, 3.0)
            assert set(cell.spec["trial"]) == {"method.params.beta"}


def test_a_task_vector_is_tuned_as_hard_as_the_others():
    cells = trials(with_methods({"task_vector": {}, "ga": {}, "fisher": {}}))
    found = {name: [c.spec["trial"] for c in cells if c.spec["method"] == name] for name in ("task_vector", "fisher")}
    assert len(found["task_vector"]) == 2 * 2 * 4
    assert {trial["optim.lr"] for trial in found["task_vector"]} == set(LRS)


def test_what_takes_no_updates_has_its_whole_grid_tried():
    fixed = {"optim": {"lr": 5e-4}}
    cells = trials(with_methods({"fisher": {}, "ssd": {}, "npo": fixed}))
    found = {name: [c.spec["trial"] for c in cells if c.spec["method"] == name] for name in ("fisher", "ssd", "npo")}
    for name in ("fisher", "ssd"):
        knobs = METHODS[name].params
        grid = {tuple(trial[f"method.params.{knob}"] for knob in knobs) for trial in found[name]}
        whole = itertools.product(*({*map(float, knob.search), knob.default} for knob in knobs.values()))
        assert grid == set(whole)
        assert len(found[name]) == 2 * 2 * len(grid)
    assert len(found["npo"]) == 2 * 2 * 4, "with its learning rate set it still has the others' budget"


def test_selective_dampening_reaches_low_enough_for_half_of_two_classes():
    """I_forget / I_all is at most N / N_f: 10 there, 6.7 for a share of .15."""
    assert sum(1 < alpha < 6.6 for alpha in METHODS["ssd"].params["alpha"].search) >= 4


def test_worlds_forget_sets_and_weights_are_not_the_studys():
    measured, tuned = plan(study()), plan_tuning(study())

    def draws(cells):
        configs = [cell.spec["config"] for cell in cells if cell.kind == "train"]
        return {(c["seed"], c["data"]["seed"], c["scenario"]["seed"]) for c in configs}

    assert draws(tuned) == {(7, 7, 7), (8, 8, 8)}
    assert not {n for draw in draws(tuned) for n in draw} & {n for draw in draws(measured) for n in draw}
    assert not {c.spec["config"]["out"] for c in tuned} & {c.spec["config"]["out"] for c in measured}
    by_id = {cell.id: cell for cell in tuned}
    for cell in trials(study()):
        model, gold = (by_id[i].spec["config"] for i in cell.after)
        assert (model["exclude"], gold["exclude"]) == ("none", "forget")
        assert cell.spec["config"]["gold"] == f"{gold['out']}@{cell.spec['checkpoint']}"


@pytest.fixture
def saved_world(tmp_path) -> Path:
    save_corpus(world_corpus(preset("world12"), "world12"), tmp_path / "world")
    return tmp_path / "world"


def test_a_saved_world_is_shared_and_a_forget_set_of_the_study_is_not_tuned_on(saved_world):
    def shared(**scenario: Any) -> dict[str, Any]:
        return {"data": {"path": str(saved_world)}, "scenario": {"size": 2, **scenario}}

    assert plan_tuning(study(grok=shared())), "the seeds draw other forget sets from it"
    with pytest.raises(UserError, match="seed7-gold forgets the same as the study's seed0-gold") as error:
        plan_tuning(study(grok=shared(kind="relation", relation="mentor")))
    assert len(str(error.value).splitlines()) == 1
    apart = {"whole": {"kind": "relation", "relation": "mentor"}, "author": {"size": 2}}
    with pytest.raises(UserError, match="seed7-gold-whole forgets the same as the study's seed0-gold-whole"):
        plan_tuning(study(grok=shared(), scenarios=apart))
    assert plan_tuning(study(grok=shared(), scenarios=apart, tune={"scenarios": ["author"]}))
    own = {**BASE["grok"], "scenario": {"kind": "relation", "relation": "mentor"}}
    assert plan_tuning(study(grok=own)), "the same relation of another world is another request"
    with pytest.raises(UserError, match="nowhere"):
        plan_tuning(study(grok={"data": {"path": "nowhere"}}))


def test_scenarios_share_the_model_and_have_golds_of_their_own():
    for cells, seeds in ((plan(study(scenarios=SCENARIOS)), 2), (plan_tuning(study(scenarios=SCENARIOS)), 2)):
        training = [cell for cell in cells if cell.kind == "train"]
        assert len(training) == 3 * seeds
        golds = {c.label: c.spec["config"]["scenario"] for c in training if c.spec["exclude"] == "forget"}
        for cell in (c for c in cells if c.kind != "train"):
            scenario, seed = cell.spec["scenario"], cell.spec["seed"]
            gold = golds[f"seed{seed}-gold-{scenario}"]
            assert gold["kind"] == scenario
            assert cell.spec["config"]["scenario"] == gold == {**gold, "seed": seed}
    alone = plan(study())
    assert [c.id for c in plan(study(scenarios=SCENARIOS)) if c.label == "seed0"] == [alone[0].id], "the same model"
    assert {c.spec["scenario"] for c in trials(study(scenarios=SCENARIOS, tune={"scenarios": ["fact"]}))} == {"fact"}


BAD = [
    ({"tune": {"seeds": [1, 7]}}, "tune.seeds: has seed 1 of the study itself; tune on other seeds"),
    ({"tune": {"seeds": [7, 7]}}, "tune.seeds .* repeat"),
    ({"tune": {"lrs": [1e-3]}}, "tune.lrs"),
    ({"tune": {"lrs": []}}, "tune.lrs"),
    ({"tune": {"lrs": [1e-3, 1e-3]}}, "want different learning rates above 0"),
    ({"tune": {"lrs": [1e-3, -1e-3]}}, "want different learning rates above 0"),
    ({"tune": {"trials": 2, "lrs": [1e-3, 1e-4, 1e-5]}}, "tune.trials=2 is less than the 3 learning rates"),
    ({"tune": {"scenarios": ["fact"]}, "scenarios": {"facts": {}}}, "did you mean 'facts'"),
    ({"tune": {"trial": 3}}, "did you mean tune.trials"),
    ({"methods": {"nop": {}}}, "did you mean 'npo'"),
    ({"methods": {"npo": {"method": "npo"}}}, "method must be a section"),
    ({"methods": {"npo": {"method": {"params": {"betta": 1.0}}}}}, "betta"),
    ({"methods": {"npo": {"method": {"retain": "nlll"}}}}, "study method npo: .*retain"),
    ({"methods": {"npo": {"method": {"gradient": "grue"}}}}, "did you mean 'gru'"),
    ({"scenarios": {"a/b": {}}}, "bad name 'a/b' in scenarios"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_what_cannot_be_tuned_is_refused_in_one_line(change, said):
    with pytest.raises(UserError, match=said) as error:
        plan_tuning(study(**change))
    assert len(str(error.value).splitlines()) == 1


def test_a_draw_is_what_is_missing_to_the_target_and_what_was_damaged():
    start = {"step": 0, "forget_prob": 1.0, "retain_prob": 0.9, "retain_inf_prob": 0.8}
    kept = {"step": 4, "forget_prob": 0.3, "retain_prob": 0.8, "retain_inf_prob": 0.5}
    assert astuple(draw_of({"start": start, "kept": kept, "target": 0.2})) == pytest.approx((0.1, 0.2, True))
    for line in (start, kept):
        del line["retain_inf_prob"]  # TOFU has no two-hop questions
    assert astuple(draw_of({"start": start, "kept": kept, "target": 0.4})) == pytest.approx((-0.1, 0.1, True))
    assert draw_of({"start": start, "kept": {**kept, "forget_prob": float("nan")}, "target": 0.4}) == DIVERGED
    assert draw_of({"diverged": "step 3: the loss is nan"}) == DIVERGED
    scores = [draw_of({"start": start, "kept": kept, "target": 0.4}, floor) for floor in (None, 0.88, 0.9)]
    assert [found.enough for found in scores] == [True, True, False], ".8 of .9 is left"


def test_settings_are_chosen_by_validation_images_where_there_are_any():
    start = {"forget_prob": 1.0, "retain_prob": 0.9, "val_prob": 0.8, "test_prob": 0.8}
    kept = {"forget_prob": 0.3, "retain_prob": 0.8, "val_prob": 0.5, "test_prob": 0.1}
    assert draw_of({"start": start, "kept": kept, "target": 0.2}).damage == pytest.approx(0.2)
    del kept["val_prob"]
    assert draw_of({"start": start, "kept": kept, "target": 0.2}).damage == pytest.approx(0.4)


def test_a_setting_is_feasible_if_most_draws_are():
    found = score([Draw(-0.1, 0.2), Draw(0.0, 0.1), Draw(0.3, 0.0)])
    assert astuple(found) == pytest.approx((0.1, 0.1, True, 3))
    assert not score([Draw(-0.9, 0.0), Draw(0.1, 0.0)]).feasible, "half is not most, however far the other went"
    assert not score([Draw(-0.9, 0.6, False)]).feasible, "what destroys the model is no way to forget"


def test_the_rule_of_choice():
    damaging, gentle, short, shorter = (
        Score(0.0, 0.3, True, 1), Score(0.01, 0.2, True, 3), Score(0.1, 0.0, False, 1), Score(0.2, 0.0, False, 1),
    )  # fmt: skip
    assert best([damaging, short, gentle]) == 2, "least damage among the feasible"
    assert best([short, damaging]) == 1, "an infeasible one never beats a feasible one"
    assert best([shorter, short]) == 1, "none is feasible: the nearest"
    assert best([Score(0.0, 0.5, False, 1), short]) == 1, "at the target and destroyed is not nearer"
    assert best([gentle, gentle]) == 0


def recorded(config: StudyConfig, of: Any) -> list:
    """Choices when every trial has the result that `of(cell)` gives; None leaves it without a record."""
    store, cells = Store(Path(config.out)), plan_tuning(config)
    for cell in cells:
        if cell.kind == "tune" and (result := of(cell)) is not None:
            store.write(cell, *result)
    return choices(config, cells, store)


def ended(forget: float, retain: float) -> tuple[str, dict]:
    lines = {"start": {"forget_prob": 1.0, "retain_prob": 1.0}, "kept": {"forget_prob": forget, "retain_prob": retain}}
    return "ok", {**lines, "target": 0.2}


def rate_decides(cell) -> tuple[str, dict] | None:
    """At fit the smaller rate is best; at grok only the larger one forgets enough. finetune never does."""
    lr, kind = cell.spec["trial"]["optim.lr"], cell.spec["checkpoint"]
    if cell.spec["method"] == "finetune":
        return ended(0.9 - lr, 1.0)
    return ended(0.1 if kind == "fit" or lr == max(LRS) else 0.5, 1.0 - 10 * lr)


def test_tuned_settings_reach_the_cells_of_their_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = study()
    found = {(c.checkpoint, c.method): c for c in recorded(config, rate_decides)}
    assert found["fit", "npo"].setting["optim.lr"] == min(LRS)
    assert found["grok", "npo"].setting["optim.lr"] == max(LRS)
    assert (found["fit", "npo"].trials, found["fit", "npo"].feasible_trials) == (4, 4)
    assert not found["grok", "finetune"].score.feasible
    write_tuned(Path("tuned.yaml"), config, list(found.values()))
    told = load_config(Tuned, Path("tuned.yaml"))
    assert (told.seeds, told.updates) == ((7, 8), 30)
    assert not told.checkpoints["fit"]["finetune"].feasible
    plain, cells = plan(config), plan(study(tuned="tuned.yaml"))
    assert [c.id for c in plain if c.kind == "train"] == [c.id for c in cells if c.kind == "train"]
    assert not {c.id for c in plain if c.kind == "unlearn"} & {c.id for c in cells}
    for cell in (c for c in cells if c.kind == "unlearn"):
        setting = found[cell.spec["checkpoint"], cell.spec["method"]].setting
        assert cell.spec["config"]["optim"]["lr"] == cell.spec["tuned"]["optim"]["lr"] == setting["optim.lr"]
    text = Path("tuned.yaml").read_text()
    assert "lr: 0.001" in text
    Path("tuned.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    again = plan(study(tuned="tuned.yaml"))
    folders = [{c.spec["config"]["out"] for c in found if c.kind == "unlearn"} for found in (plain, cells, again)]
    assert all(len(found) == 2 * 2 * 3 for found in folders), "no two cells share a folder"
    kept = {c.spec["config"]["out"] for c in cells if c in again and c.kind == "unlearn"}
    assert kept
    assert folders[1] & folders[2] == kept, "what was tuned again has a folder of its own"
    assert not folders[0] & (folders[1] | folders[2])
    Path("tuned.yaml").write_text(text.replace("lr: 0.001", "lr: fast"))
    with pytest.raises(UserError, match=r"tuned\.yaml: 'finetune' at 'fit': .*optim\.lr"):
        plan(study(tuned="tuned.yaml"))
    steps = {c.spec["method"]: c.spec["config"]["loop"]["max_steps"] for c in cells if c.kind == "unlearn"}
    assert steps == {"npo": 60, "ga": 500, "finetune": 60}, "the budget of the study is its own"


def test_a_scenario_that_was_tuned_on_has_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = {"few": {"size": 1}, "many": {"size": 2}, "none": {"size": 3}}
    base = study().tune.model_dump(mode="json")
    config = study(scenarios=both, tune={**base, "scenarios": ["few", "many"]}, methods={"npo": {}})

    def of(cell):
        lr, least = cell.spec["trial"]["optim.lr"], cell.spec["scenario"] == "few"
        return ended(0.1, 0.9 if (lr == min(LRS)) == least else 0.85)

    found = {(c.scenario, c.checkpoint): c for c in recorded(config, of)}
    assert found["few", "fit"].setting["optim.lr"] == min(LRS)
    assert found["many", "fit"].setting["optim.lr"] != min(LRS)
    assert {name for name, _ in found} == {"", "few", "many"}
    write_tuned(Path("tuned.yaml"), config, list(found.values()))
    cells = [c.spec for c in plan(config.model_copy(update={"tuned": "tuned.yaml"})) if c.kind == "unlearn"]
    for scenario, chosen in (("few", "few"), ("many", "many"), ("none", "")):
        rates = {s["config"]["optim"]["lr"] for s in cells if s["scenario"] == scenario and s["checkpoint"] == "fit"}
        assert rates == {found[chosen, "fit"].setting["optim.lr"]}


def test_a_trial_without_a_result_is_never_chosen_and_a_method_without_any_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def some(cell):
        if cell.spec["method"] == "ga":
            return ("censored", None)
        if cell.spec["method"] == "finetune" or cell.spec["trial"]["optim.lr"] == min(LRS):
            return None
        return ("ok", {"diverged": "nan"}) if cell.spec["seed"] == 7 else ended(0.1, 0.9)

    config = study()
    found = {(c.checkpoint, c.method): c for c in recorded(config, some)}
    assert astuple(found["fit", "npo"].score) == pytest.approx((0.5, 0.55, False, 2)), "diverged in one of two draws"
    assert (found["fit", "ga"].setting, found["fit", "ga"].trials) == (None, 0)
    write_tuned(Path("tuned.yaml"), config, list(found.values()))
    with pytest.raises(UserError, match="has no settings of 'ga' at 'fit'.*tune it"):
        plan(study(tuned="tuned.yaml"))
    assert plan(study(tuned="tuned.yaml", methods={"npo": {}}))


ENTRY = "{settings: {optim: {lr: 0.001}}, feasible: true, shortfall: 0.0, damage: 0.1, trials: 4}"
WHOLE = f"seeds: [7]\nupdates: 30\ncheckpoints:\n  fit:\n    npo: {ENTRY}\n"
MALFORMED = [
    ("seeds: [7\n", "invalid YAML"),
    ("- 1\n", "must hold key: value lines"),
    ("", "missing key 'seeds'"),
    (WHOLE.replace("updates", "update"), "did you mean updates"),
    (WHOLE.replace(ENTRY, "{optim: {lr: 1}}"), "missing key 'checkpoints.fit.npo.settings'"),
    (WHOLE.replace("[7]", "[1]"), "was tuned on seed 1 of the study itself"),
    (WHOLE.replace("fit:", "fti:"), "has no checkpoint 'fit'; did you mean 'fti'"),
    (WHOLE.replace("npo", "npq"), "has no settings of 'npo' at 'fit'; did you mean 'npq'"),
    (WHOLE.replace("lr: 0.001", "lr: fast"), "study method npo.*optim.lr"),
    (WHOLE.replace("optim: {lr: 0.001}", "method: {params: {betta: 1.0}}"), "betta"),
]


@pytest.mark.parametrize(("text", "said"), MALFORMED, ids=[said for _, said in MALFORMED])
def test_a_file_that_does_not_fit_is_refused_in_one_line(text, said, tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        plan(study(checkpoints=["fit"], methods={"npo": {}}, tuned=str(path)))
    assert len(str(error.value).splitlines()) == 1
    path.write_text(WHOLE)
    assert plan(study(checkpoints=["fit"], methods={"npo": {}}, tuned=str(path))), "the whole one is taken"


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no such file"):
        plan(study(tuned="nowhere.yaml"))


def weights_below(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*.safetensors") if path.is_file()]


def test_a_trial_keeps_numbers_and_no_weights(tmp_path, monkeypatch):
    config = study(out=str(tmp_path))
    cell, another = trials(config)[:2]

    def unlearned(run):
        for folder in ("checkpoints/step-2", "final", "adapter"):
            (Path(run.out) / folder).mkdir(parents=True)
            (Path(run.out) / folder / "model.safetensors").write_bytes(b"weights")
        if run.out == another.spec["config"]["out"]:
            raise Diverged("step 3: the loss is nan")
        lines = [f'{{"step": {s}, "forget_prob": {1 - s / 10}}}\n' for s in (0, 2, 4)]
        (Path(run.out) / "trajectory.jsonl").write_text("".join(lines))
        return {"target": 0.5, "steps": 4, "kept_step": 2, "cost": {"cpu_seconds": 1.0}}

    monkeypatch.setattr(cells_module, "_missing_checkpoint", lambda cell: "")
    monkeypatch.setattr(cells_module, "run_unlearn", unlearned)
    assert run_cell(tmp_path, cell) == run_cell(tmp_path, another) == "ok"
    result = Store(tmp_path).read(cell)["result"]
    assert (result["start"]["forget_prob"], result["kept"]["step"], result["target"]) == (1.0, 2, 0.5)
    assert not weights_below(cell.spec["config"]["out"])
    assert not weights_below(another.spec["config"]["out"])
    assert Store(tmp_path).read(another)["result"] == {"diverged": "step 3: the loss is nan"}, (
        "an answer, not a failure"
    )


def test_a_trial_whose_record_cannot_be_written_has_its_weights_still(tmp_path, monkeypatch):
    cell = trials(study(out=str(tmp_path)))[0]
    final = Path(cell.spec["config"]["out"]) / "final"

    def full(*_, **__):
        assert final.exists(), "without weights and without a record the run would count as finished and be lost"
        raise OSError("disk full")

    def tried(cell):
        final.mkdir(parents=True)
        return {}

    monkeypatch.setattr(cells_module, "_missing_checkpoint", lambda cell: "")
    monkeypatch.setattr(cells_module, "_run", tried)
    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(OSError, match="disk full"):
        run_cell(tmp_path, cell)
    assert final.exists()
