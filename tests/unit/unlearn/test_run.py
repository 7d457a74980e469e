"""Unlearning runs as programs: where they come from, and that they hold in another folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llm_unlearn.config import build_config
from llm_unlearn.data.schema import save_corpus
from llm_unlearn.errors import UserError
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.pretrained import read_origin
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.unlearn import prepare
from llm_unlearn.unlearn import run as module
from llm_unlearn.unlearn.config import MethodConfig, UnlearnConfig
from llm_unlearn.unlearn.objective import UnlearnTask, reads_logits
from llm_unlearn.unlearn.run import default_out, run_unlearn
from llm_unlearn.unlearn.start import open_start

LOOP = {"batch_size": 16, "max_steps": 2, "threads": 1}


def fitted(out: str, **changes) -> None:
    values = {"out": out, "data": {"kind": "world", "path": "./world"}, "scenario": {"size": 2}, "loop": LOOP}
    finetune(build_config(FinetuneConfig, {**values, "model": {"size": "nano"}, **changes}))


def unlearn(**changes) -> dict:
    values = {"out": "u", "model": "runs/a@final", "loop": LOOP, "stop": {"items": 4, "every": 2}}
    return run_unlearn(build_config(UnlearnConfig, {**values, **changes}))


@pytest.fixture
def home(tmp_path, tiny_world, monkeypatch) -> Path:
    """A folder with a world and a model fitted to it, both named by relative paths."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    save_corpus(tiny_world, Path("world"))
    fitted("runs/a")
    return tmp_path / "home"


def test_a_run_with_relative_paths_holds_in_another_folder(home, tmp_path, monkeypatch):
    unlearn()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run in ("runs/a", "u"):
        start = open_start(str(home / run), None, None)
        assert start.data.path == str(home / "world")
    origin = read_origin(str(home / "u"))
    assert origin["start"] == f"{home}/runs/a@final"
    assert origin["config"]["model"] == f"{home}/runs/a@final"
    assert json.loads((home / "u/run.json").read_text())["origin"] == origin
    monkeypatch.setattr(module, "train", None)
    assert unlearn(out=str(home / "u"), model=str(home / "runs/a@final"))["kept_step"] == 2


def refit(seed: int) -> None:
    """Train the start model again, in place."""
    import shutil

    shutil.rmtree("runs/a")
    fitted("runs/a", seed=seed)


def test_a_finished_run_from_a_start_model_that_changed_is_not_reused(home):
    first = unlearn()
    assert list(first["made_from"]) == [f"{home}/runs/a@final"]
    assert unlearn() == json.loads(json.dumps(first))
    refit(seed=1)
    with pytest.raises(UserError, match=r"u: was made from another model than .*runs/a@final is now") as caught:
        unlearn()
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_from_a_start_model_that_changed_is_not_resumed(home):
    unlearn()
    Path("u/run.json").unlink()
    assert unlearn()["steps"] == 2
    Path("u/run.json").unlink()
    refit(seed=1)
    with pytest.raises(UserError, match=r"u: was made from another model than .*runs/a@final is now"):
        unlearn()


@pytest.mark.parametrize("source", [None, "swapped", "perturbed"])
def test_altpo_trains_on_alternates_of_the_world(home, source, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        module, "UnlearnTask", lambda o, items, *a: drawn.update(items=items) or UnlearnTask(o, items, *a)
    )
    unlearn(method={"name": "altpo", "alternates": source, "n_alternates": 2})
    start = open_start("runs/a@final", None, None)
    rows = [start.corpus.split("train")[i] for i in start.request.forget]
    given = [list(row.perturbed_answer[:2]) for row in rows]
    assert (list(drawn["items"].alt.texts) == given) is (source == "perturbed")
    assert all(
        0 < len(group) <= 2 and row.answer not in group
        for row, group in zip(rows, drawn["items"].alt.texts, strict=True)
    )


def test_altpo_without_alternates_writes_nothing(home, monkeypatch):
    monkeypatch.setattr(prepare, "generated", lambda _model, _tokenizer, rows, *_: ([[] for _ in rows], 0))
    with pytest.raises(UserError, match="no alternates for .* forget items"):
        unlearn(method={"name": "altpo", "alternates": "generated"})
    assert not Path("u").exists()


def test_default_out_divides_at_the_last_at(tmp_path):
    assert default_out("/data/a@b/run@grok", "npo") == Path("/data/a@b/run/unlearn/grok/npo")
    with pytest.raises(UserError, match="no run@kind"):
        default_out("/data/a@b/run", "npo")


@pytest.mark.parametrize(
    ("name", "retain", "reads"),
    [("rmu", None, False), ("rmu", "none", False), ("rmu", "nll", True), ("npo", "embed", True), ("npo", None, True),
     ("finetune", "embed", False), ("finetune", None, True)],
)  # fmt: skip
def test_which_methods_leave_the_upper_layers_without_a_gradient(name, retain, reads):
    assert METHODS["rmu"].retain == "embed"
    assert reads_logits(MethodConfig(name=name, retain=retain)) is reads


def test_a_wrapped_run_says_so_and_has_a_folder_of_its_own(home):
    plain = unlearn(out=None, model="runs/a@final")
    wrapped = unlearn(out=None, model="runs/a@final", method={"name": "npo", "gradient": "gru"})
    assert (plain["method"], wrapped["method"]) == ("npo", "npo+gru")
    assert Path("runs/a/unlearn/final/npo+gru/run.json").exists()
    assert wrapped["origin"]["config"]["method"]["gradient"] == "gru"


def test_what_was_made_at_the_start_is_told_and_paid_for(home):
    plain = unlearn(method={"name": "graddiff"})
    pdu = unlearn(out="pdu", method={"name": "pdu", "params": {"slack": 0.5}})
    assert pdu["dual"]["limit"] > 0.5
    assert pdu["dual"]["dual"] == 50.0, "still warming up"
    assert pdu["cost"]["backward_tokens"] == plain["cost"]["backward_tokens"]
    assert pdu["cost"]["forward_tokens"] > plain["cost"]["forward_tokens"]
    whp = unlearn(out="whp", method={"name": "whp", "params": {"reinforce_updates": 3}})
    assert 0 <= whp["generic_changed"] <= 1
    assert whp["cost"]["backward_tokens"] > plain["cost"]["backward_tokens"] / 2
    assert whp["cost"]["reference_tokens"] > 0


def test_ascent_up_to_the_loss_of_what_was_never_seen(home, monkeypatch):
    levels = []
    level_of = module.level_of
    monkeypatch.setattr(module, "level_of", lambda *given: levels.append(level_of(*given)) or levels[-1])
    loop = {**LOOP, "max_steps": 4, "log_every": 1}
    method = {"name": "nabla_tau", "params": {"start": 0.8}}
    found = unlearn(loop=loop, method=method, stop={"items": 4, "every": 4})
    assert (found["target_from"], found["target_loss"]) == ("never seen", -levels[0].logp)
    lines = [json.loads(line) for line in (home / "u/train_log.jsonl").read_text().splitlines()]
    for gamma, line in zip((0.8, 0.6, 0.4, 0.2), lines, strict=True):
        assert line["loss"] == pytest.approx(gamma * line["forget_loss"] + (1 - gamma) * line["retain_loss"], rel=1e-5)
    fitted("runs/gold", exclude="forget")
    gold = unlearn(out="g", method=method, gold="runs/gold@final")
    assert gold["target_from"] == "gold", "of the probability that ends a run; the loss stays that of the unseen"
    assert gold["target_loss"] == -levels[1].unseen_logp == found["target_loss"]
    assert levels[1].logp != levels[1].unseen_logp
    monkeypatch.setattr(module, "level_of", lambda *given: replace(level_of(*given), unseen_logp=None))
    blind = unlearn(out="b", method=method, gold="runs/gold@final")
    assert blind["target_loss"] == -levels[1].logp, "data without a holdout: gold's on the forget set"
    given = unlearn(out="t", method={"name": "nabla_tau", "params": {"target": 2.5}})
    assert given["target_loss"] == 2.5


def test_a_killed_run_goes_on_with_the_weights_of_its_step(home):
    """The weights are a function of the step: a run resumed at the second of four updates ends as one in a go."""
    import shutil

    loop = {**LOOP, "max_steps": 4, "save_every": 2, "log_every": 1}
    for out in ("a", "b"):
        unlearn(out=out, loop=loop, method={"name": "l1_sparse", "params": {"strength": 0.5}}, stop={"every": 4})
        if out == "b":
            Path("b/run.json").unlink()
            shutil.rmtree(max(Path("b/checkpoints").iterdir()))
            assert len(list(Path("b/checkpoints").iterdir())) == 1, "that of the second update is left"
            unlearn(out=out, loop=loop, method={"name": "l1_sparse", "params": {"strength": 0.5}}, stop={"every": 4})
    a, b = (Path(out, "train_log.jsonl").read_text() for out in ("a", "b"))
    assert a == b
    a, b = (Path(out, "final", "model.safetensors").read_bytes() for out in ("a", "b"))
    assert a == b


def test_an_unknown_wrapper_is_refused_before_anything_is_written(home):
    with pytest.raises(UserError, match="unknown gradient 'grru' in method.gradient; did you mean 'gru'"):
        unlearn(method={"name": "npo", "gradient": "grru"})
    assert not Path("u").exists()


@pytest.mark.parametrize(
    ("config", "label"),
    [({}, "npo"), ({"gradient": "none"}, "npo"), ({"gradient": "gru", "mask": "saliency"}, "npo+gru+saliency"),
     ({"name": "npo_sam", "gradient": "sam"}, "npo_sam"), ({"name": "npo_sam", "gradient": "none"}, "npo_sam+none"),
     ({"name": "salun", "mask": "none"}, "salun+none")],
)  # fmt: skip
def test_a_label_names_what_is_not_the_methods_own(config, label):
    assert MethodConfig(**{"name": "npo", **config}).label == label
