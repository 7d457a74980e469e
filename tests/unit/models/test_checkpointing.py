"""Gradient checkpointing: layers really are computed again, less is kept, and nothing else changes."""

from __future__ import annotations

import warnings

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.checkpointing import checkpoint_activations
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.unlearn.reference import FrozenModel


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 2}
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, bos_token_id=1, eos_token_id=1, **shape, **dropouts))


KINDS = ("llama", "llama_lora", "gpt2", "gpt2_lora")


@pytest.fixture
def build(make_lm):
    def make(kind: str, *, checkpointing: bool) -> AnswerModel:
        lm = gpt2() if kind.startswith("gpt2") else make_lm(layers=4)
        torch.manual_seed(1)
        model = AnswerModel(add_lora(lm, LoraConfig(rank=2)) if kind.endswith("lora") else lm).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        if checkpointing:
            checkpoint_activations(model.lm)
        return model

    return make


@pytest.fixture
def batch(tiny_items):
    return collate(tiny_items[:6])


def gradients(model, batch):
    """(loss, gradients by name, bytes that autograd keeps between the passes)."""
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch.inputs, batch.index_N).log_softmax(-1)[:, 3].mean()
    size = sum(kept.values())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size


def passes_of_first_mlp(model):
    """A list that grows by one with every pass through the first layer's MLP."""
    seen: list[int] = []
    first = next(module for name, module in model.named_modules() if name.endswith("0.mlp"))
    first.register_forward_pre_hook(lambda *_: seen.append(1))  # the second pass ends where nothing more is needed
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients_for_less_memory(build, batch, kind):
    loss, grads, size = gradients(build(kind, checkpointing=False), batch)
    loss_again, grads_again, size_again = gradients(build(kind, checkpointing=True), batch)
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    assert grads
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-5, atol=1e-7)
    assert size_again < 0.6 * size


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_computed_again_while_training_only(build, batch, kind):
    for checkpointing, passes in ((False, 1), (True, 2)):
        model = build(kind, checkpointing=checkpointing)
        seen = passes_of_first_mlp(model)
        gradients(model, batch)
        assert len(seen) == passes
        model.eval()
        with torch.no_grad():
            model(batch.inputs, batch.index_N)
        assert len(seen) == passes + 1


def test_every_adapter_gets_a_gradient(build, batch):
    _, grads, _ = gradients(build("llama_lora", checkpointing=True), batch)
    trained = [n for n, p in build("llama_lora", checkpointing=False).named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2
    assert sorted(grads) == sorted(trained)
    assert all(bool(grad.any()) for grad in grads.values())


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("kind", ["llama", "llama_lora"])
def test_the_reference_is_one_plain_pass(build, batch, kind, layer):
    plain, model = build(kind, checkpointing=False), build(kind, checkpointing=True)
    seen = passes_of_first_mlp(model)
    frozen = FrozenModel(model)
    out = frozen(batch.inputs, batch.index_N, layer)
    assert not out.requires_grad
    assert model.training
    assert torch.equal(out, FrozenModel(plain)(batch.inputs, batch.index_N, layer))
    assert len(seen) == 1  # where the reference is a copy, the hook is in it too


def test_no_warning_is_left_for_the_user(make_lm, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2))).train()
        checkpoint_activations(model.lm)
        gradients(model, batch)


def test_a_model_that_cannot_is_refused(make_lm):
    lm = make_lm()
    lm.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"gradient_checkpointing: LlamaForCausalLM does not support it; .*micro_batch"):
        checkpoint_activations(lm)
