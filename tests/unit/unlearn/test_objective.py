"""The objective: the right passes and no others, the right values at the start, and a reference that stays put."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.methods.losses import mean_by_row, sum_by_row, token_logprobs
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train.order import partner_items, step_items
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective, reads_logits
from llm_unlearn.unlearn.reference import CachedLogprobs, FrozenModel

# passes of a step: the trained model's and the frozen reference's
PASSES = {
    "finetune": (1, 0),
    "ga": (1, 0),
    "graddiff": (2, 0),
    "kl": (2, 1),
    "idk": (2, 0),
    "idk_dpo": (3, 0),
    "npo": (2, 0),
    "simnpo": (2, 0),
    "rmu": (2, 1),
    "altpo": (3, 0),
    "undial": (1, 1),
    "wga": (2, 0),
    "satimp": (2, 0),
    "me": (2, 0),
    "ceu": (1, 0),
    "flat": (2, 0),
    "flat_kl": (2, 0),
    "rmu_adaptive": (2, 2),
    "scrub": (1, 1),  # one turn
    "pdu": (2, 0),
    "whp": (1, 0),
    "npo_sam": (2, 0),  # of the loss itself; see test_wrapped for the step
    "salun": (2, 0),
    "neggrad_plus": (2, 0),
    "nabla_tau": (2, 0),
    "l1_sparse": (1, 0),
    "bad_teacher": (2, 2),
    "random_label": (2, 0),
}
LOSSES = [name for name, method in METHODS.items() if method.kind == "loss"]


def first_step(model, config, items, **place):
    objective = make_objective(MethodConfig(**config), model, items, 0, unseen_logp=-20.0)
    task = UnlearnTask(objective, items, 8, 0, Place(**place))
    return objective, task, list(task.micro_batches(0))


def count(*modules) -> Counter:
    """Count the calls of each module, by its place in the arguments."""
    calls: Counter = Counter()
    for i, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


def move(model, scale=0.5):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale * p.std().clamp(min=0.01) if p.dim() > 1 else 0.01)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_makes_the_passes_it_needs(make_lm, items, name):
    model = AnswerModel(make_lm())
    objective, task, (micro,) = first_step(model, {"name": name}, items)
    once = Counter(task.tokens)
    frozen = [held.model for held in (objective.reference, objective.untrained) if held]
    calls = count(model, *frozen)
    total, shown = task.loss(model, micro)
    assert (calls[0], calls[1] + calls[2]) == PASSES[name]
    total.backward()
    terms = {"forget_loss"} if METHODS[name].forget else set()
    terms |= {"retain_loss"} if METHODS[name].retain != "none" and METHODS[name].rule != "turns" else set()
    assert set(shown) == terms
    spent = task.tokens - once
    assert spent["forward"] == spent["backward"] == sum(p.batch.inputs.numel() for p in micro.values())
    assert (spent["reference"] > 0) == (PASSES[name][1] > 0)


def test_the_list_of_passes_is_complete():
    assert PASSES.keys() == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_batches_it_needs_are_drawn(make_lm, items, name):
    _, _, (micro,) = first_step(AnswerModel(make_lm()), {"name": name}, items)
    wanted = {
        "finetune": {"retain"}, "ga": {"forget"}, "idk": {"idk", "retain"}, "idk_dpo": {"forget", "idk", "retain"},
        "altpo": {"forget", "alt", "retain"}, "undial": {"forget"}, "ceu": {"forget"}, "flat": {"forget", "idk"},
        "flat_kl": {"forget", "idk"},
        "scrub": {"forget"}, "whp": {"forget"},
        "salun": {"rl", "retain"}, "random_label": {"rl", "retain"}, "l1_sparse": {"retain"},
    }  # fmt: skip
    assert set(micro) == wanted.get(name, {"forget", "retain"})


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", ["npo", "idk_dpo", "altpo"])
def test_the_first_step_is_two_log_two_over_beta(make_lm, items, name, beta, adapters):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)) if adapters else make_lm())
    _, task, (micro,) = first_step(model, {"name": name, "params": {"beta": beta}}, items)
    assert task.loss(model, micro)[1]["forget_loss"].item() == pytest.approx(2 * math.log(2) / beta, rel=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("name", "retain"), [("kl", "kl"), ("npo", "kl"), ("rmu", "embed"), ("ga", "embed")])
def test_retain_terms_of_the_reference_begin_at_zero(make_lm, items, name, retain, adapters):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)) if adapters else make_lm())
    _, task, (micro,) = first_step(model, {"name": name, "retain": retain}, items)
    _, shown = task.loss(model, micro)
    assert shown["retain_loss"].item() == pytest.approx(0, abs=1e-7)
    move(model)
    assert task.loss(model, micro)[1]["retain_loss"].item() > 1e-6


def test_a_models_own_dropout_does_not_reach_the_reference(items, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5}
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), bos_token_id=1, eos_token_id=1, **shape))
    for model in (AnswerModel(lm), AnswerModel(add_lora(lm, LoraConfig(rank=2)))):
        reference, batch = FrozenModel(model.train()), collate(items.forget)
        a, b = (reference(batch.inputs, batch.index_N) for _ in range(2))
        assert torch.equal(a, b)
        assert model.training
        model.eval()
        assert torch.allclose(a, model(batch.inputs, batch.index_N), atol=1e-6)


def test_values_by_hand(make_lm, items):
    """graddiff with weights: gamma * mean logp(forget) - alpha * mean logp(retain), over tokens."""
    model = AnswerModel(make_lm())
    _, task, (micro,) = first_step(model, {"name": "graddiff", "gamma": 0.3, "alpha": 1.7}, items)

    def mean_logp(source, numbers):
        batch = collate([source[i] for i in numbers])
        return token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0].mean()

    forget = mean_logp(items.forget, step_items(16, 8, 0, 0))
    retain = mean_logp(items.retain, partner_items(48, 8, 0, 0))
    total, shown = task.loss(model, micro)
    assert shown["forget_loss"].item() == pytest.approx(forget.item(), rel=1e-5)
    assert shown["retain_loss"].item() == pytest.approx(-retain.item(), rel=1e-5)
    assert total.item() == pytest.approx((0.3 * forget - 1.7 * retain).item(), rel=1e-5)


def test_refusals_answer_the_question_of_their_item(make_lm, items):
    model = AnswerModel(make_lm())
    _, _, (micro,) = first_step(model, {"name": "idk_dpo"}, items)
    assert micro["idk"].numbers.tolist() == micro["forget"].numbers.tolist()
    wanted = collate([items.idk[i] for i in micro["forget"].numbers])
    assert torch.equal(micro["idk"].batch.labels_N, wanted.labels_N)


def test_random_answers_are_drawn_anew_at_every_pass(make_lm, items):
    objective = make_objective(MethodConfig(name="salun"), AnswerModel(make_lm()), items, 0)
    task = UnlearnTask(objective, items, 16, 0, Place())
    first, second = (next(iter(task.micro_batches(step)))["rl"] for step in (0, 1))
    drawn = [
        dict(zip(step_items(16, 16, step, 0), part.numbers, strict=True)) for step, part in ((0, first), (1, second))
    ]
    assert all(drawn[0][i] != drawn[1][i] for i in range(16))
    wanted = collate([items.rl.items[i] for i in first.numbers])
    assert torch.equal(first.batch.labels_N, wanted.labels_N)


def test_cached_log_probabilities_are_the_frozen_models(make_lm, items):
    model = AnswerModel(make_lm())
    cached, frozen, batch = CachedLogprobs(model, items.forget), FrozenModel(model), collate(items.forget)
    logp_N, _ = token_logprobs(frozen(batch.inputs, batch.index_N), batch.labels_N)
    wanted = sum_by_row(logp_N, batch.row_N, batch.n_rows)
    numbers = torch.arange(16).numpy()
    assert torch.allclose(cached(numbers), wanted, atol=1e-5)
    assert torch.equal(cached(numbers[[3, 1]]), cached(numbers)[[3, 1]])
    assert cached(numbers).requires_grad is False


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_stays_where_it_was(make_lm, items, adapters):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)) if adapters else make_lm())
    batch = collate(items.retain[:5])
    frozen, cached = FrozenModel(model), CachedLogprobs(model, items.forget)
    before = frozen(batch.inputs, batch.index_N), frozen(batch.inputs, batch.index_N, 0)
    logp = cached.logp.clone()
    move(model)
    after = frozen(batch.inputs, batch.index_N), frozen(batch.inputs, batch.index_N, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(cached.logp, logp)
    assert not torch.allclose(model(batch.inputs, batch.index_N), before[0])
    assert not after[0].requires_grad


def test_under_adapters_there_is_no_second_copy(make_lm, items):
    model = AnswerModel(add_lora(make_lm(), LoraConfig(rank=2)))
    frozen = FrozenModel(model)
    assert frozen.model is model
    plain = AnswerModel(make_lm())
    copy = FrozenModel(plain)
    mine = {p.data_ptr() for p in plain.parameters()}
    assert not mine & {p.data_ptr() for p in copy.model.parameters()}
    assert not any(p.requires_grad for p in copy.model.parameters())
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize(
    "name",
    ["ga", "npo", "simnpo", "idk", "idk_dpo", "altpo", "wga", "satimp", "me", "ceu", "flat", "nabla_tau", "l1_sparse"],
)
def test_no_copy_is_held_where_none_is_needed(make_lm, items, name):
    objective, _, _ = first_step(AnswerModel(make_lm()), {"name": name}, items)
    assert objective.reference is None
    assert objective.untrained is None
    assert set(objective.cached) == {
        "npo": {"forget"}, "idk_dpo": {"forget", "idk"}, "altpo": {"forget", "alt"},
    }.get(name, set())  # fmt: skip


def test_pairs_are_functions_of_seed_and_step(make_lm, items):
    model = AnswerModel(make_lm())
    objective = make_objective(MethodConfig(), model, items, 0)

    def numbers(seed, step):
        (micro,) = UnlearnTask(objective, items, 8, seed, Place()).micro_batches(step)
        return {name: part.numbers.tolist() for name, part in micro.items()}

    assert numbers(0, 3) == numbers(0, 3)
    assert numbers(0, 3) != numbers(1, 3)
    assert sorted(numbers(0, 0)["forget"] + numbers(0, 1)["forget"]) == list(range(16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "nop"}, "unknown method 'nop' in method.name; did you mean 'npo'"),
        ({"name": "npo", "params": {"betta": 1.0}}, "unknown parameter 'betta'; did you mean 'beta'"),
        ({"name": "npo", "params": {"beta": 0.0}}, r"beta must be in \(0, inf\)"),
        ({"name": "scrub", "retain": "none"}, "method 'scrub' needs a retain term; set method.retain=distil"),
        ({"name": "pdu", "retain": "none"}, "method 'pdu' needs a retain term; set method.retain=nll"),
        ({"name": "l1_sparse", "retain": "none"}, "method 'l1_sparse' needs a retain term; set method.retain=nll"),
        ({"name": "nabla_tau"}, "method 'nabla_tau' raises the forget loss.*set method.params.target"),
        ({"name": "finetune", "retain": "none"}, "nothing to train on with retain=none"),
        ({"name": "ceu", "params": {"skip": 1.5}}, "skip must be a whole number"),
        ({"name": "ceu", "params": {"skip": 9}}, "method.params.skip=9 leaves nothing of any forget answer.*skip=0"),
        ({"name": "rmu_adaptive", "layer": 1}, "method.layer=1: the model has 2 layers"),
        ({"name": "rmu", "layer": 1}, "method.layer=1: the model has 2 layers.*choose 0 to 0"),
    ],
)
def test_what_does_not_fit_is_refused(make_lm, items, config, message):
    with pytest.raises(UserError, match=message) as caught:
        make_objective(MethodConfig(**config), AnswerModel(make_lm()), items, 0)
    assert "\n" not in str(caught.value)


def test_a_model_of_one_layer_has_none_to_read(make_lm, items):
    with pytest.raises(UserError, match="rmu.*needs a model of at least two layers, and this one has 1"):
        make_objective(MethodConfig(name="rmu"), AnswerModel(make_lm(layers=1)), items, 0)


def test_a_missing_retain_set_is_refused(make_lm, items):
    alone = Items(items.forget, [], items.idk)
    with pytest.raises(UserError, match="needs a retain set, and it is empty; choose method.retain=none"):
        make_objective(MethodConfig(name="npo"), AnswerModel(make_lm()), alone, 0)
    assert make_objective(MethodConfig(name="npo", retain="none"), AnswerModel(make_lm()), alone, 0)


def test_missing_alternates_are_refused(make_lm, items):
    without = replace(items, alt=None)
    with pytest.raises(UserError, match="method 'altpo' needs alternate answers, and there are none; see"):
        make_objective(MethodConfig(name="altpo"), AnswerModel(make_lm()), without, 0)
    assert make_objective(MethodConfig(name="npo"), AnswerModel(make_lm()), without, 0)


def test_alternates_answer_the_question_of_their_item_and_take_turns(make_lm, items):
    task = first_step(AnswerModel(make_lm()), {"name": "altpo"}, items)[1]
    used: dict[int, list[int]] = {i: [] for i in range(16)}
    for step in range(12):  # six epochs of 16 items in batches of 8
        (micro,) = task.micro_batches(step)
        for i, k in zip(micro["forget"].numbers.tolist(), micro["alt"].numbers.tolist(), strict=True):
            assert items.alt.starts[i] <= k < items.alt.starts[i + 1]
            used[i].append(k)
    for numbers in used.values():
        assert len(numbers) == 6
        counts = Counter(numbers)
        assert max(counts.values()) - min(counts.values()) <= 1  # of one, two or three, each as often as the others
    (again,) = task.micro_batches(5)
    assert again["alt"].numbers.tolist() == next(iter(task.micro_batches(5)))["alt"].numbers.tolist()


def test_micro_batches_pair_the_same_alternates(make_lm, items):
    model = AnswerModel(make_lm())
    objective, task, (whole,) = first_step(model, {"name": "altpo"}, items)
    parts = list(UnlearnTask(objective, items, 8, 0, Place(n_micro=4)).micro_batches(0))
    for name in ("forget", "alt"):
        assert [n for part in parts for n in part[name].numbers] == whole[name].numbers.tolist()
    move(model)
    total = sum(task.loss(model, part)[0].item() for part in parts)
    assert total == pytest.approx(task.loss(model, whole)[0].item(), rel=1e-4)


def test_each_sequence_of_flat_is_its_own(make_lm, items):
    """Refusals have other lengths than answers: each is averaged over its own tokens."""
    model = AnswerModel(make_lm())
    _, task, (micro,) = first_step(model, {"name": "flat"}, items)

    def mean_prob(item):
        batch = collate([item])
        return token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0].exp().mean().item()

    numbers = micro["forget"].numbers
    assert len({items.idk[i].n_answer for i in numbers} ^ {items.forget[i].n_answer for i in numbers}) > 0
    wanted = sum(math.tanh(mean_prob(items.forget[i])) - math.tanh(mean_prob(items.idk[i])) for i in numbers) / 16
    assert task.loss(model, micro)[0].item() == pytest.approx(wanted, abs=1e-6)


def test_adaptive_rmu_aims_at_the_length_of_the_start_model(make_lm, items):
    model = AnswerModel(make_lm())
    objective, task, (micro,) = first_step(model, {"name": "rmu_adaptive", "params": {"scale": 2.0}}, items)
    batch = micro["forget"].batch
    start_NH = model(batch.inputs, batch.index_N, objective.layer)
    target_NH = 2 * start_NH.norm(dim=-1, keepdim=True) * objective.control_H
    wanted = mean_by_row((start_NH - target_NH).square().mean(-1), batch.row_N, batch.n_rows).mean()
    assert task.loss(model, micro)[1]["forget_loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    move(model)  # the target stays with the start model
    moved_NH = model(batch.inputs, batch.index_N, objective.layer)
    wanted = mean_by_row((moved_NH - target_NH).square().mean(-1), batch.row_N, batch.n_rows).mean()
    assert task.loss(model, micro)[1]["forget_loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["rmu", "rmu_adaptive"])
def test_hidden_methods_read_no_logits(name):
    assert not reads_logits(MethodConfig(name=name))
    assert reads_logits(MethodConfig(name=name, retain="nll"))


def test_rmu_reads_the_layer_just_below_the_middle(make_lm, items):
    objective, task, (micro,) = first_step(AnswerModel(make_lm(layers=4)), {"name": "rmu"}, items)
    assert objective.layer == 1
    model = AnswerModel(make_lm(layers=4))
    task.loss(model, micro)[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("layers.1." in name for name in trained)
    assert not any("layers.2." in name or "layers.3." in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "finetune", "gamma": 0.5}, "method.gamma has no effect on 'finetune' with retain=nll; remove it"),
        (
            {"name": "undial", "alpha": 5.0},
            "method.alpha has no effect on 'undial' with retain=none; set",
        ),
        ({"name": "neggrad_plus", "alpha": 2.0}, "method.alpha has no effect.*; set method.params.beta instead"),
        ({"name": "l1_sparse", "gamma": 2.0}, "method.gamma has no effect.*; set method.params.strength instead"),
        ({"name": "npo", "layer": 0}, "method.layer has no effect on 'npo'"),
        ({"name": "npo", "alternates": "swapped"}, "method.alternates has no effect on 'npo'"),
    ],
)
def test_a_setting_without_effect_is_refused(make_lm, items, config, message):
    with pytest.raises(UserError, match=message):
        make_objective(MethodConfig(**config), AnswerModel(make_lm()), items, 0)


def test_alternates_are_paid_for(make_lm, items):
    made = replace(items, alt=replace(items.alt, tokens=77))
    for name, paid in (("altpo", 77), ("npo", 0)):
        objective = make_objective(MethodConfig(name=name), AnswerModel(make_lm()), made, 0)
        task = UnlearnTask(objective, made, 8, 0, Place())
        assert task.tokens["reference"] - objective.start_tokens["reference"] == paid
