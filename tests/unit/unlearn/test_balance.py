"""Weights that follow a rule, a target from data never trained on, a penalty on the trained weights, and an untrained
model, as the objective has them.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import UnlearnTask, check_for_images, make_objective
from llm_unlearn.unlearn.reference import UntrainedModel
from llm_unlearn.unlearn.wrapped import StepGradients, WrappedTask, choose_wrapper

SEED = 7  # another than the tests' models are made with: an untrained model of the same seed would be their beginning


def task_of(model, items, config, n_micro=1, updates=4, batch=8):
    settings = MethodConfig(**config)
    objective = make_objective(settings, model, items, SEED, batch, updates=updates, unseen_logp=-20.0)
    draws = (items, batch, 0, Place(n_micro=n_micro))
    wrapper = choose_wrapper(settings)
    return UnlearnTask(objective, *draws) if wrapper is None else WrappedTask(objective, wrapper, *draws)


def go(model, task, steps, n_micro=1):
    loop = LoopConfig(max_steps=steps, batch_size=8, log_every=1, threads=1)
    return train(model, task, OptimConfig(lr=1e-3, warmup=0), loop, accelerator=make_accelerator(loop, n_micro))


@pytest.mark.parametrize(
    ("name", "params", "weights"),
    [
        ("neggrad_plus", {"beta": 0.9}, [(0.1, 0.9)] * 4),
        ("nabla_tau", {"start": 0.4}, [(0.4, 0.6), (0.3, 0.7), (0.2, 0.8), (0.1, 0.9)]),
        ("l1_sparse", {"strength": 0.4}, [(0.4, 1.0), (0.3, 1.0), (0.2, 1.0), (0.1, 1.0)]),
    ],
)
def test_the_loss_of_every_step_has_that_steps_weights(make_lm, items, name, params, weights):
    model = AnswerModel(make_lm())
    task = task_of(model, items, {"name": name, "params": params})
    for step, (gamma, alpha) in enumerate(weights):
        (micro,) = task.micro_batches(step)
        total, shown = task.loss(model, micro)
        wanted = gamma * shown["forget_loss"] + alpha * shown["retain_loss"]
        assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_neggrad_plus_is_graddiff_with_two_weights(make_lm, items):
    losses = []
    for config in (
        {"name": "neggrad_plus", "params": {"beta": 0.9}},
        {"name": "graddiff", "gamma": 0.1, "alpha": 0.9},
    ):
        model = AnswerModel(make_lm())
        task = task_of(model, items, config)
        (micro,) = task.micro_batches(0)
        losses.append(task.loss(model, micro)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_wrapped_step_has_its_weights_too(make_lm, items):
    model = AnswerModel(make_lm())
    config = {"name": "nabla_tau", "gradient": "orthopenalty", "gradient_params": {"weight": 0.0}}
    run = go(model, task_of(model, items, config, updates=2), 2)
    assert run.loss == pytest.approx(0.25 * run.logs["forget_loss"] + 0.75 * run.logs["retain_loss"], rel=1e-5)


# --- the target ----------------------------------------------------------------------------------------------------


def test_the_target_is_the_loss_of_data_never_trained_on_unless_given(make_lm, items):
    model = AnswerModel(make_lm())

    def target(unseen, **params):
        config = MethodConfig(name="nabla_tau", params=params)
        return make_objective(config, model, items, 0, unseen_logp=unseen).params["target"]

    assert target(-3.5) == 3.5
    assert target(-3.5, target=2.0) == target(None, target=2.0) == 2.0
    with pytest.raises(UserError, match="there is neither gold nor a split holdout.*set method.params.target"):
        target(None)


def test_ascent_stops_at_the_target(make_lm, items):
    """Whatever the learning rate does, above the target the forget term is 0 and asks for nothing."""
    model = AnswerModel(make_lm())
    (micro,) = (task := task_of(model, items, {"name": "nabla_tau", "params": {"target": 0.01}})).micro_batches(0)
    value = task.term(model, micro, "forget")
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("n_micro", [1, 2, 4])
def test_the_whole_batchs_mean_takes_one_more_pass_where_it_is_divided(make_lm, items, n_micro):
    model = AnswerModel(make_lm())
    task = task_of(model, items, {"name": "nabla_tau"}, n_micro)
    plain = task_of(model, items, {"name": "graddiff"}, n_micro)
    parts = list(task.micro_batches(0))
    total = sum(task.loss(model, part)[1]["forget_loss"].item() for part in parts)
    other = sum(plain.loss(model, part)[1]["forget_loss"].item() for part in parts)
    assert total == pytest.approx((20.0 + other) ** 2, rel=1e-5)
    forget = sum(part["forget"].batch.inputs.numel() for part in parts)
    more = 0 if n_micro == 1 else forget
    assert task.tokens - plain.tokens == +Counter(forward=more)


def test_the_mean_is_that_at_the_weights_a_wrapper_looks_at(make_lm, items):
    """Divided or not, the gradient at shifted weights is the same."""
    found = []
    for n_micro in (1, 4):
        model = AnswerModel(make_lm())
        task = task_of(model, items, {"name": "nabla_tau", "gradient": "sam"}, n_micro)
        weights = [p for p in model.parameters() if p.requires_grad]
        run: Any = SimpleNamespace(step=0, answer_model=model, accelerator=SimpleNamespace(num_processes=1))
        oracle = StepGradients(task, run, weights)
        plain = oracle("forget")
        shifted = oracle("forget", [0.05 * torch.ones_like(w) for w in weights])
        again = oracle("forget")
        assert all(torch.allclose(a, b) for a, b in zip(plain, again, strict=True))
        found.append(torch.cat([g.flatten() for g in shifted]))
        assert not torch.allclose(found[-1], torch.cat([g.flatten() for g in plain]), rtol=1e-2)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


# --- the penalty ---------------------------------------------------------------------------------------------------


def test_the_penalty_counts_trained_weights_alone(make_lm, items):
    whole, adapted = AnswerModel(make_lm()), AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)))
    for model in (whole, adapted):
        task = task_of(model, items, {"name": "l1_sparse"})
        (micro,) = task.micro_batches(0)
        wanted = sum(p.abs().sum().item() for p in model.parameters() if p.requires_grad)
        assert task.term(model, micro, "forget").item() == pytest.approx(wanted, rel=1e-5)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) < 0.5 * sum(
        p.numel() for p in whole.parameters()
    )


def test_the_penalty_shrinks_the_weights(make_lm, items):
    norms = {}
    for strength in (0.0, 1.0):
        model = AnswerModel(make_lm())
        config = {"name": "l1_sparse", "params": {"strength": strength}}
        go(model, task_of(model, items, config, updates=10), 10)
        norms[strength] = sum(p.abs().sum().item() for p in model.parameters())
    assert norms[1.0] < 0.9 * norms[0.0]


# --- the untrained model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_the_untrained_model_is_a_function_of_the_seed_and_of_the_shape(make_lm, items, adapters):
    def build(seed, lm_seed=0):
        lm = make_lm(lm_seed)
        return UntrainedModel(AnswerModel(add_lora(lm, LoraConfig(rank=2)) if adapters else lm), seed)

    batch = collate(items.forget)
    a, b, c, d = (build(*seeds)(batch.inputs, batch.index_N) for seeds in ((7,), (7, 5), (8,), (7,)))
    assert torch.equal(a, b), "another start model of the same shape has the same one"
    assert torch.equal(a, d)
    assert not torch.allclose(a, c)
    assert not a.requires_grad
    start = AnswerModel(make_lm())
    assert not torch.allclose(a, start(batch.inputs, batch.index_N))
    assert build(7).model.lm.config.hidden_size == start.lm.config.hidden_size


def test_making_the_untrained_model_draws_nothing_from_the_runs_generator(make_lm):
    model = AnswerModel(make_lm())
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    UntrainedModel(model, 0)
    assert torch.equal(torch.rand(4), wanted)


def test_bad_teacher_is_drawn_to_the_untrained_model_and_retains_the_start_one(make_lm, items):
    model = AnswerModel(make_lm())
    task = task_of(model, items, {"name": "bad_teacher"})
    (micro,) = task.micro_batches(0)
    first = task.loss(model, micro)[1]
    assert first["retain_loss"].item() == pytest.approx(0, abs=1e-6)
    assert first["forget_loss"].item() > 0
    frozen = [p.clone() for p in task.objective.untrained.model.parameters()]
    run = go(model, task, 10)
    assert run.logs["forget_loss"] < first["forget_loss"].item()
    assert all(torch.equal(a, b) for a, b in zip(frozen, task.objective.untrained.model.parameters(), strict=True))


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_needs_text_is_refused_for_images_in_one_line(name):
    if name not in ("idk", "idk_dpo", "altpo", "flat", "flat_kl"):
        check_for_images(MethodConfig(name=name))
        return
    said = "alternate answers" if name == "altpo" else "refusals"
    with pytest.raises(UserError, match=f"method '{name}' needs {said}, which images have none of; choose") as caught:
        check_for_images(MethodConfig(name=name))
    assert len(str(caught.value).splitlines()) == 1
