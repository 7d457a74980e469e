"""Images from training to report, in small: every kind of request, edits and losses, a killed run, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm_unlearn.cli import app
from llm_unlearn.config import build_config, load_config
from llm_unlearn.errors import UserError, run_main
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.run import train_grok
from llm_unlearn.grok.watch import GrokWatch
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.run import run_unlearn

pytestmark = pytest.mark.integration

DATA = {"kind": "digits", "image": {"train": 200, "test": 100}}
TRAIN = {
    "data": DATA,
    "model": {"net": {"arch": "cnn", "width": 4}},
    "optim": {"lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.999], "warmup": 0},
    "loop": {"max_steps": 300, "batch_size": 50, "threads": 1, "log_every": 1},
    "watch": {"thresholds": "vision", "until": "fit", "first": 10, "items": 100},
}
UNLEARN = {
    "model": "full@fit",
    "optim": {"lr": 3e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "warmup": 0},
    "loop": {"max_steps": 10, "batch_size": 20, "threads": 1, "log_every": 1, "save_every": 4},
    "stop": {"every": 2, "items": 50},
}
SCENARIOS = {
    "share": {"kind": "class", "size": 2, "share": 0.5},
    "class": {"kind": "class", "size": 1},
    "subclass": {"kind": "subclass", "size": 2},
    "random": {"kind": "random", "share": 0.3},
}
METHODS = {"ssd": {"params": {"alpha": 1.0}}, "salun": {}, "bad_teacher": {}}
MEASURED = ("test", "retain", "forget", "holdout", "bystander")


def grok(out: str, **changes) -> dict:
    return train_grok(build_config(GrokConfig, {**TRAIN, "out": out, "scenario": SCENARIOS["share"], **changes}))


def unlearn(out: str, callbacks=(), **changes) -> dict:
    return run_unlearn(build_config(UnlearnConfig, {**UNLEARN, "out": out, **changes}), callbacks)


def told(*argv: str) -> dict:
    done = CliRunner().invoke(app, [*argv, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier, its gold for every kind of request, and a small language model."""
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        grok("full")
        for name, scenario in SCENARIOS.items():
            grok(f"gold-{name}", exclude="forget", scenario=scenario)
        world, loop = {"kind": "world", "preset": "world12"}, {"batch_size": 32, "max_steps": 2, "threads": 1}
        text = {"out": "text", "data": world, "scenario": {"size": 2}, "loop": loop, "model": {"size": "nano"}}
        finetune(build_config(FinetuneConfig, text))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Name -> (what the run told, what its evaluation told): three methods on shares of classes, one elsewhere."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, scenario in SCENARIOS.items():
            for method in METHODS if name == "share" else ("salun",):
                out, gold = f"forgot/{name}-{method}", f"gold-{name}@fit"
                asked = {"method": {"name": method, **METHODS[method]}, "gold": gold, "scenario": scenario}
                found[f"{name}-{method}"] = unlearn(out, **asked), told("eval", out, "--reference", gold)
    return found


def counts(metrics: dict) -> dict[str, int]:
    return {name: metrics[f"{name}_acc"]["n"] for name in MEASURED if f"{name}_acc" in metrics}


def test_gold_is_the_same_training_without_the_forgotten(here):
    full, gold = (json.loads((here / name / "run.json").read_text()) for name in ("full", "gold-share"))
    assert full["report"]["t_fit"] < 300
    assert gold["report"]["t_fit"] < 300
    assert (full["train_items"], gold["train_items"]) == (200, 180)
    assert full["parameters"] == gold["parameters"] < 10_000
    assert json.loads((here / "full/fit/classes.json").read_text())["classes"] == list("0123456789")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_request_is_measured_on_its_own_splits_beside_its_gold(scenario, runs):
    run, result = runs[f"{scenario}-salun"]
    metrics, n = result["metrics"], counts(result["metrics"])
    assert n["forget"] + n["retain"] == 200
    assert ("bystander_acc" in metrics) is (scenario != "random")
    if scenario in ("share", "random"):  # nothing is left out of the test images: every class is still asked for
        assert n["test"] == 100
    else:
        assert n["test"] + n["holdout"] == 100
    if scenario == "class":
        assert metrics["forget_acc"]["gold"] == metrics["holdout_acc"]["gold"] == 0, "gold never saw the class"
        assert n["bystander"] == n["test"]
    gaps = [abs(metrics[f"{name}_acc"]["value"] - metrics[f"{name}_acc"]["gold"]) for name in MEASURED[:3]]
    assert [metrics[f"{name}_gap"]["value"] for name in MEASURED[:3]] == pytest.approx(gaps)
    assert metrics["average_gap"]["value"] == pytest.approx(np.mean(gaps))
    assert metrics["average_gap"]["gold"] == 0
    assert metrics["forget_acc"]["start"] > 0.95
    assert metrics["forget_Q_A_Prob"]["value"] < metrics["forget_Q_A_Prob"]["start"]
    assert metrics["retain_acc"]["value"] > 0.5, "chance is a tenth"
    assert 0 <= metrics["mia_loss"]["value"] <= 1
    assert run["target_from"] == "gold"


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_a_mask_and_a_teacher_forget(method, runs):
    run, result = runs[f"share-{method}"]
    assert run["stop"] == "target"
    assert (run["steps"] == 1) is (method == "ssd"), "an edit changes the weights once"
    assert run["kept"]["forget_prob"] < run["start"]["forget_prob"] - 0.05
    assert run["kept"]["retain_acc"] >= 0.7 * run["start"]["retain_acc"]
    assert result["run"]["method"] == method
    assert not result["collapse"]


def test_compare_and_report(here, runs, tmp_path):
    mine = [f"forgot/share-{method}" for method in METHODS]
    compared = told("compare", *mine, "--by", "method", "--baseline", "ssd")
    assert all(method in json.dumps(compared) for method in METHODS)
    page = Path(told("report", "full", "gold-share", *mine, "--out", str(tmp_path / "report.html"))["report"])
    text = page.read_text()
    assert all(f">{name}" in text for name in (*METHODS, "full", "gold-share"))
    assert text.count("<svg") >= 1
    with pytest.raises(UserError, match="forgot different things"):
        told("compare", "forgot")


def test_probes_look_into_a_classifier(here, tmp_path):
    asked = ["--items", "32", "--draws", "3", "--which", "alignment,cka,local_complexity,norms,logits"]
    probed = told("probe", "full@fit", "--against", "gold-share@fit", *asked, "--out", str(tmp_path / "probes"))
    assert probed["sets"] == {"forget": 20, "retain": 180, "held_out": 100}
    assert len(probed["probes"]) == 5
    alike = [line["value"] for line in probed["probes"]["cka"]["lines"] if line["name"].endswith("against")]
    assert len(alike) >= 4
    assert all(0 < value < 1 for value in alike)


class Killed(Exception):
    pass


def journal(out: Path) -> str:
    return (out / "train_log.jsonl").read_text()


def same_weights(a: Path, b: Path) -> bool:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_killed_training_ends_in_the_same_bits(norm, here, tmp_path, monkeypatch):
    net = {"model": {"net": {**TRAIN["model"]["net"], "norm": norm}}}
    loop = {**TRAIN["loop"], "max_steps": 12, "save_every": 5}
    changes = {**net, "loop": loop, "watch": {**TRAIN["watch"], "until": "max_steps", "first": 3}}
    grok(str(tmp_path / "whole"), **changes)
    look = GrokWatch.__call__

    def killed(self, run):
        look(self, run)
        if run.step == 8:
            raise Killed

    monkeypatch.setattr(GrokWatch, "__call__", killed)
    with pytest.raises(Killed):
        grok(str(tmp_path / "torn"), **changes)
    monkeypatch.setattr(GrokWatch, "__call__", look)
    grok(str(tmp_path / "torn"), **changes)
    assert same_weights(tmp_path / "whole/last", tmp_path / "torn/last")
    assert journal(tmp_path / "whole") == journal(tmp_path / "torn")
    curves = [[*map(json.loads, (tmp_path / name / "curve.jsonl").open())] for name in ("whole", "torn")]
    assert [[line["step"], line["held_out_acc"]] for line in curves[0]] == [
        [line["step"], line["held_out_acc"]] for line in curves[1]
    ]


@pytest.mark.parametrize("method", ["salun", "bad_teacher"])
def test_a_killed_unlearning_ends_in_the_same_bits(method, here, tmp_path):
    asked = {"method": {"name": method}, "stop": {**UNLEARN["stop"], "until": "max_steps", "floor": None}}

    def killed(run):
        if run.step == 6:
            raise Killed

    unlearn(str(tmp_path / "whole"), **asked)
    with pytest.raises(Killed):
        unlearn(str(tmp_path / "torn"), [Hook(killed)], **asked)
    again = unlearn(str(tmp_path / "torn"), [Hook(lambda run: None)], **asked)
    assert again["steps"] == 10
    assert same_weights(tmp_path / "whole/final", tmp_path / "torn/final")
    assert journal(tmp_path / "whole") == journal(tmp_path / "torn")


class Hook:
    """A function as a callback that remembers nothing."""

    def __init__(self, call):
        self.call = call

    def __call__(self, run):
        self.call(run)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


FEW = ["loop.max_steps=2", "loop.batch_size=8", "loop.threads=1"]
PICTURES = ["data.kind=digits", "data.image.train=200", "data.image.test=100", "scenario.kind=class", "scenario.size=1"]
REFUSED = {
    "train text/final on images": "the model reads text, the data are images",
    "train a classifier on text": "is no image; this model classifies images",
    "train adapters": "model.lora: grokking trains all weights",
    "train a request for questions": "scenario.kind=author: is for questions; images have class, subclass, random",
    "unlearn idk": "method 'idk' needs refusals, which images have none of; choose random_label",
    "unlearn altpo": "method 'altpo' needs alternate answers, which images have none of",
    "unlearn adapters": "lora: ImageClassifier trains all its weights and takes no adapters; leave it out",
    "unlearn text": "was trained on other data than 'digits' holds now",
    "unlearn with gold of text": "was trained on other data than the model it is to judge",
    "eval text on images": "was trained on other data than 'digits' holds now",
    "eval text by vision": "suite 'vision' reads split 'test', which this data does not have",
    "eval images by tofu_world": "suite 'tofu_world' reads split 'real_authors', which this data does not have",
    "eval as a chat": "format=chat: images have no prompt; leave it out",
    "probe against text": "text/final: is a language model, the data are images",
    "quickstart": "--preset names a world of questions, --vision takes images; give one of the two",
}
GIVEN = {
    "train text/final on images": ["train", *PICTURES, *FEW, "model.name=text/final"],
    "train a classifier on text": ["train", "data.preset=world12", "scenario.size=2", *FEW, "model.name=full@fit"],
    "train adapters": ["train", *PICTURES, *FEW, "model.lora={rank: 2}"],
    "train a request for questions": ["train", "data.kind=digits", "scenario.kind=author", *FEW],
    "unlearn idk": ["unlearn", "method.name=idk", *FEW],
    "unlearn altpo": ["unlearn", "method.name=altpo", *FEW],
    "unlearn adapters": ["unlearn", "lora.rank=2", *FEW],
    "unlearn text": ["unlearn", "model=text/final", "data.kind=digits", *FEW],
    "unlearn with gold of text": ["unlearn", "gold=text/final", *FEW],
    "eval text on images": ["eval", "text/final", "--data", "digits"],
    "eval text by vision": ["eval", "text/final", "--suite", "vision"],
    "eval images by tofu_world": ["eval", "full@fit", "--suite", "tofu_world"],
    "eval as a chat": ["eval", "full@fit", "--format", "chat"],
    "probe against text": ["probe", "full@fit", "--against", "text/final", "--which", "cka"],
    "quickstart": ["quickstart", "--vision", "--preset", "short40", "--out", "q"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_images_is_refused_in_one_line(case, here, monkeypatch, capsys):
    verb, *argv = GIVEN[case]
    calls = {
        "train": lambda: train_grok(load_config(GrokConfig, None, ["out=new", *argv])),
        "unlearn": lambda: run_unlearn(load_config(UnlearnConfig, None, ["model=full@fit", "out=new", *argv])),
    }
    before = set(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        run_main(calls.get(verb, lambda: app([verb, *argv], standalone_mode=False)))
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert REFUSED[case] in line
    assert set(here.rglob("*")) == before, "something was written"
