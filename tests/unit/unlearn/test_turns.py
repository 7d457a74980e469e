"""Turns: who has which update, that no batch is left out, and that a term out of turn costs nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective, reads_logits
from llm_unlearn.unlearn.turns import Alternating, Turn, joint


def test_turns_by_hand():
    turns = [Alternating(2)(step) for step in range(6)]
    assert turns == [Turn(0, None), Turn(None, 0), Turn(1, None), Turn(None, 1), Turn(None, 2), Turn(None, 3)]
    assert [Alternating(0)(step) for step in range(2)] == [Turn(None, 0), Turn(None, 1)]
    assert joint(5) == Turn(5, 5)


@pytest.mark.parametrize("updates", [0, 1, 7, 100])
def test_no_batch_is_left_out_and_every_update_is_somebodys(updates):
    turns = [Alternating(updates)(step) for step in range(60)]
    forget = [t.forget for t in turns if t.forget is not None]
    retain = [t.retain for t in turns if t.retain is not None]
    assert all((t.forget is None) != (t.retain is None) for t in turns)
    assert forget == list(range(min(updates, 30)))
    assert retain == list(range(60 - len(forget)))


def test_a_term_out_of_turn_costs_nothing(make_lm, tiny_items):
    items = Items(tiny_items[:16], tiny_items[16:64])
    model = AnswerModel(make_lm())
    objective = make_objective(MethodConfig(name="scrub", params={"msteps": 1.0}), model, items, 0, 8)
    task = UnlearnTask(objective, items, 8, 0, Place())
    assert objective.turn == Alternating(2)  # sixteen items in batches of eight, once
    for step, name in enumerate(["forget", "retain", "forget", "retain", "retain", "retain"]):
        task.tokens.clear()
        (micro,) = task.micro_batches(step)
        assert set(micro) == {name}
        total, shown = task.loss(model, micro)
        assert set(shown) == {f"{name}_loss"}
        total.backward()
        tokens = micro[name].batch.inputs.numel()
        assert task.tokens == Counter(forward=tokens, backward=tokens, reference=tokens)
    drawn = [next(iter(task.micro_batches(step)))["forget"].numbers.tolist() for step in (0, 2)]
    assert sorted(drawn[0] + drawn[1]) == list(range(16))


def test_a_turn_that_reads_hidden_states_alone_leaves_weights_without_a_gradient():
    assert reads_logits(MethodConfig(name="scrub"))
    assert not reads_logits(MethodConfig(name="scrub", retain="embed"))
