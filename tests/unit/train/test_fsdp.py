"""A divided model computes, trains and reads as the whole one; on one process here, whose share is everything, with
every hook in place. Two processes: tests/integration/test_engines.py.
"""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import score_answers
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.checkpointing import checkpoint_activations
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train import fsdp
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.optimizer import make_optimizer

OPTIM = OptimConfig(lr=1e-2)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (fsdp.ANNOUNCED, "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", *fsdp.REFUSED):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def accelerator():
    """What `prepare` takes of an Accelerator, in a world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, is_main_process=True,
        prepare_model=lambda model, evaluation_mode: model, prepare_optimizer=lambda optimizer: optimizer,
    )  # fmt: skip
    dist.destroy_process_group()


def other(kind: str, vocabulary: int):
    """A model that is no plain Llama: another architecture, and one whose logits are capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    return Gemma2ForCausalLM(Gemma2Config(**common, num_key_value_heads=2, head_dim=16))


@pytest.fixture(params=["llama", "tied", "lora", "checkpointed", "neox", "gemma2"])
def make(request, make_lm, tiny_tokenizer):
    """A function that makes one and the same model."""

    def model() -> AnswerModel:
        if request.param in ("neox", "gemma2"):
            return AnswerModel(other(request.param, len(tiny_tokenizer)))
        lm = make_lm(tie=request.param == "tied", layers=3)
        if request.param == "lora":
            torch.manual_seed(1)
            lm = add_lora(lm, LoraConfig(rank=2))
        if request.param in ("lora", "checkpointed"):
            checkpoint_activations(lm)
        return AnswerModel(lm)

    return model


def steps(model: AnswerModel, optimizer, items, n: int) -> list[float]:
    """Losses and norms of `n` steps, each of two passes and one backward, as forgetting and retaining are."""
    found = []
    model.train()
    for i in range(n):
        total = 0.0
        for part in (items[i : i + 4], items[i + 4 : i + 8]):
            batch = collate(part)
            logits_NV = model(batch.inputs, batch.index_N)
            total = total + torch.nn.functional.cross_entropy(logits_NV.float(), batch.labels_N)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found += [float(total.detach()), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)]
    return found


def divided(model: AnswerModel, accelerator, optim: OptimConfig = OPTIM):
    """A run's model and optimizer, divided."""
    model, optimizer = fsdp.prepare(accelerator, model, make_optimizer(model, optim), optim, LoopConfig())
    return SimpleNamespace(model=model, lm=model.lm, accelerator=accelerator), optimizer


def test_it_trains_as_the_whole_model_does(make, accelerator, tiny_items):
    plain = make()
    optimizer = make_optimizer(plain, OPTIM)
    run, shares = divided(make(), accelerator)
    assert all(isinstance(weight, DTensor) for weight in run.model.parameters())
    assert steps(run.model, shares, tiny_items, 2) == pytest.approx(steps(plain, optimizer, tiny_items, 2), rel=1e-5)
    # an evaluation calls parts of the model, and leaves some of it whole
    scored, wanted = score_answers(run.model, tiny_items[:6]), score_answers(plain, tiny_items[:6])
    for mine, theirs in zip(scored, wanted, strict=True):
        assert mine.logp == pytest.approx(theirs.logp, rel=1e-4, abs=1e-5)
    batch = collate(tiny_items[:3])
    with torch.no_grad():
        hidden = [model(batch.inputs, batch.index_N, 1) for model in (run.model, plain)]
    torch.testing.assert_close(*hidden)
    assert steps(run.model, shares, tiny_items, 2) == pytest.approx(steps(plain, optimizer, tiny_items, 2), rel=1e-4)


def test_whole_weights_are_plain_and_tied_as_before_and_shares_come_back(make, accelerator, tiny_items):
    plain = make()
    run, _ = divided(make(), accelerator)
    score_answers(run.model, tiny_items[:2])
    before = dict(run.model.named_parameters())
    with fsdp.whole_weights(run):
        state = run.lm.state_dict()
        assert not any(isinstance(value, DTensor) for value in state.values())
        assert state.keys() == plain.lm.state_dict().keys()
        assert all(value.equal(state[name]) for name, value in plain.lm.state_dict().items())
        names = [name for name, _ in run.lm.named_parameters()]
        assert names == [name for name, _ in plain.lm.named_parameters()], "tied weights are one"
    after = dict(run.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(isinstance(weight, DTensor) for weight in after.values())


def test_within_whole_weights_the_model_is_a_plain_one(make, accelerator, tiny_items, monkeypatch):
    """It answers and generates without gathering: a process may do so alone. Afterwards it trains on."""
    plain = make()
    optimizer = make_optimizer(plain, OPTIM)
    run, shares = divided(make(), accelerator)
    ids = collate(tiny_items[:1]).inputs
    options = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    for begun in (False, True):
        if begun:
            assert steps(run.model, shares, tiny_items, 1) == pytest.approx(
                steps(plain, optimizer, tiny_items, 1), rel=1e-5
            )
        plain.eval()
        run.model.eval()
        with fsdp.whole_weights(run), monkeypatch.context() as alone, torch.no_grad():
            alone.setattr(dist, "all_gather_into_tensor", lambda *args, **kwargs: pytest.fail("gathers"))
            torch.testing.assert_close(run.lm(ids).logits, plain.lm(ids).logits, rtol=1e-4, atol=1e-4)
            assert run.lm.generate(ids, **options).equal(plain.lm.generate(ids, **options))
    assert steps(run.model, shares, tiny_items, 2) == pytest.approx(steps(plain, optimizer, tiny_items, 2), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_states_are_those_of_one_process(make, accelerator, tiny_items, optimizer):
    """And go back and forth: what is gathered trains on in a whole model, and what that left in a divided one."""
    optim = OptimConfig(lr=1e-2, optimizer=optimizer, momentum=0.9) if optimizer == "sgd" else OPTIM
    run, shares = divided(make(), accelerator, optim)
    steps(run.model, shares, tiny_items, 2)
    weights, state = fsdp.trained_weights(run), shares.state_dict()
    plain = make()
    alone = make_optimizer(plain, optim)
    assert state["param_groups"] == alone.state_dict()["param_groups"]
    plain.lm.load_state_dict(weights, strict=False)
    alone.load_state_dict(deepcopy(state))  # torch steps on what it is given
    assert alone.state_dict()["state"].keys() == state["state"].keys()
    whole = steps(plain, alone, tiny_items, 2)

    again, their = divided(make(), accelerator, optim)
    fsdp.put_weights(again, weights)
    their.load_state_dict(deepcopy(state))
    assert steps(again.model, their, tiny_items, 2) == pytest.approx(whole, rel=1e-4)
    assert steps(run.model, shares, tiny_items, 2) == pytest.approx(whole, rel=1e-4)
    mine, theirs = fsdp.trained_weights(run), fsdp.trained_weights(again)
    assert all(value.equal(theirs[name]) for name, value in mine.items()), "put back, it goes on to the bit"


def test_who_does_not_keep_gets_nothing(make_lm, accelerator, tiny_items):
    accelerator.is_main_process = False
    run, shares = divided(AnswerModel(make_lm()), accelerator)
    steps(run.model, shares, tiny_items, 1)
    assert fsdp.trained_weights(run, keep=False) == {}
    assert shares.state_dict()["state"] == {}


def test_weights_of_another_model_are_refused(make_lm, accelerator):
    run, _ = divided(AnswerModel(make_lm()), accelerator)
    state = fsdp.trained_weights(run)
    name = next(iter(state))
    with pytest.raises(KeyError, match="1 weights differ in name"):
        fsdp.put_weights(run, {key: value for key, value in state.items() if key != name})
    with pytest.raises(KeyError, match="1 weights differ in name, first else"):
        fsdp.put_weights(run, {**state, "else": state[name]})


@pytest.mark.parametrize(("plain_last_layer", "n"), [(True, 2), (False, 3)])
def test_layers_are_units_but_the_one_of_which_only_parts_are_called(make_lm, plain_last_layer, n):
    model = AnswerModel(make_lm(layers=3))
    model.plain_last_layer = plain_last_layer
    assert fsdp._units(model) == list(model.lm.model.layers)[:n]


@pytest.mark.parametrize(("said", "frees"), [(None, True), ("true", True), ("false", False)])
def test_the_launch_file_says_whether_layers_are_freed_after_their_forward_pass(
    make_lm, accelerator, tiny_items, monkeypatch, said, frees
):
    if said:
        monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", said)
    run, _ = divided(AnswerModel(make_lm(layers=3)), accelerator)
    batch = collate(tiny_items[:2])
    run.model(batch.inputs, batch.index_N)
    assert isinstance(run.lm.model.layers[0].mlp.up_proj.weight, DTensor) == frees


@pytest.mark.parametrize(
    ("env", "loop", "engine", "said"),
    [
        ({}, {}, "NO", "Accelerate chose NO, which joins no processes.*ACCELERATE_USE_CPU=true"),
        ({"FSDP_VERSION": "1"}, {}, "MULTI_CPU", "fsdp_version 1: .* set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "MULTI_CPU", "fsdp_offload_params: offload has not been tested"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "MULTI_GPU", "loop.gradient_checkpointing decides here"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "MULTI_GPU", "would be empty .* set it to false"),
        ({}, {"precision": "fp16"}, "MULTI_GPU", "fp16 has not been tested under FSDP2; choose bf16 or no"),
    ],
)
def test_what_is_refused(monkeypatch, env, loop, engine, said):
    for name, value in {"FSDP_VERSION": "2", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        fsdp.check_settings(LoopConfig(**loop), engine)
    assert "\n" not in str(caught.value)


def test_accelerate_does_not_hear_of_it(monkeypatch):
    with fsdp.unannounced():
        assert not fsdp.asked()
    assert not fsdp.asked()
    monkeypatch.setenv(fsdp.ANNOUNCED, "true")
    with fsdp.unannounced():
        assert not fsdp.asked()
    assert fsdp.asked()
