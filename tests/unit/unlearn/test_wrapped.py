"""Wrapped steps: what they cost, what they come to without the wrapper, in parts, under adapters, and after a kill."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from llm_unlearn.config import load_config
from llm_unlearn.errors import UserError
from llm_unlearn.methods.gradients import GRADIENTS, check_gradient
from llm_unlearn.methods.needs import needs
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import MethodConfig, UnlearnConfig
from llm_unlearn.unlearn.objective import UnlearnTask, make_objective
from llm_unlearn.unlearn.wrapped import StepGradients, WrappedTask, Wrapper, check_divided, check_engine, choose_wrapper

NAMES = list(GRADIENTS)
BOTH = [name for name, m in METHODS.items() if m.kind == "loss" and {"retain"} < needs(m) and m.rule != "turns"]


@pytest.fixture
def go(make_lm, items):
    """Train a few updates; returns the Run, the task and the gradients of every update."""

    def run(
        method="npo",
        gradient=None,
        steps=1,
        n_micro=1,
        out=None,
        lora=False,
        save_every=100,
        lm=None,
        precision="no",
        **changes,
    ):
        config = MethodConfig(name=method, gradient=gradient, **changes)
        lm = make_lm() if lm is None else lm
        torch.manual_seed(0)
        adapters = LoraConfig(rank=2, dropout=lora if isinstance(lora, float) else 0.0)
        model = AnswerModel(add_lora(lm, adapters) if lora else lm)
        wrapper = choose_wrapper(config)
        draws = (items, 8, 0, Place(n_micro=n_micro))
        objective = make_objective(config, model, items, 0, 8, unseen_logp=-20.0)
        with torch.no_grad():  # away from the start model, where some retain terms have no gradient
            torch.manual_seed(7)
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn_like(p))
        task = WrappedTask(objective, wrapper, *draws) if wrapper else UnlearnTask(objective, *draws)
        seen = []

        def look(named):
            seen.append({name: None if p.grad is None else p.grad.clone() for name, p in named})

        loop = LoopConfig(
            max_steps=steps, batch_size=8, log_every=1, save_every=save_every, threads=1, precision=precision
        )
        done = train(
            model, task, OptimConfig(lr=1e-3, warmup=0, clip=0.0), loop, accelerator=make_accelerator(loop, n_micro),
            out=out, gradient_edits=[look],
        )  # fmt: skip
        return done, task, seen

    return run


def close(a, b, tolerance=1e-5):
    """Whether two gradients are equal up to a share of their length."""
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
    keys = [k for k in a if a[k] is not None]
    x, y = (torch.cat([g[k].flatten() for k in keys]) for g in (a, b))
    assert x.norm() > 0
    return (x - y).norm() <= tolerance * x.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", BOTH)
def test_with_a_wrapper_that_does_nothing_a_step_is_the_plain_one(go, method, lora):
    plain, _, (a,) = go(method, "none", lora=lora)
    run, _, (b,) = go(method, "orthopenalty", lora=lora, gradient_params={"weight": 0.0})
    assert close(a, b)
    assert run.loss == pytest.approx(plain.loss, rel=1e-5)
    assert run.logs == pytest.approx(plain.logs, rel=1e-5)


@pytest.fixture
def other_precision():
    """Accelerate holds one precision per process: forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_mixed_precision_reaches_the_passes_of_a_wrapper(go, other_precision):
    plain, _, (a,) = go("npo", "none", precision="bf16")
    run, _, (b,) = go("npo", "orthopenalty", precision="bf16", gradient_params={"weight": 0.0})
    assert run.logs == pytest.approx(plain.logs, rel=1e-6)
    assert close(a, b)
    assert all(value.dtype == torch.float32 for value in b.values())
    AcceleratorState._reset_state(True)
    assert run.logs != pytest.approx(go("npo", "none")[0].logs, rel=1e-6), "the passes were in fp32 all along"


def test_sam_of_next_to_no_radius_is_the_plain_step_and_of_some_radius_is_not(go):
    _, _, (plain,) = go("npo")
    assert close(plain, go("npo", "sam", gradient_params={"rho": 1e-6})[2][0], 1e-3)
    assert not close(plain, go("npo", "sam", gradient_params={"rho": 1.0})[2][0], 1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_adapters_change_nothing(go, name):
    for lora in (False, True):
        a, _, (whole,) = go("npo", name, lora=lora)
        b, _, (parts,) = go("npo", name, lora=lora, n_micro=4)
        # finite differences divide rounding by the radius
        assert close(whole, parts, 1e-2 if name == "orthopenalty" else 1e-4)
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert all("lora" in key for key in whole) == lora


def test_orthograd_leaves_every_retained_item_where_it_is(go, monkeypatch):
    """To first order: the step's product with each item's gradient vanishes against that of the plain step."""
    kept, rows_of = [], StepGradients.rows
    monkeypatch.setattr(StepGradients, "rows", lambda self, term: kept.append(rows_of(self, term)) or kept[-1])
    _, _, (wrapped,) = go("ga", "orthograd", retain="nll", alpha=0.0)
    _, _, (plain,) = go("ga", "none", retain="nll", alpha=0.0)
    matrix = torch.cat([r.flatten(1) for r in kept[0]], 1)
    assert matrix.shape[0] == 8
    after, before = (torch.cat([g.flatten() for g in grads.values()]) for grads in (wrapped, plain))
    assert ((matrix @ after).abs() <= 1e-4 * matrix.norm(dim=1) * after.norm()).all()
    assert ((matrix @ before).abs() > 1e-2 * matrix.norm(dim=1) * before.norm()).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_what_is_declared(go, name):
    _, plain, _ = go("npo", "none")
    _, task, _ = go("npo", name)
    (micro,) = plain.micro_batches(0)
    forget, retain = (micro[key].batch.inputs.numel() for key in ("forget", "retain"))
    before = plain.objective.start_tokens
    assert plain.tokens - before == Counter(forward=forget + retain, backward=forget + retain)
    declared = GRADIENTS[name].passes[0] * forget + GRADIENTS[name].passes[1] * retain
    # item by item there is no padding: a little less
    assert declared / 1.15 <= task.tokens["backward"] <= declared * 1.15
    if name != "orthograd":
        assert task.tokens["backward"] == declared


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_bit_identically(go, name, tmp_path):
    straight, _, _ = go("ga", name, steps=6, retain="nll")  # the terms oppose each other, so that averages matter
    go("ga", name, steps=6, out=tmp_path, save_every=2, retain="nll")
    shutil.rmtree(max((tmp_path / "checkpoints").iterdir()))
    resumed, task, _ = go("ga", name, steps=6, out=tmp_path, save_every=2, retain="nll")
    assert resumed.resumed_from == 4
    assert all(torch.equal(a, b) for a, b in zip(straight.lm.parameters(), resumed.lm.parameters(), strict=True))
    assert straight.loss == resumed.loss
    assert bool(task.memory) == (name == "gru")


def test_what_is_remembered_decides_the_next_step(go, tmp_path):
    """Without its average a resumed run would differ."""
    _, task, gradients = go("ga", "gru", steps=2, retain="nll")
    assert task.memory["retain"]
    first, second = gradients
    _, _, forgetful = go("ga", "gru", steps=2, retain="nll", gradient_params={"ema": 1.0})
    assert close(first, forgetful[0])
    assert not close(second, forgetful[1], 1e-6)


def test_weights_no_term_reaches_have_no_gradient_as_without_a_wrapper(make_lm, go):
    lm = make_lm(layers=4)
    _, _, (plain,) = go("rmu", "none", lm=make_lm(layers=4))
    _, _, (wrapped,) = go("rmu", "sam", lm=lm, gradient_params={"rho": 1e-6})
    assert any(value is None for value in plain.values())
    assert [k for k, v in plain.items() if v is None] == [k for k, v in wrapped.items() if v is None]


@pytest.mark.parametrize("name", NAMES)
def test_looking_elsewhere_leaves_the_weights_as_they_were(go, name, monkeypatch):
    """With a learning rate of nothing the run ends where it began, to the bit."""
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_, **__: None)
    a, _, _ = go("npo", "none")
    b, _, _ = go("npo", name)
    assert all(torch.equal(x, y) for x, y in zip(a.lm.parameters(), b.lm.parameters(), strict=True))


def test_a_methods_own_wrapper_is_used_unless_switched_off():
    assert choose_wrapper(MethodConfig(name="npo")) is None
    assert choose_wrapper(MethodConfig(name="npo_sam")) == Wrapper("sam", {"rho": 0.01})
    assert choose_wrapper(MethodConfig(name="npo_sam", gradient_params={"rho": 0.1})) == Wrapper("sam", {"rho": 0.1})
    assert choose_wrapper(MethodConfig(name="npo_sam", gradient="none")) is None
    assert choose_wrapper(MethodConfig(name="npo_sam", gradient="gru")) == Wrapper("gru", check_gradient("gru", {}))
    assert [MethodConfig(name="npo", gradient=g).label for g in (None, "gru")] == ["npo", "npo+gru"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "npo", "gradient": "smm"}, "unknown gradient 'smm' in method.gradient; did you mean 'sam'"),
        ({"name": "npo", "gradient": "sam", "gradient_params": {"roh": 1.0}}, "unknown parameter 'roh'; did you mean"),
        ({"name": "npo", "gradient": "sam", "gradient_params": {"rho": -1.0}}, r"rho must be in \(0, inf\)"),
        ({"name": "npo", "gradient_params": {"rho": 1.0}}, "gradient_params: there is no wrapper"),
        ({"name": "ga", "gradient": "gru"}, "needs both terms, and ga has no retain term; set method.retain=nll"),
        ({"name": "finetune", "gradient": "sam"}, "needs both terms, and finetune has no forget term; choose another"),
        ({"name": "npo_sam", "retain": "none"}, "npo_sam has no retain term"),
        ({"name": "scrub", "gradient": "gru"}, "needs both terms in every update, and scrub takes turns"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(config, message):
    with pytest.raises(UserError, match=message) as caught:
        choose_wrapper(MethodConfig(**config))
    assert "\n" not in str(caught.value)


def zero(stage: int) -> SimpleNamespace:
    """An accelerator under DeepSpeed."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, mixed_precision="no", state=SimpleNamespace(deepspeed_plugin=plugin)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_divided_gradients_are_refused(stage):
    said = f"method.gradient=sam needs whole gradients, and ZeRO-{stage} divides them.*set method.gradient=none"
    with pytest.raises(UserError, match=said):
        check_engine(Wrapper("sam", {}), zero(stage))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=salun"], "method.mask=saliency needs whole gradients, and ZeRO-3.*set method.mask=none"),
        (["method.name=npo", "method.mask=saliency"], "method.mask=saliency needs whole gradients"),
        (["method.name=ssd"], "method 'ssd' needs whole gradients, and ZeRO-3.*choose a method with a loss"),
        (["method.name=rmu"], "ZeRO-3 lets the layers above it decay.*set optim.weight_decay=0"),
    ],
)
def test_what_cannot_be_had_under_zero_is_refused(overrides, said):
    config = load_config(UnlearnConfig, None, ["model=m", *overrides])
    with pytest.raises(UserError, match=said) as caught:
        check_divided(config, zero(3))
    assert "\n" not in str(caught.value)
    check_divided(config, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=salun"], "method.mask=saliency needs whole gradients, and FSDP2.*set method.mask=none"),
        (["method.name=ssd"], "method 'ssd' needs whole gradients, and FSDP2.*choose a method with a loss"),
        (["method.name=rmu"], None),  # layers above have no gradient there, and stay
    ],
)
def test_what_cannot_be_had_under_fsdp2_is_refused(overrides, said, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = load_config(UnlearnConfig, None, ["model=m", *overrides])
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_divided(config, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, mixed_precision="no"))


@pytest.mark.parametrize("overrides", [["method.name=npo"], ["method.name=rmu", "optim.weight_decay=0"]])
def test_what_can_be_had_under_zero_is_not_refused(overrides):
    check_divided(load_config(UnlearnConfig, None, ["model=m", *overrides]), zero(3))


def test_scaled_gradients_are_refused():
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), mixed_precision="fp16")
    with pytest.raises(UserError, match="method.gradient=gru with loop.precision=fp16"):
        check_engine(Wrapper("gru", {}), accelerator)
    accelerator.mixed_precision = "bf16"
    check_engine(Wrapper("gru", {}), accelerator)


@pytest.mark.parametrize("name", ["sam", "orthopenalty"])
def test_dropout_is_the_same_at_every_look_at_one_gradient(go, name):
    """Drawn anew, the difference of two looks is that of two masks: the penalty's direction was a coin's."""
    extra = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, _, (plain,) = go("npo", "none", lora=0.1)
        _, _, (step,) = go("npo", name, lora=0.1)
        extra.append(torch.cat([(step[k] - plain[k]).flatten() for k in step if step[k] is not None]))
        assert extra[-1].norm() > 0
    _, _, (calm,) = go("npo", "none", lora=True)
    _, _, (step,) = go("npo", name, lora=True)
    without = torch.cat([(step[k] - calm[k]).flatten() for k in step if step[k] is not None])
    # another mask changes the correction a little, and does not drown it
    assert all(e.norm() < 1.5 * without.norm() for e in extra)
