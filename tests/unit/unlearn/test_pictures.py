"""Every method that needs no text, on pictures: items whose answer is one token, their class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import Picture
from llm_unlearn.errors import UserError
from llm_unlearn.methods.edits import fisher, ssd
from llm_unlearn.methods.needs import needs_text
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.image_model import build_classifier
from llm_unlearn.models.image_nets import NetConfig
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn import prepare
from llm_unlearn.unlearn.alternates import Alternates
from llm_unlearn.unlearn.config import MethodConfig, UnlearnConfig
from llm_unlearn.unlearn.generic import GenericTargets
from llm_unlearn.unlearn.importance import mean_gradient, mean_squared_gradients, pooled
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective
from llm_unlearn.unlearn.reference import UntrainedModel

CLASSES, SIDE = 5, 4
ALONE: Any = SimpleNamespace(num_processes=1, process_index=0)


@pytest.fixture
def model() -> Any:
    return answer_model(build_classifier(NetConfig(arch="cnn"), (1, SIDE, SIDE), CLASSES, 0))


@pytest.fixture
def pictures() -> Any:
    draw = np.random.default_rng(0)

    def some(n: int) -> list[Picture]:
        pixels = draw.normal(size=(n, 1, SIDE, SIDE)).astype(np.float32)
        return [Picture(image, int(draw.integers(CLASSES))) for image in pixels]

    forget = some(16)
    others = [Picture(item.pixels, (item.label + 1) % CLASSES) for item in forget]
    return Items(forget, some(24), rl=Alternates(others, np.arange(17), [["x"]] * 16))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.kind == "loss" and not needs_text(m)])
def test_a_loss_of_pictures_trains_the_net(model, pictures, name):
    params = {"ceu": {"skip": 0.0}, "whp": {"reinforce_updates": 5.0}}.get(name, {})
    config = MethodConfig(name=name, params=params)
    objective = make_objective(config, model, pictures, 1, 8, unseen_logp=-20.0)
    task = UnlearnTask(objective, pictures, 8, 0, Place())
    with torch.no_grad():  # away from the start model, where some terms have no gradient
        for p in model.parameters():
            p.add_(0.1)
    (micro,) = task.micro_batches(0)
    before = task.tokens["forward"]
    total, _ = task.loss(model, micro)
    total.backward()
    assert total.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert task.tokens["forward"] - before == 8 * len(micro), "images are what is counted"


def test_methods_of_hidden_states_take_the_width_of_their_layer(model, pictures):
    for layer, width in enumerate(model.lm.config.hidden_sizes[:-1]):
        config = MethodConfig(name="rmu", layer=layer)
        assert make_objective(config, model, pictures, 0).control_H.shape == (width,)


def test_skipping_the_only_answer_token_is_refused(model, pictures):
    with pytest.raises(UserError, match=r"method\.params\.skip=1 leaves nothing.*set method\.params\.skip=0"):
        make_objective(MethodConfig(name="ceu"), model, pictures, 0)


def test_importance_of_pictures_by_hand(model, pictures):
    found, read = mean_squared_gradients(model, pictures.forget, ALONE)
    wanted = torch.zeros_like(model.lm.head.weight)
    for item in pictures.forget:
        batch = collate([item])
        logp = model(batch.inputs, batch.index_N).log_softmax(-1)[0, item.label]
        wanted += torch.autograd.grad(logp, model.lm.head.weight)[0].square() / 16
    torch.testing.assert_close(found["lm.head.weight"], wanted)
    assert read == 16
    gradient, read = mean_gradient(model, pictures.forget, ALONE)
    assert read == 16
    assert gradient["lm.head.weight"].any()


def test_edits_of_a_net_change_it(model, pictures):
    forget, retain = (mean_squared_gradients(model, items, ALONE)[0] for items in (pictures.forget, pictures.retain))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    damped = ssd(weights, forget, pooled([(forget, 16), (retain, 24)]), alpha=1.0, lam=1.0)
    noisy = fisher(weights, retain, 0, alpha=1e-3, floor=1e-8)
    for after in (damped, noisy):
        assert after.keys() == weights.keys()
        assert any(not torch.equal(after[name], weights[name]) for name in weights)


def test_generic_targets_of_pictures_are_other_classes(model, pictures):
    knobs = {"strength": 20.0, "reinforce_updates": 50.0, "reinforce_lr": 1e-2}
    targets = GenericTargets(model, pictures.forget, knobs, 8, 0)
    assert targets.changed > 0.5
    assert targets(np.arange(16)).shape == (16,)


def test_an_untrained_net_is_another_of_the_same_shape(model, pictures):
    fresh, batch = UntrainedModel(model, 1), collate(pictures.forget)
    out = fresh(batch.inputs, batch.index_N)
    assert out.shape == (16, CLASSES)
    assert not torch.allclose(out, model(batch.inputs, batch.index_N))


@pytest.mark.parametrize(("there", "read"), [((), "holdout"), (("val", "val_holdout"), "val_holdout")])
def test_the_level_of_what_was_never_seen_is_of_validation_images_where_there_are_any(there, read, monkeypatch):
    splits = {name: (name,) for name in ("forget", "retain", "test", "holdout", *there)}
    monkeypatch.setattr(prepare, "eval_splits", lambda *_: splits)
    monkeypatch.setattr(prepare, "_few_items", lambda _config, _start, _tokenizer, rows: list(rows))
    monkeypatch.setattr(prepare, "quick_scores", lambda _model, items: (0.0, 2.0, 0.3) if items == [read] else None)
    config, start = UnlearnConfig(model="m", out="o"), SimpleNamespace(corpus=None, request=None)
    level = prepare.level_of(config, start, None, None)
    assert (level.source, level.logp, level.unseen_logp) == ("never seen", -2.0, -2.0)
    watched = prepare.watched_items(config, start, None)
    assert list(watched) == ["forget", "retain", "test", *there[:1]]
