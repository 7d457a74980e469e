"""Generic targets: made from the start model, the same every time, and paid for."""

from __future__ import annotations

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.eval.scoring import padded_tokens
from llm_unlearn.methods.losses import nll, token_logprobs
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.generic import GenericTargets
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective

PARAMS = {"strength": 5.0, "reinforce_updates": 4.0, "reinforce_lr": 1e-2}


@pytest.fixture
def forget(tiny_items):
    return tiny_items[:12]


@pytest.mark.parametrize("adapters", [False, True])
def test_the_start_model_is_left_alone_and_the_targets_are_the_same_every_time(make_lm, forget, adapters):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)) if adapters else make_lm())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    a, b = (GenericTargets(model, forget, PARAMS, 8, 0) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, y) for x, y in zip(a.labels, b.labels, strict=True))
    assert [len(x) for x in a.labels] == [item.n_answer for item in forget]


def test_reinforced_tokens_are_not_the_targets_any_more(make_lm, forget):
    """A model of no opinion is reinforced on the answers: they are what is pushed down."""
    model = AnswerModel(make_lm())
    pushed = GenericTargets(model, forget, {**PARAMS, "reinforce_updates": 20.0}, 8, 0)
    assert pushed.changed == 1.0
    logits_NV = model(*(getattr(collate(forget), key) for key in ("inputs", "index_N")))
    kept = GenericTargets(model, forget, {**PARAMS, "strength": 0.0}, 8, 0)
    assert torch.equal(kept(torch.arange(12).numpy()), logits_NV.argmax(-1))


def test_what_they_cost_is_counted(make_lm, forget, tiny_items):
    model = AnswerModel(make_lm())
    config = MethodConfig(name="whp", params={"reinforce_updates": 4.0})
    objective = make_objective(config, model, Items(forget, tiny_items[12:40]), 0, 8)
    per_item = sum(len(item.ids) - 1 for item in forget) / len(forget)
    assert objective.start_tokens["backward"] == pytest.approx(4 * 8 * per_item, rel=0.15)
    assert objective.start_tokens["reference"] == pytest.approx(2 * 12 * per_item, rel=0.15)
    assert objective.reference is None


def test_the_loss_is_that_of_the_targets_of_the_batchs_items(make_lm, forget, tiny_items):
    model = AnswerModel(make_lm())
    items = Items(forget, tiny_items[12:40])
    objective = make_objective(MethodConfig(name="whp", params=PARAMS), model, items, 0, 8)
    (micro,) = UnlearnTask(objective, items, 8, 0, Place()).micro_batches(0)
    _, shown = UnlearnTask(objective, items, 8, 0, Place()).loss(model, micro)
    batch = collate([forget[i] for i in micro["forget"].numbers])
    wanted_N = torch.cat([objective.generic.labels[i] for i in micro["forget"].numbers])
    logits_NV = model(batch.inputs, batch.index_N)
    assert shown["forget_loss"].item() == pytest.approx(nll(token_logprobs(logits_NV, wanted_N)[0]).item(), rel=1e-5)


def test_cached_reference_passes_are_counted_too(make_lm, forget, tiny_items):
    objective = make_objective(MethodConfig(name="npo"), AnswerModel(make_lm()), Items(forget, tiny_items[12:40]), 0)
    assert objective.start_tokens == {"reference": padded_tokens(forget)}
