"""What a grokking run fits: SAM's gradient, the penalty's place, parts of a batch, other losses, and resuming."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import Picture
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import GrokConfig, SamConfig, SplineConfig
from llm_unlearn.grok.tasks import SamTask, activations, at_answers, make_task, preactivations
from llm_unlearn.methods.complexity import complexity_penalty
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.tasks import Place
from llm_unlearn.train.whole import check_whole_gradients, shifted

OPTIM = OptimConfig(lr=1e-2, warmup=0, clip=0.0)


class Killed(BaseException):
    pass


class ImageNet(nn.Module):
    """A classifier of 1 x 6 x 6 images in the wrapper the loop expects."""

    def __init__(self, norm: bool = False, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4) if norm else nn.Identity(), act or nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, inputs_BCHW, index_N, layer=None):
        return self.lm(inputs_BCHW)[index_N]


def pictures(n=24):
    draw = np.random.default_rng(0)
    return [Picture(draw.standard_normal((1, 6, 6), dtype=np.float32), int(i % 3)) for i in range(n)]


def go(model, items, *, n_micro=1, steps=1, out=None, kill_at=None, save_every=1000, **changes):
    """Train; returns the Run and every step's gradient."""
    loop = LoopConfig(max_steps=steps, batch_size=8, log_every=1, save_every=save_every, threads=1)
    task = make_task(items, GrokConfig(loop=loop, **changes), Place(n_micro=n_micro), 0, model)
    seen = []

    def look(named):
        if kill_at is not None and len(seen) == kill_at:
            raise Killed
        seen.append({name: p.grad.clone() for name, p in named})

    run = train(
        model, task, OPTIM, loop, accelerator=make_accelerator(loop, n_micro), out=out, gradient_edits=[look]
    )  # fmt: skip
    return run, seen


def gradient(model, items, loss):
    """The gradient of a function of the logits over the first step's whole batch, without the loop."""
    batch = collate(items)
    grads = torch.autograd.grad(loss(model(batch.inputs, batch.index_N), batch.labels_N), list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))


def close(a, b, tolerance=1e-5):
    x, y = (torch.cat([g[name].flatten() for name in a]) for g in (a, b))
    assert a.keys() == b.keys()
    assert x.norm() > 0
    return (x - y).norm() <= tolerance * x.norm()


def test_sam_is_the_gradient_at_the_worst_point_of_the_ball():
    items, rho = pictures(8), 0.3  # one batch is all there is: its order is of no consequence
    model = ImageNet()
    here = gradient(model, items, nn.functional.cross_entropy)
    length = torch.cat([g.flatten() for g in here.values()]).norm()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(rho * here[name] / length)
    there = gradient(model, items, nn.functional.cross_entropy)
    run, (ours,) = go(ImageNet(), items, sam=SamConfig(rho=rho))
    assert close(there, ours)
    assert not close(here, ours, 1e-2)
    assert run.logs["nearby_loss"] > run.loss


def test_sam_of_next_to_no_radius_is_the_plain_step(make_lm, tiny_items):
    plain, (a,) = go(AnswerModel(make_lm()), tiny_items)
    run, (b,) = go(AnswerModel(make_lm()), tiny_items, sam=SamConfig(rho=1e-7))
    assert close(a, b, 1e-4)
    assert run.loss == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"sam": SamConfig()}, {"spline": SplineConfig()}, {"loss": "mse"}, {"sam": SamConfig(), "spline": SplineConfig()}],
    ids=["sam", "spline", "mse", "both"],
)
@pytest.mark.parametrize("kind", ["text", "images"])
def test_parts_of_a_batch_give_the_same_gradient(make_lm, tiny_items, changes, kind):
    def make():
        return ImageNet() if kind == "images" else AnswerModel(make_lm())

    items = pictures() if kind == "images" else [tiny_items[i] for i in range(0, len(tiny_items), 7)]
    (whole, (a,)), (parts, (b,)) = go(make(), items, **changes), go(make(), items, n_micro=4, **changes)
    assert close(a, b)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.logs == pytest.approx(whole.logs, rel=1e-5)


def test_the_penalty_is_added_with_its_weight():
    items, model = pictures(8), ImageNet()
    with preactivations(model) as seen:
        batch = collate(items)
        fit = nn.functional.cross_entropy(model(batch.inputs, batch.index_N), batch.labels_N)
    penalty = complexity_penalty(seen, 0.5)
    run, _ = go(ImageNet(), items, spline=SplineConfig(weight=3.0, margin=0.5))
    assert run.logs["complexity"] == pytest.approx(penalty.item(), rel=1e-5)
    assert run.loss == pytest.approx((fit + 3 * penalty).item(), rel=1e-5)


def test_the_penalty_falls_when_it_is_trained_on():
    free, _ = go(ImageNet(), pictures(), steps=80)
    held, _ = go(ImageNet(), pictures(), steps=80, spline=SplineConfig(weight=10.0))
    batch = collate(pictures())
    values = []
    for run in (free, held):
        with preactivations(run.answer_model) as seen, torch.no_grad():
            run.answer_model(batch.inputs, batch.index_N)
        values.append(complexity_penalty(seen, 0.5).item())
    assert values[1] < 0.5 * values[0]


def test_text_is_penalised_where_answers_are_predicted_whatever_ran_elsewhere(make_lm, tiny_items):
    """The fast path runs the last layer at answer positions only; the plain one runs all of it everywhere."""
    values = []
    for attention in ("sdpa", "eager"):
        model = AnswerModel(make_lm(attention=attention))
        batch = collate([tiny_items[i] for i in range(0, len(tiny_items), 20)])
        with preactivations(model) as seen:
            model(batch.inputs, batch.index_N)
        assert len(seen) == len(activations(model)) == 2
        values.append([at_answers(z, batch, batch.index_N) for z in seen])
        assert all(z.shape == (batch.n_tokens, 64) for z in values[-1])
    for fast, plain in zip(*values, strict=True):
        torch.testing.assert_close(fast, plain)


def test_checkpointed_activations_are_penalised_too(make_lm, tiny_items):
    gradients = []
    for again in (False, True):
        model = AnswerModel(make_lm())
        loop = LoopConfig(max_steps=1, batch_size=8, threads=1, gradient_checkpointing=again)
        config = GrokConfig(loop=loop, spline=SplineConfig(weight=5.0))
        task, seen = make_task(tiny_items, config, Place(), 0, model), []
        train(
            model, task, OPTIM, loop, accelerator=make_accelerator(loop, 1),
            gradient_edits=[lambda named, seen=seen: seen.append({n: p.grad.clone() for n, p in named})],
        )  # fmt: skip
        gradients += seen
    assert close(*gradients)


def test_a_model_without_activation_modules_is_refused():
    model = ImageNet(act=nn.Tanh())
    model.lm[5] = nn.Tanh()
    with pytest.raises(UserError, match="spline: the model has no ReLU, GELU or SiLU module"):
        make_task(pictures(), GrokConfig(spline=SplineConfig()), Place(), 0, model)


def test_batch_norm_keeps_the_statistics_of_the_first_look():
    plain, _ = go(ImageNet(norm=True), pictures())
    sharp, _ = go(ImageNet(norm=True), pictures(), sam=SamConfig(rho=5.0))
    assert plain.answer_model.lm[1].running_mean.abs().sum() > 0
    for a, b in zip(plain.answer_model.buffers(), sharp.answer_model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_both_looks_draw_the_same_dropout():
    def dropping():
        model = ImageNet()
        model.lm[5] = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        torch.manual_seed(1)
        return model

    plain, (a,) = go(dropping(), pictures())
    sharp, (b,) = go(dropping(), pictures(), sam=SamConfig(rho=1e-7))
    assert close(a, b, 1e-4)
    assert sharp.loss == plain.loss
    assert sharp.logs["nearby_loss"] == pytest.approx(sharp.loss, rel=1e-4)


def test_weights_come_back_to_the_bit():
    torch.manual_seed(0)
    weights = [torch.randn(50) * 1e-3]
    before = weights[0].clone()
    with shifted(weights, [torch.randn(50) * 1e3]):
        assert not torch.equal(weights[0], before)
    assert torch.equal(weights[0], before)
    with pytest.raises(Killed), shifted(weights, [torch.ones(50)]):
        raise Killed
    assert torch.equal(weights[0], before)


@pytest.mark.parametrize("changes", [{"sam": SamConfig()}, {"spline": SplineConfig()}, {"loss": "mse"}])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, changes):
    def states(run):
        return {name: value.clone() for name, value in run.answer_model.state_dict().items()}

    whole = states(go(ImageNet(norm=True), pictures(), steps=7, **changes)[0])
    with pytest.raises(Killed):
        go(ImageNet(norm=True), pictures(), steps=7, out=tmp_path, save_every=2, kill_at=5, **changes)
    resumed, _ = go(ImageNet(norm=True), pictures(), steps=7, out=tmp_path, save_every=2, **changes)
    assert resumed.resumed_from == 4
    again = states(resumed)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sgd_resumes_to_the_bit(tmp_path):
    loop = LoopConfig(max_steps=6, batch_size=8, threads=1, save_every=2)
    optim = OptimConfig(optimizer="sgd", lr=0.1, weight_decay=5e-4, decay="all", schedule="cosine", warmup=0)

    def fit(out, stop=None):
        calls = count()

        def edit(named):
            if next(calls) == stop:
                raise Killed

        model = ImageNet()
        task = make_task(pictures(), GrokConfig(loop=loop), Place(), 0, model)
        accelerator = make_accelerator(loop, 1)
        run = train(model, task, optim, loop, accelerator=accelerator, out=out, gradient_edits=[edit])
        return run, [p.detach().clone() for p in run.answer_model.parameters()]

    _, whole = fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", 5)
    run, again = fit(tmp_path / "killed")
    assert run.resumed_from == 4
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_sam_counts_both_looks(make_lm, tiny_items):
    loop = LoopConfig(max_steps=1, batch_size=8, threads=1)
    counts = []
    for sam in (None, SamConfig()):
        model = AnswerModel(make_lm())
        task = make_task(tiny_items, GrokConfig(loop=loop, sam=sam), Place(), 0, model)
        train(model, task, OPTIM, loop, accelerator=make_accelerator(loop, 1))
        counts.append(dict(task.tokens))
    assert {name: 2 * n for name, n in counts[0].items()} == counts[1]
    assert isinstance(task, SamTask)


@pytest.fixture
def other_precision():
    """Accelerate holds one precision per process: forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_sam_runs_in_the_precision_asked_for(other_precision):
    model, loop = ImageNet(), LoopConfig(max_steps=1, batch_size=8, threads=1, precision="bf16")
    task = make_task(pictures(8), GrokConfig(loop=loop, sam=SamConfig()), Place(), 0, model)
    run = train(model, task, OPTIM, loop, accelerator=make_accelerator(loop, 1))
    AcceleratorState._reset_state(True)
    plain, _ = go(ImageNet(), pictures(8), sam=SamConfig())
    assert run.loss == pytest.approx(plain.loss, rel=2e-2)
    assert run.loss != plain.loss


@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [
        ("FSDP2", "no", "sam needs whole gradients, and FSDP2 divides them"),
        ("DEEPSPEED", "no", "sam needs whole gradients, and ZeRO-2 divides them"),
        ("NO", "fp16", "sam with loop.precision=fp16"),
    ],
)
def test_engines_without_whole_gradients_are_refused(engine, precision, said, monkeypatch):
    if engine == "FSDP2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        engine = "MULTI_GPU"
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=engine), mixed_precision=precision,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )  # fmt: skip
    with pytest.raises(UserError, match=said) as caught:
        check_whole_gradients("sam", "set sam=null", accelerator)
    assert "\n" not in str(caught.value)
