"""What stops for numbers that are not finite says on which items they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.grok.tasks import SamTask
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.order import step_items
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective


def said(model, task, n_micro=1, edits=()) -> str:
    loop = LoopConfig(max_steps=3, batch_size=8, threads=1)
    with pytest.raises(UserError) as caught:
        train(
            model, task, OptimConfig(lr=1e-3, warmup=0), loop, accelerator=make_accelerator(loop, n_micro),
            gradient_edits=edits,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spoil(lm, token) -> None:
    """Make the model's numbers infinite on the items that hold a token."""
    with torch.no_grad():
        lm.get_input_embeddings().weight[token] = math.inf


def told_apart(numbers, items):
    """A token that some of these items hold, and the numbers of those."""
    for token in np.unique(np.concatenate([items[i].ids for i in numbers])):
        holding = [int(i) for i in numbers if token in items[i].ids[:-1]]
        if 1 < len(holding) < 5:
            return int(token), holding
    raise AssertionError("no such token")


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("sam", [False, True])
def test_a_loss_that_some_items_spoil_names_them(make_lm, tiny_items, n_micro, sam):
    token, holding = told_apart(step_items(len(tiny_items), 8, 0, 0), tiny_items)
    model = AnswerModel(make_lm())
    spoil(model.lm, token)
    task = FitTask(tiny_items, 8, 0, Place(n_micro=n_micro))
    message = said(model, SamTask(task, 0.05) if sam else task, n_micro)
    assert message.startswith("step 1: the loss is nan")
    assert message.endswith(f"not finite on items {', '.join(map(str, sorted(holding)))} of train (counted from 0)")


def test_a_batch_of_two_sorts_names_the_sort(make_lm, tiny_items):
    items = Items(tiny_items[::2], tiny_items[1::2])
    model = AnswerModel(make_lm())
    objective = make_objective(MethodConfig(name="npo"), model, items, 0)
    task = UnlearnTask(objective, items, 8, 0, Place())
    drawn = {name: numbers for name, (numbers, _) in task.drawn(0).items()}
    token, holding = told_apart(drawn["retain"], items.retain)
    also = sorted(int(i) for i in drawn["forget"] if token in items.forget[i].ids[:-1])
    spoil(model.lm, token)
    message = said(model, task)
    assert f"{', '.join(map(str, sorted(holding)))} of retain" in message
    assert (f"{', '.join(map(str, also))} of forget" in message) == bool(also)


def test_spoilt_weights_are_said_to_spoil_every_item(make_lm, tiny_items):
    model = AnswerModel(make_lm())
    with torch.no_grad():
        model.lm.model.norm.weight.fill_(math.nan)
    message = said(model, FitTask(tiny_items, 8, 0, Place()))
    assert "not finite on any of the step's 8 items: the weights are at fault" in message


def test_a_gradient_alone_names_the_items_of_the_step(make_lm, tiny_items):
    def edit(named):
        named[0][1].grad[0, 0] = math.inf

    message = said(AnswerModel(make_lm()), FitTask(tiny_items, 8, 0, Place()), edits=[edit])
    numbers = ", ".join(map(str, sorted(step_items(len(tiny_items), 8, 0, 0))))
    assert message.endswith(f"finite on each item of the step: {numbers} of train (counted from 0)")


def test_many_items_are_counted(make_lm, tiny_items):
    lm, loop = make_lm(), LoopConfig(max_steps=1, batch_size=64, threads=1)
    task = FitTask(tiny_items[:64], 64, 0, Place())

    def edit(named):
        named[0][1].grad[0, 0] = math.inf

    with pytest.raises(UserError, match=r"step: 0, 1, 2, 3, 4, 5, 6, 7 and 56 more of train \(counted from 0\)$"):
        train(
            AnswerModel(lm), task, OptimConfig(), loop, accelerator=make_accelerator(loop, 1), gradient_edits=[edit]
        )  # fmt: skip
