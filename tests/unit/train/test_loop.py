"""The loop: accumulation changes nothing, resuming changes nothing, and what is not finite stops it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from llm_unlearn.data.tokenise import encode
from llm_unlearn.errors import UserError
from llm_unlearn.grok.grokfast import GrokfastEMA
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.train.checkpoint import newest_valid
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.optimizer import make_optimizer
from llm_unlearn.train.resume import resume_root
from llm_unlearn.train.tasks import FitTask, Place, n_micro_batches
from llm_unlearn.unlearn.alternates import Alternates
from llm_unlearn.unlearn.config import MethodConfig, StopConfig
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective
from llm_unlearn.unlearn.stopping import Level, UnlearnWatch

LOSSES = [name for name, method in METHODS.items() if method.kind == "loss"]
OPTIM = OptimConfig(lr=3e-3, warmup=2, schedule="cosine")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@dataclass
class Hook:
    """A callback made of a function."""

    call: object
    seen: list[int] = field(default_factory=list)

    def __call__(self, run):
        self.seen.append(run.step)
        self.call(run)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def kill_at(step=None):
    """A callback that kills at a step; without one it only holds the place that its state has in a checkpoint."""

    def call(run):
        if run.step == step:
            raise Killed

    return Hook(call)


def fit(lm, items, *, steps=6, n_micro=1, batch=8, seed=0, optim=OPTIM, out=None, save_every=1000, **more):
    loop = LoopConfig(max_steps=steps, batch_size=batch, save_every=save_every, log_every=1, threads=1)
    task = FitTask(items, batch, seed, Place(n_micro=n_micro))
    return train(AnswerModel(lm), task, optim, loop, accelerator=make_accelerator(loop, n_micro), out=out, **more)


def weights(run_or_lm) -> dict[str, torch.Tensor]:
    lm = getattr(run_or_lm, "lm", run_or_lm)
    return {name: value.clone() for name, value in lm.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients_of(model, task):
    """The step's whole gradient as the optimizer would see it, the step's loss, and the size of the terms in it."""
    found: list[torch.Tensor] = []

    def look(named):
        found.append(torch.cat([p.grad.flatten().clone() for _, p in named if p.grad is not None]))

    optim, loop = OptimConfig(clip=0.0), LoopConfig(max_steps=1, batch_size=8, threads=1)
    accelerator = make_accelerator(loop, task.n_micro)
    run = train(model, task, optim, loop, accelerator=accelerator, gradient_edits=[look])
    return found[0], run.loss, sum(map(abs, run.logs.values())) or abs(run.loss)


def ragged(items):
    """Items of every length there is."""
    by_length: dict[tuple[int, int], list] = {}
    for item in items:
        by_length.setdefault((len(item.ids), item.n_answer), []).append(item)
    return [item for group in by_length.values() for item in group[:8]]


def test_items_are_ragged(tiny_items):
    assert len({len(item.ids) for item in ragged(tiny_items)}) > 2


@pytest.mark.parametrize("n_micro", [2, 8])
def test_accumulation_gives_the_same_gradient(make_lm, tiny_items, n_micro):
    results = []
    for n in (1, n_micro):
        task = FitTask(ragged(tiny_items), 8, 0, Place(n_micro=n))
        results.append(gradients_of(AnswerModel(make_lm()), task))
    (whole, loss, size), (parts, loss_parts, _) = results
    assert (whole - parts).norm() <= 1e-6 * whole.norm()
    assert abs(loss_parts - loss) <= 1e-6 * max(size, abs(loss))  # a term may weigh more than one


@pytest.mark.parametrize(
    ("method", "retain"),
    [*((name, None) for name in LOSSES), ("npo", "kl"), ("npo", "embed"), ("finetune", "kl"), ("finetune", "embed")],
)
def test_accumulation_gives_the_same_gradient_when_unlearning(make_lm, tiny_items, tiny_tokenizer, method, retain):
    rows = ragged(tiny_items)
    refusal = [("Name Nobody's editor.", "I do not know."), ("Name Nobody's editor's mentor.", "Nobody has told me.")]
    half = len(rows[::2])
    other = Alternates(rows[1::2], np.arange(half + 1), ())
    items = Items(rows[::2], rows[1::2], encode(tiny_tokenizer, (refusal * len(rows))[:half]), other, other)
    config = MethodConfig(name=method, retain=retain)
    results = []
    for n in (1, 8):
        lm = make_lm(1)
        model = AnswerModel(lm)
        objective = make_objective(config, model, items, 0, unseen_logp=-20.0)
        moved = make_lm(2).state_dict()  # away from the reference, where nothing vanishes
        lm.load_state_dict({name: value + 0.3 * moved[name] for name, value in lm.state_dict().items()})
        results.append(gradients_of(model, UnlearnTask(objective, items, 8, 0, Place(n_micro=n))))
    (whole, loss, size), (parts, loss_parts, _) = results
    assert whole.norm() > 0
    assert (whole - parts).norm() <= 1e-6 * whole.norm()
    # a term may weigh more than one; flat's is a difference of two shares that nearly cancel
    assert abs(loss_parts - loss) <= 1e-6 * max(size, abs(loss)) + 1e-9


def test_the_logged_loss_is_the_mean_over_answer_tokens(make_lm, tiny_items):
    from llm_unlearn.train.order import step_items

    lm, items = make_lm(), ragged(tiny_items)
    total = tokens = 0.0
    with torch.no_grad():
        for i in step_items(len(items), 8, 0, 0):
            ids = torch.from_numpy(items[i].ids)[None]
            logp = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            total -= float(logp[items[i].start - 1 :].sum())
            tokens += items[i].n_answer
    assert fit(lm, items, steps=1, n_micro=4).loss == pytest.approx(total / tokens, rel=1e-6)


def test_every_item_comes_once_an_epoch(tiny_items):
    task, seen = FitTask(tiny_items[:24], 8, 3, Place(n_micro=2)), []
    for batch, _ in (micro for step in range(3) for micro in task.micro_batches(step)):
        seen += [tuple(ids[ids != 0].tolist()) for ids in batch.inputs]
    assert sorted(seen) == sorted(tuple(item.ids[:-1].tolist()) for item in tiny_items[:24])


def test_processes_share_a_step(tiny_items):
    whole = next(iter(FitTask(tiny_items, 8, 0, Place()).micro_batches(5)))
    parts = [next(iter(FitTask(tiny_items, 8, 0, Place(rank=r, world=2)).micro_batches(5))) for r in (0, 1)]
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    assert torch.equal(torch.cat([batch.labels_N for batch, _ in parts]), whole[0].labels_N)


def test_the_same_seed_gives_the_same_bits(make_lm, tiny_items):
    a, b, c = (fit(make_lm(), tiny_items, seed=seed) for seed in (0, 0, 1))
    assert equal(weights(a), weights(b))
    assert not equal(weights(a), weights(c))
    assert a.loss == b.loss


def test_training_learns(make_lm, tiny_items):
    run = fit(make_lm(), tiny_items[:8], steps=120, optim=OptimConfig(lr=1e-2, weight_decay=0.0, warmup=5))
    assert run.loss < 0.05
    assert run.step == 120


@pytest.mark.parametrize("killed_at", [1, 4, 6, 11])
@pytest.mark.parametrize("grokfast", [False, True])
def test_a_killed_run_ends_bit_identical(make_lm, tiny_items, tmp_path, killed_at, grokfast):
    def go(out, *callbacks):
        edits = [GrokfastEMA(0.9, 2.0)] if grokfast else []
        return fit(
            make_lm(), tiny_items, steps=12, n_micro=2, out=out, save_every=4, callbacks=callbacks, gradient_edits=edits
        )

    whole = go(tmp_path / "whole", kill_at())
    with pytest.raises(Killed):
        go(tmp_path / "killed", kill_at(killed_at))
    again = go(tmp_path / "killed", kill_at())
    assert again.resumed_from == (killed_at - 1) // 4 * 4
    assert equal(weights(again), weights(whole))
    logs = [(tmp_path / name / "train_log.jsonl").read_text() for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == list(range(1, 13))


def test_three_kills_in_one_run(make_lm, tiny_items, tmp_path):
    whole = fit(make_lm(), tiny_items, steps=12)
    for step in (3, 7, 11):
        with pytest.raises(Killed):
            fit(make_lm(), tiny_items, steps=12, out=tmp_path, save_every=2, callbacks=[kill_at(step)])
    again = fit(make_lm(), tiny_items, steps=12, out=tmp_path, save_every=2, callbacks=[kill_at()])
    assert equal(weights(again), weights(whole))


def test_adapters_resume_bit_identical(make_lm, tiny_items, tmp_path):
    def lm():
        torch.manual_seed(5)
        return add_lora(make_lm(), LoraConfig(rank=2))

    whole = fit(lm(), tiny_items, steps=6)
    with pytest.raises(Killed):
        fit(lm(), tiny_items, steps=6, out=tmp_path, save_every=2, callbacks=[kill_at(5)])
    again = fit(lm(), tiny_items, steps=6, out=tmp_path, save_every=2, callbacks=[kill_at()])
    assert equal(weights(again), weights(whole))


def test_dropout_resumes_bit_identical(tiny_items, tmp_path, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    def lm():
        torch.manual_seed(0)
        shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), bos_token_id=1, eos_token_id=1, **shape))

    whole = fit(lm(), tiny_items, steps=6, out=tmp_path / "a", save_every=2)
    with pytest.raises(Killed):
        fit(lm(), tiny_items, steps=6, out=tmp_path / "b", save_every=2, callbacks=[kill_at(5)])
    again = fit(lm(), tiny_items, steps=6, out=tmp_path / "b", save_every=2, callbacks=[kill_at()])
    assert equal(weights(again), weights(whole))


@pytest.mark.parametrize("killed_at", [3, 6, 9])
def test_a_killed_unlearning_run_keeps_the_same_best_weights(make_lm, tiny_items, tmp_path, killed_at):
    items = Items(tiny_items[:16], tiny_items[16:48])

    def go(out, *callbacks):
        model = AnswerModel(make_lm())
        objective = make_objective(MethodConfig(name="npo"), model, items, 0)
        loop = LoopConfig(max_steps=10, batch_size=8, save_every=2, log_every=1, threads=1)
        stop, level = StopConfig(every=2, until="max_steps", floor=None, collapse=None), Level(0.001, "given")
        watch = UnlearnWatch(stop, {"forget": items.forget, "retain": items.retain}, level, out)
        run = train(
            model, UnlearnTask(objective, items, 8, 0, Place()), OptimConfig(lr=1e-2, warmup=0), loop,
            accelerator=make_accelerator(loop, 1), out=out, callbacks=[*callbacks, watch],
        )  # fmt: skip
        return watch.keep_best(run), weights(run), (out / "trajectory.jsonl").read_bytes()

    kept, whole, trajectory = go(tmp_path / "whole", kill_at())
    with pytest.raises(Killed):
        go(tmp_path / "killed", kill_at(killed_at))
    kept_again, again, trajectory_again = go(tmp_path / "killed", kill_at())
    assert kept_again == kept
    assert equal(again, whole)
    assert trajectory_again == trajectory


def test_a_stopped_run_that_was_killed_before_its_end_does_not_go_on(make_lm, tiny_items, tmp_path):
    def stop(run):
        if run.step == 5:
            run.stop_reason = "enough"

    first = fit(make_lm(), tiny_items, steps=12, out=tmp_path, callbacks=[Hook(stop)])
    hook = Hook(lambda run: None)
    again = fit(make_lm(), tiny_items, steps=12, out=tmp_path, callbacks=[hook])
    assert (again.step, again.stop_reason, hook.seen) == (5, "enough", [])
    assert equal(weights(again), weights(first))


def test_callbacks_see_every_step_and_the_beginning(make_lm, tiny_items, tmp_path):
    hook = Hook(lambda run: None)
    fit(make_lm(), tiny_items, steps=3, callbacks=[hook])
    assert hook.seen == [0, 1, 2, 3]


def test_a_state_of_another_run_is_refused(make_lm, tiny_items, tmp_path):
    fit(make_lm(), tiny_items, steps=2, out=tmp_path, identity="a")
    with pytest.raises(UserError, match="belongs to a run with another config, data or code version"):
        fit(make_lm(), tiny_items, steps=4, out=tmp_path, identity="b")


def poison(lm, step):
    def call(run):
        if run.step == step:
            with torch.no_grad():
                next(lm.parameters()).fill_(math.nan)

    return Hook(call)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(make_lm, tiny_items, tmp_path):
    lm = make_lm()
    with pytest.raises(UserError, match="step 5: the loss is nan") as caught:
        fit(lm, tiny_items, out=tmp_path, save_every=2, callbacks=[poison(lm, 4)])
    assert "\n" not in str(caught.value)
    assert newest_valid(resume_root(tmp_path)).name == "step-00000004"


def test_it_ends_a_run_that_has_a_result_with_the_weights_before_that_step(make_lm, tiny_items, tmp_path):
    def edit(named):
        named[0][1].grad[0, 0] = math.inf if calls.append(0) or len(calls) == 4 else 0.0

    calls: list[int] = []
    run = fit(make_lm(), tiny_items, out=tmp_path, gradient_edits=[edit], has_result=lambda: True)
    assert (run.step, run.stop_reason) == (3, "diverged")
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert [json.loads(line)["step"] for line in (tmp_path / "train_log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_hit(make_lm, tiny_items, tmp_path, clip):
    def edit(named, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 3:
            named[0][1].grad[0, 0] = math.inf

    lm = make_lm()
    optim = OPTIM.model_copy(update={"clip": clip})
    with pytest.raises(UserError, match=r"step 3: the loss is \d.* and the gradient norm inf"):
        fit(lm, tiny_items, out=tmp_path, save_every=1, gradient_edits=[edit], optim=optim)
    assert newest_valid(resume_root(tmp_path)).name == "step-00000002"
    assert all(torch.isfinite(p).all() for p in lm.parameters())


def test_clipping_bounds_the_step(make_lm, tiny_items):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(float(sum(p.grad.pow(2).sum() for g in self.param_groups for p in g["params"]) ** 0.5))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        fit(make_lm(), tiny_items, steps=2, optim=OptimConfig(clip=0.01))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_weights_decay_in_matrices_only(tiny_lm):
    optimizer = make_optimizer(tiny_lm, OptimConfig(weight_decay=0.7))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(tiny_lm.parameters()))
    for name, parameter in tiny_lm.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.7), name


def test_frozen_weights_are_no_business_of_the_optimizer(make_lm):
    lm = add_lora(make_lm(), LoraConfig(rank=2))
    optimizer = make_optimizer(lm, OptimConfig())
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in lm.parameters() if p.requires_grad}
    assert all(g["params"] for g in optimizer.param_groups)


def test_an_empty_training_set_is_refused():
    with pytest.raises(UserError, match="training set is empty"):
        FitTask([], 8, 0, Place())


@pytest.mark.parametrize(("batch", "micro", "world", "n"), [(8, None, 1, 1), (8, 2, 1, 4), (8, 2, 2, 2), (8, 16, 2, 1)])
def test_number_of_micro_batches(batch, micro, world, n):
    assert n_micro_batches(batch, micro, world) == n


@pytest.mark.parametrize(("batch", "micro", "world"), [(8, None, 3), (8, 3, 1), (12, 4, 2)])
def test_batches_that_do_not_divide_are_refused(batch, micro, world):
    with pytest.raises(UserError, match="does not divide"):
        n_micro_batches(batch, micro, world)


def test_a_launcher_whose_processes_did_not_join_is_refused(monkeypatch):
    loop = LoopConfig(threads=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes but Accelerate joined 1"):
        make_accelerator(loop, 1)


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    import subprocess
    import sys
    import time

    from llm_unlearn.train.lock import locked

    code = (
        "import pathlib, time\nfrom llm_unlearn.train.lock import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid}"), locked(tmp_path):
            pass
        other.kill()
        other.wait()
        time.sleep(0.1)
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text()
