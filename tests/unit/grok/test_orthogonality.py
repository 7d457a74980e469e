"""The penalty on aligned gradients: its gradient against differences, its halves, what it does to a model, resuming."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llm_unlearn.config import build_config
from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import ImageRow, Picture
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import cross_entropy, margin_loss, mean_gradients
from llm_unlearn.files import read_jsonl
from llm_unlearn.grok import orthogonality
from llm_unlearn.grok.config import DistilConfig, GrokConfig, OrthogonalityConfig, SamConfig, SplineConfig
from llm_unlearn.grok.orthogonality import Intervention, OrthogonalTask, unit_of
from llm_unlearn.grok.run import train_grok
from llm_unlearn.grok.tasks import make_task
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.tasks import Place

OPTIM = OptimConfig(lr=1e-3, warmup=0, clip=1.0)


class Smooth(nn.Module):
    """A classifier of 1 x 3 x 4 images in double precision, so that differences of its gradients are exact enough."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 3)).double()

    def forward(self, inputs, index_N, layer=None):
        return self.lm(inputs.double())[index_N]


def pictures(n):
    draw = np.random.default_rng(0)
    return [Picture(draw.normal(size=(1, 3, 4)).astype(np.float32), int(draw.integers(3))) for _ in range(n)]


def go(model, items, units, *, weight=1.0, of="loss", after="start", n_micro=1, steps=1, batch=8, on=None, **more):
    """Train; returns the Run, its task and every step's gradient and log."""
    loop = LoopConfig(max_steps=steps, batch_size=batch, log_every=1, threads=1, save_every=more.pop("save_every", 99))
    config = GrokConfig(loop=loop, orthogonality=OrthogonalityConfig(weight=weight, of=of, after=after))
    task = make_task(items, config, Place(n_micro=n_micro), 0, model, units=units)
    assert isinstance(task, OrthogonalTask)
    task.on = task.on if on is None else on
    seen, logs = [], []
    run = train(
        model, task, more.pop("optim", OPTIM), loop, accelerator=make_accelerator(loop, n_micro),
        gradient_edits=[lambda named: seen.append({name: p.grad.clone() for name, p in named})],
        callbacks=[Notes(logs)], **more,
    )  # fmt: skip
    return run, task, seen, logs


class Notes:
    def __init__(self, logs):
        self.logs = logs

    def __call__(self, run):
        self.logs.append({"step": run.step, "loss": run.loss, **run.logs})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def margins(logits_NV, labels_N):
    """The mean of the answer's logit above the mean of the others."""
    rows = zip(logits_NV, labels_N, strict=True)
    return torch.stack([z[y] - torch.cat((z[:y], z[y + 1 :])).mean() for z, y in rows]).mean()


def penalised(model, items, first, weight, of="loss"):
    """The penalised loss, from its definition."""
    parts, grads = [], []
    for side in (True, False):
        batch = collate([item for item, mine in zip(items, first, strict=True) if mine == side])
        logits_NV = model(batch.inputs, batch.index_N)
        loss = nn.functional.cross_entropy(logits_NV, batch.labels_N)
        parts.append((loss * batch.n_rows / len(items)).detach())
        asked = loss if of == "loss" else margins(logits_NV, batch.labels_N)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(asked, list(model.parameters()))]))
    cos = float(nn.functional.cosine_similarity(grads[0], grads[1], dim=0))
    return float(sum(parts)) + weight * cos**2, cos


@pytest.mark.parametrize("weight", [0.7, -2.0])
@pytest.mark.parametrize("n_micro", [1, 4])
@pytest.mark.parametrize("of", ["loss", "margin"])
def test_the_gradient_is_that_of_the_penalised_loss(weight, n_micro, of):
    items, model = pictures(8), Smooth()
    units = [f"c{i // 2}" for i in range(8)]
    run, task, (ours,), logs = go(copy.deepcopy(model), items, units, weight=weight, of=of, n_micro=n_micro)
    first = task.first_half(0)
    assert 0 < first.sum() < 8
    assert logs[-1]["cosine"] == pytest.approx(penalised(model, items, first, weight, of)[1], rel=1e-5)
    assert run.loss == pytest.approx(penalised(model, items, first, 0.0)[0], rel=1e-6), "the answers' loss alone"
    eps = 1e-4
    for name, p in model.named_parameters():
        for at in range(0, p.numel(), 7):
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    dict(moved.named_parameters())[name].view(-1)[at] += sign * eps
                values.append(penalised(moved, items, first, weight, of)[0])
            assert ours[name].view(-1)[at].item() == pytest.approx((values[0] - values[1]) / (2 * eps), abs=1e-6), name


def test_until_it_is_on_steps_are_the_plain_ones_to_the_bit(make_lm, tiny_items, tiny_world):
    units = [unit_of(row) for row in tiny_world.split("train")]
    _, _, off, logs = go(AnswerModel(make_lm()), tiny_items, units, after="fit", steps=3)
    loop = LoopConfig(max_steps=3, batch_size=8, threads=1)
    plain, model = [], AnswerModel(make_lm())
    task = make_task(tiny_items, GrokConfig(loop=loop), Place(), 0, model)
    edits = [lambda named: plain.append({name: p.grad.clone() for name, p in named})]
    train(model, task, OPTIM, loop, accelerator=make_accelerator(loop, 1), gradient_edits=edits)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(off, plain, strict=True) for name in a)
    assert logs[-1]["cosine"] == 0


@pytest.mark.parametrize("of", ["loss", "margin"])
def test_a_weight_of_zero_steps_as_plain_fitting_and_tells_the_cosine(make_lm, tiny_items, tiny_world, of):
    units = [unit_of(row) for row in tiny_world.split("train")]
    _, task, (sham,), logs = go(AnswerModel(make_lm()), tiny_items, units, weight=0.0, of=of, batch=64)
    _, _, (off,), _ = go(AnswerModel(make_lm()), tiny_items, units, after="fit", batch=64)
    for name in off:
        torch.testing.assert_close(sham[name], off[name], rtol=1e-4, atol=1e-6)
    assert 0 < logs[-1]["cosine"] <= 1
    assert task.tokens["forward"] > 0


def test_halves_are_whole_authors_and_differ_from_step_to_step(tiny_world, tiny_items):
    rows = tiny_world.split("train")
    task = OrthogonalTask(OrthogonalityConfig(), [unit_of(r) for r in rows], tiny_items, 8, 5, Place())
    assert unit_of(rows[0]) == rows[0].author
    halves = [task.first_half(step) for step in range(20)]
    for half in halves:
        sides = {}
        for row, first in zip(rows, half, strict=True):
            assert sides.setdefault(unit_of(row), first) == first
        assert abs(sum(sides.values()) - len(sides) / 2) <= 0.5
    assert len({half.tobytes() for half in halves}) == 20
    assert np.array_equal(halves[3], task.first_half(3))
    assert unit_of(ImageRow("train/1", "seven", author="train/1")) == "seven"
    assert unit_of(QARow("q", "a")) == "q"


def test_one_author_alone_is_a_plain_step():
    items, model = pictures(4), Smooth()
    _, _, (ours,), logs = go(copy.deepcopy(model), items, ["same"] * 4, batch=4)
    batch = collate(items)
    loss = nn.functional.cross_entropy(model(batch.inputs, batch.index_N), batch.labels_N)
    for (name, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours[name], g)
    assert logs[-1]["cosine"] == 0


# ---------------------------------------------------------------------------------------------- what it does
def spread_of_cosines(model, items, units, loss=cross_entropy):
    """Root mean square cosine of the gradients of halves of the authors, over all items; the share of right tokens."""
    task, cosines = OrthogonalTask(OrthogonalityConfig(), units, items, 8, 99, Place()), []
    for step in range(6):
        first = task.first_half(step)
        halves = [[item for item, mine in zip(items, first, strict=True) if mine == side] for side in (True, False)]
        a, b = (torch.cat([g.flatten() for g in mean_gradients(model, half, [loss])[0]]) for half in halves)
        cosines.append(float(nn.functional.cosine_similarity(a, b, dim=0)))
    batch = collate(items)
    with torch.no_grad():
        hits = model(batch.inputs, batch.index_N).argmax(-1) == batch.labels_N
    return float(np.sqrt(np.mean(np.square(cosines)))), float(hits.float().mean())


@pytest.mark.parametrize(
    ("of", "loss", "reverse", "less", "more"),
    [("loss", cross_entropy, -0.3, 0.7, 1.5), ("margin", margin_loss, -0.1, 0.5, 1.02)],
)
def test_the_cosine_answers_to_the_dose_and_the_answers_stay(
    make_lm, tiny_items, tiny_world, of, loss, reverse, less, more
):
    """From one fitted model, the same steps with the penalty, without, and with its reverse."""
    units = [unit_of(row) for row in tiny_world.split("train")]
    start = AnswerModel(make_lm())
    fast = OptimConfig(lr=1e-2, warmup=10, weight_decay=0.1)
    go(start, tiny_items, units, on=False, steps=120, batch=64, optim=fast)
    fitted = spread_of_cosines(start, tiny_items, units)[1]
    assert fitted > 0.9
    after = {}
    for weight in (1.0, 0.0, reverse):
        model = copy.deepcopy(start)
        slow = OptimConfig(lr=1e-3, warmup=0, weight_decay=0.1)
        go(model, tiny_items, units, weight=weight, of=of, steps=40, batch=128, optim=slow)
        after[weight] = spread_of_cosines(model, tiny_items, units, loss)
    assert after[1.0][0] < less * after[0.0][0], after
    assert after[reverse][0] > more * after[0.0][0], after
    assert min(right for _, right in after.values()) >= fitted, after


def test_every_pass_is_counted(tiny_items, make_lm):
    units = ["a", "b"] * (len(tiny_items) // 2) + ["a"] * (len(tiny_items) % 2)
    counted = {}
    for of, weight in (("loss", 0.0), ("loss", 1.0), ("margin", 0.0), ("margin", 1.0)):
        _, task, _, _ = go(AnswerModel(make_lm()), tiny_items, units, of=of, weight=weight, batch=16)
        counted[of, weight] = task.tokens["forward"], task.tokens["backward"]
    once = counted["loss", 0.0][0]
    assert counted == {("loss", 0.0): (once, once), ("loss", 1.0): (3 * once, 3 * once),
                       ("margin", 0.0): (once, 2 * once), ("margin", 1.0): (3 * once, 4 * once)}  # fmt: skip


# ---------------------------------------------------------------------------------------------- in a run
def settings(out, **changes):
    return build_config(
        GrokConfig,
        {
            "out": str(out), "data": {"kind": "world", "preset": "world12"}, "scenario": {"size": 2},
            "model": {"size": "nano"}, "loop": {"threads": 1, "batch_size": 32, "max_steps": 400, "save_every": 50},
            "optim": {"lr": 3e-3, "weight_decay": 0.1}, "watch": {"until": "max_steps", "items": 60}, **changes,
        },
    )  # fmt: skip


def test_a_run_begins_at_its_kind_and_ends_after_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(orthogonality, "kinds", lambda _report: {"fit": 25} if seen() else {})
    calls = iter([False, True])
    seen = calls.__next__
    act = {"weight": 0.3, "after": "fit", "steps": 7}
    result = train_grok(settings(tmp_path / "acted", orthogonality=act))
    evaluated = [line["step"] for line in read_jsonl(tmp_path / "acted" / "curve.jsonl")]
    assert result["orthogonality_from"] == evaluated[1]
    assert result["step"] == evaluated[1] + 7
    assert result["stop"] == "7 steps of orthogonality"
    assert (tmp_path / "acted" / "last").exists()


def test_a_run_that_never_gets_there_leaves_no_checkpoint_of_it(tmp_path):
    short = {"threads": 1, "batch_size": 32, "max_steps": 30}
    result = train_grok(settings(tmp_path / "r", loop=short, orthogonality={"after": "grok"}))
    assert result["orthogonality_from"] is None
    assert not (tmp_path / "r" / "last").exists()


def test_a_killed_run_knows_that_it_had_begun(tmp_path, monkeypatch):
    act = {"weight": 0.3, "after": "start", "steps": 12}
    loop = {"threads": 1, "batch_size": 32, "max_steps": 40, "save_every": 5}
    train_grok(settings(tmp_path / "whole", orthogonality=act, loop=loop))
    step = OrthogonalTask.fill_gradients

    def fail(self, run, weights):
        if run.step == 8:
            raise KeyboardInterrupt
        return step(self, run, weights)

    monkeypatch.setattr(OrthogonalTask, "fill_gradients", fail)
    with pytest.raises(KeyboardInterrupt):
        train_grok(settings(tmp_path / "killed", orthogonality=act, loop=loop))
    monkeypatch.setattr(OrthogonalTask, "fill_gradients", step)
    result = train_grok(settings(tmp_path / "killed", orthogonality=act, loop=loop))
    assert result["step"] == 12
    assert len({(tmp_path / r / "last" / "model.safetensors").read_bytes() for r in ("whole", "killed")}) == 1


def test_what_had_begun_is_restored(monkeypatch):
    task = OrthogonalTask(OrthogonalityConfig(after="fit", steps=5), ["a", "b"], pictures(2), 2, 0, Place())
    watch = SimpleNamespace(curve=[SimpleNamespace(step=10)], report=None)
    act = Intervention(task, watch)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(orthogonality, "kinds", lambda _report: {"fit": 4})
    for now, begun in ((9, None), (10, 10)):
        run = SimpleNamespace(step=now, stop_reason=None)
        act(run)  # pyright: ignore[reportArgumentType]
        assert act.begun == begun
    other = OrthogonalTask(OrthogonalityConfig(after="fit", steps=5), ["a", "b"], pictures(2), 2, 0, Place())
    again = Intervention(other, watch)  # pyright: ignore[reportArgumentType]
    assert not other.on
    again.load_state_dict(act.state_dict())
    assert other.on
    run = SimpleNamespace(step=15, stop_reason=None)
    again(run)  # pyright: ignore[reportArgumentType]
    assert run.stop_reason == "5 steps of orthogonality"


def test_it_is_refused_beside_what_makes_the_gradient_itself():
    beside = {"sam": SamConfig(), "spline": SplineConfig(), "distil": DistilConfig(teacher="runs/other@grok")}
    for name, other in beside.items():
        config = GrokConfig(orthogonality=OrthogonalityConfig(), **{name: other})
        with pytest.raises(UserError, match=f"orthogonality.*{name}|{name}.*orthogonality") as caught:
            make_task(pictures(4), config, Place(), 0, Smooth(), units=["a"] * 4)
        assert "\n" not in str(caught.value)
