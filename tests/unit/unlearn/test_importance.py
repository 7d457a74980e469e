"""Importances: one gradient an item, exact means, and the model left as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.methods.losses import token_logprobs
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.unlearn.importance import mean_gradient, mean_squared_gradients, pooled

ALONE = SimpleNamespace(process_index=0, num_processes=1)


def log_likelihood(model, items):
    batch = collate(items)
    return token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0].sum()


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_squared_gradients_are_those_of_backward_item_by_item(make_lm, tiny_items):
    model, items = AnswerModel(make_lm()), tiny_items[:5]
    by_item = [gradients(model, log_likelihood(model, [item])) for item in items]
    found, tokens = mean_squared_gradients(model, items, ALONE)
    assert found.keys() == by_item[0].keys()
    for name, values in found.items():
        torch.testing.assert_close(values, sum(g[name].square() for g in by_item) / 5, rtol=1e-4, atol=1e-12)
    assert tokens == sum(len(item.ids) - 1 for item in items)
    # not the square of the batch's gradient
    whole = gradients(model, log_likelihood(model, items))
    assert any(not torch.allclose(found[n], (whole[n] / 5).square(), rtol=0.1) for n in found)


def test_the_mean_gradient_is_that_of_the_mean_loss_over_all_tokens(make_lm, tiny_items):
    model, items = AnswerModel(make_lm()), tiny_items[:40:3]
    wanted = gradients(model, -log_likelihood(model, items) / sum(item.n_answer for item in items))
    found, _ = mean_gradient(model, items, ALONE)
    for name, values in found.items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-4, atol=1e-7)


def test_two_sets_together_are_one(make_lm, tiny_items):
    model = AnswerModel(make_lm())
    whole, *parts = (
        mean_squared_gradients(model, s, ALONE)[0] for s in (tiny_items[:9], tiny_items[:2], tiny_items[2:9])
    )
    both = pooled([(parts[0], 2), (parts[1], 7)])
    for name, values in whole.items():
        torch.testing.assert_close(both[name], values, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("compute", [mean_squared_gradients, mean_gradient])
def test_processes_share_the_items(make_lm, tiny_items, compute):
    model, items = AnswerModel(make_lm()), tiny_items[:7]
    alone, read = compute(model, items, ALONE)
    sent: list[torch.Tensor] = []

    def first(values, how):
        sent.append(values.clone())
        return values

    world = [SimpleNamespace(process_index=r, num_processes=2, reduce=first) for r in (0, 1)]
    tokens = sum(compute(model, items, place)[1] for place in world)
    n = len(alone)
    over = 7 if compute is mean_squared_gradients else sum(item.n_answer for item in items)
    for (_, values), a, b in zip(alone.items(), sent[:n], sent[n:], strict=True):
        torch.testing.assert_close((a + b) / over, values, rtol=1e-4, atol=1e-7)
    assert compute is mean_gradient or tokens == read


def test_the_model_is_left_as_it_was(make_lm, tiny_items):
    model = AnswerModel(make_lm()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean_squared_gradients(model, tiny_items[:3], ALONE)
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tied_weights_are_one(tiny_items, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5}
    model = AnswerModel(
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), bos_token_id=1, eos_token_id=1, **shape))
    )
    found, _ = mean_squared_gradients(model.train(), tiny_items[:3], ALONE)
    assert "lm.transformer.wte.weight" in found
    assert "lm.lm_head.weight" not in found
    again, _ = mean_squared_gradients(model, tiny_items[:3], ALONE)  # dropout would tell them apart
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_only_what_is_trained_counts(make_lm, tiny_items):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)))
    found, _ = mean_squared_gradients(model, tiny_items[:2], ALONE)
    assert found
    assert all("lora_" in name for name in found)
    assert all(not values.any() for name, values in found.items() if "lora_A" in name)  # B is 0 at the start
    assert any(values.any() for name, values in found.items() if "lora_B" in name)


def test_half_precision_is_summed_in_float32(make_lm, tiny_items):
    found, _ = mean_squared_gradients(AnswerModel(make_lm().to(torch.bfloat16)), tiny_items[:2], ALONE)
    assert {values.dtype for values in found.values()} == {torch.float32}


def test_a_gradient_that_is_not_finite_is_refused(make_lm, tiny_items):
    model = AnswerModel(make_lm())
    with torch.no_grad():
        model.lm.lm_head.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"the gradient of '.*' is not finite") as caught:
        mean_squared_gradients(model, tiny_items[:1], ALONE)
    assert "\n" not in str(caught.value)
