"""Relearning: what is told again, what is watched, and gold beside it."""

from __future__ import annotations

import json

import pytest

from llm_unlearn.attacks import relearn as module
from llm_unlearn.attacks.config import RelearnConfig
from llm_unlearn.attacks.relearn import relearn, relearn_beside, split_forget
from llm_unlearn.config import build_config
from llm_unlearn.errors import UserError
from llm_unlearn.models.pretrained import fingerprint
from llm_unlearn.train.finetune import FinetuneConfig, finetune
from llm_unlearn.unlearn.start import open_start

CONFIG = RelearnConfig(facts=2, updates=12, lr=3e-3, every=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that knows the facts and gold, of a small world."""
    home = tmp_path_factory.mktemp("relearn")
    for name, exclude in (("knows", "none"), ("gold", "forget")):
        values = {"out": str(home / name), "exclude": exclude, "data": {"kind": "world", "preset": "world12"},
                  "scenario": {"size": 2}, "model": {"size": "nano"}, "epochs": 30, "optim": {"lr": 1e-2},
                  "loop": {"batch_size": 64, "max_steps": 110, "threads": 1}}  # fmt: skip
        finetune(build_config(FinetuneConfig, values))
    return str(home / "knows" / "final"), str(home / "gold" / "final")


@pytest.fixture(scope="module")
def start(models):
    return open_start(models[0], None, None)


def test_no_fact_is_told_in_one_wording_and_watched_in_another(start):
    told, rest = split_forget(start.forget, 3, 0)
    assert len({row.fact_id for row in told}) == 3
    assert not {row.fact_id for row in told} & {row.fact_id for row in rest}
    assert sorted([*told, *rest], key=repr) == sorted(start.forget, key=repr)
    assert split_forget(start.forget, 3, 0) == (told, rest)
    assert split_forget(start.forget, 3, 1)[0] != told
    with pytest.raises(UserError, match=r"relearn.facts=10: the forget set has 10 facts"):
        split_forget(start.forget, 10, 0)


def test_what_is_told_is_learned_and_the_model_is_left_alone(models, start):
    before = fingerprint(models[1])
    course = relearn(models[1], start, CONFIG)
    assert [line["step"] for line in course] == [0, 5, 10, 12]
    assert course[-1]["told_prob"] > course[0]["told_prob"] + 0.1
    assert relearn(models[1], start, CONFIG) == course
    assert fingerprint(models[1]) == before


def test_a_model_stands_beside_its_gold(models, start, tmp_path, monkeypatch):
    lines, courses = relearn_beside(*models, start, CONFIG, tmp_path)
    n = len(split_forget(start.forget, CONFIG.facts, CONFIG.seed)[1])
    for who, course in courses.items():
        assert lines["relearn_acc"][who] == course[-1]["rest_acc"]
        assert lines["relearn_prob"][who] == course[-1]["rest_prob"]
    assert lines["relearn_acc"]["value"] > lines["relearn_acc"]["gold"], "it had not forgotten"
    at = [line["step"] for line in courses["value"] if line["rest_acc"] >= CONFIG.level]
    assert lines["relearn_updates"]["value"] == (at[0] if at else None)
    assert {line["n"] for line in lines.values()} == {n}
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["course"] == courses["gold"]

    asked = []
    monkeypatch.setattr(module, "relearn", lambda reference, *_: asked.append(reference) or courses["value"])
    again, _ = relearn_beside(*models, start, CONFIG, tmp_path)
    assert (again, asked) == (lines, [models[0]]), "gold's course is read"
    relearn_beside(*models, start, CONFIG.model_copy(update={"lr": 1e-3}), tmp_path)
    assert asked == [models[0], models[1], models[0]], "another attack on gold is run"
