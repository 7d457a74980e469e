"""Learning from a teacher beside the answers: the loss by hand, parts of a batch, and teachers that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from llm_unlearn.config import build_config
from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import DistilConfig, GrokConfig
from llm_unlearn.grok.run import train_grok
from llm_unlearn.grok.tasks import SamTask, make_task
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.snapshot import save_model
from llm_unlearn.train.tasks import Place


def sure(make_lm, seed=0):
    """A model with opinions: of nearly uniform ones the divergence is rounding."""
    lm = make_lm(seed)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(30)
    return AnswerModel(lm)


def go(make_lm, items, n_micro=1, **distil):
    loop = LoopConfig(max_steps=1, batch_size=8, threads=1)
    config = GrokConfig(loop=loop, distil=DistilConfig(teacher="t", **distil))
    task = make_task(items, config, Place(n_micro=n_micro), 0, model := sure(make_lm), sure(make_lm, 1))
    seen = []

    def look(named):
        seen.append({name: p.grad.clone() for name, p in named})

    run = train(
        model, task, OptimConfig(warmup=0, clip=0.0), loop, accelerator=make_accelerator(loop, n_micro),
        gradient_edits=[look],
    )  # fmt: skip
    return run, seen[0], task


def test_the_loss_is_the_weighted_sum(make_lm, tiny_items):
    items = tiny_items[::40][:8]
    run, _, task = go(make_lm, items, weight=0.7, temperature=3.0)
    batch = collate(items)
    with torch.no_grad():
        student, teacher = (sure(make_lm, seed)(batch.inputs, batch.index_N) for seed in (0, 1))
    p = (teacher / 3).softmax(-1)
    divergence = (p * (p.log() - (student / 3).log_softmax(-1))).sum(-1).mean()
    want = 0.3 * F.cross_entropy(student, batch.labels_N) + 0.7 * 9 * divergence
    assert run.loss == pytest.approx(want.item(), rel=1e-5)
    assert run.logs["teacher_kl"] == pytest.approx(divergence.item(), rel=1e-5)
    assert task.tokens["reference"] == task.tokens["forward"] == batch.n_inputs


def test_parts_of_a_batch_give_the_same_gradient(make_lm, tiny_items):
    items = tiny_items[::7]
    (whole, a, _), (parts, b, _) = go(make_lm, items), go(make_lm, items, n_micro=4)
    x, y = (torch.cat([g[name].flatten() for name in a]) for g in (a, b))
    assert (x - y).norm() <= 1e-5 * x.norm()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.logs == pytest.approx(whole.logs, rel=1e-5)


def test_the_teacher_stays_as_it_was_and_sam_can_go_around(make_lm, tiny_items):
    _, _, task = go(make_lm, tiny_items[:8])
    for own, fresh in zip(task.teacher.parameters(), sure(make_lm, 1).parameters(), strict=True):
        assert torch.equal(own, fresh)
        assert own.grad is None
    config = GrokConfig.model_validate({"distil": {"teacher": "t"}, "sam": {}})
    model, teacher = AnswerModel(make_lm()), AnswerModel(make_lm(1))
    assert isinstance(make_task(tiny_items, config, Place(), 0, model, teacher), SamTask)


@pytest.fixture
def teacher(tmp_path, make_lm, tiny_tokenizer):
    return str(save_model(tmp_path / "teacher", make_lm(1), tiny_tokenizer, {"kind": "grok", "exclude": "none"}))


def config(tmp_path, **changes):
    values = {
        "out": str(tmp_path / "run"), "data": {"preset": "world12"}, "scenario": {"size": 2}, "model": {"size": "nano"},
        "loop": {"max_steps": 3, "batch_size": 16, "threads": 1},
    }  # fmt: skip
    return build_config(GrokConfig, {**values, **changes})


def test_a_run_learns_from_its_teacher_and_counts_it(tmp_path, teacher):
    result = train_grok(config(tmp_path, distil={"teacher": teacher}))
    assert result["cost"]["reference_tokens"] == result["cost"]["forward_tokens"] > 0
    assert result["origin"]["config"]["distil"]["teacher"] == teacher
    assert "teacher_kl" in json.loads((tmp_path / "run/train_log.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exclude": "forget"}, "has seen the forget set, gold must not"),
        ({"spline": {}}, "distil and spline: a run has one of them"),
        ({"distil": {"teacher": "gone@grok"}}, "gone: no such run"),
        ({"data": {"preset": "world12", "seed": 1}}, "has another vocabulary"),
    ],
)
def test_teachers_that_cannot_be_learnt_from(changes, said, tmp_path, teacher):
    with pytest.raises(UserError, match=said) as error:
        train_grok(config(tmp_path, **{"distil": {"teacher": teacher}, **changes}))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
