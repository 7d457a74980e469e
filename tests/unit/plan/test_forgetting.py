"""Updates of every method: the passes its objective makes, and the memory that the allocator sees them take."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llm_unlearn.config import build_config
from llm_unlearn.data.tokenise import Encoded
from llm_unlearn.errors import UserError
from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.masks import saliency
from llm_unlearn.methods.needs import check_params, needs
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import RETAIN_TERMS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.lora import LoraConfig, add_lora
from llm_unlearn.plan.activations import LOGITS, BatchShape, Pass, step_peak
from llm_unlearn.plan.forgetting import Wanted, forgetting, method_passes
from llm_unlearn.plan.memory import memory
from llm_unlearn.plan.shape import read_shape
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.alternates import Alternates
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.generic import GenericTargets
from llm_unlearn.unlearn.importance import mean_gradient
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective
from llm_unlearn.unlearn.wrapped import WrappedTask, choose_wrapper

WIDTH, ANSWER, VOCAB = 24, 10, 800

LOSSES = [name for name, method in METHODS.items() if method.kind == "loss"]
EDITS = [name for name, method in METHODS.items() if method.kind == "edit"]
FORGET, RETAIN = Wanted("forget", "forget", "logp"), Wanted("retain", "retain", "logp")
PLAIN = [FORGET, RETAIN]
HIDDEN = {"reads": "hidden", "depth": 2}
EMBED = Wanted("retain", "retain", **HIDDEN, reference=True)


def forget(reads: str, *, reference: bool = False) -> Wanted:
    return Wanted("forget", "forget", reads, reference=reference)


def instead(source: str) -> Wanted:
    return Wanted("forget", source, "logp")


PASSES = {
    "finetune": [RETAIN], "ga": [FORGET], "graddiff": PLAIN,
    "kl": [FORGET, Wanted("retain", "retain", "kl", reference=True)],
    "idk": [instead("idk"), RETAIN], "idk_dpo": [FORGET, instead("idk"), RETAIN], "npo": PLAIN, "simnpo": PLAIN,
    "rmu": [Wanted("forget", "forget", **HIDDEN), EMBED],
    "rmu_adaptive": [Wanted("forget", "forget", **HIDDEN, reference=True), EMBED],
    "altpo": [FORGET, instead("alt"), RETAIN], "undial": [forget("undial", reference=True)], "wga": PLAIN,
    "satimp": PLAIN, "me": [forget("me"), RETAIN], "ceu": [forget("ceu")], "flat": [FORGET, instead("idk")],
    "flat_kl": [FORGET, instead("idk")],
    "scrub": [forget("scrub", reference=True), Wanted("retain", "retain", "distil", reference=True)],
    "pdu": [forget("pdu"), RETAIN], "whp": [forget("whp")], "npo_sam": PLAIN, "salun": [instead("rl"), RETAIN],
    "neggrad_plus": PLAIN, "nabla_tau": PLAIN, "l1_sparse": [RETAIN], "random_label": [instead("rl"), RETAIN],
    "bad_teacher": [forget("bad_teacher", reference=True), Wanted("retain", "retain", "kl", reference=True)],
}  # fmt: skip


def test_every_loss_is_here():
    assert PASSES.keys() == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_methods_passes_are_those_of_its_objective(name):
    method = METHODS[name]
    assert method_passes(method, method.retain, 1) == PASSES[name]
    assert {work.source for work in PASSES[name]} == needs(method) & {"forget", "retain", "idk", "alt", "rl"}


@pytest.mark.parametrize("retain", RETAIN_TERMS)
def test_another_retain_term_is_planned_too(retain):
    found = method_passes(METHODS["ga"], retain, 1)
    assert found[0] == FORGET
    assert [work.source for work in found[1:]] == (["retain"] if retain != "none" else [])


def live_peak(run) -> int:
    """Most bytes allocated at once beyond what was there before, while `run()` runs; what stays is there afterwards."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def config(name: str, **changes) -> UnlearnConfig:
    steps = {"batch_size": 8, "max_steps": 10, **changes.pop("loop", {})}
    stop = changes.pop("stop", {})
    if name == "whp":
        changes["params"] = {"reinforce_updates": 3}
    return build_config(UnlearnConfig, {"method": {"name": name, **changes}, "loop": steps, "stop": stop})


def step_of(model, settings, items, number=0, n_micro=1):
    """A function that takes the gradients of a step, as the loop does."""
    objective = make_objective(settings.method, model, items, 0, 8, unseen_logp=-20.0)
    draws = (items, 8, 0, Place(n_micro=n_micro))
    wrapper = choose_wrapper(settings.method)
    task = UnlearnTask(objective, *draws) if wrapper is None else WrappedTask(objective, wrapper, *draws)
    weights = [p for p in model.parameters() if p.requires_grad]
    run: Any = SimpleNamespace(step=number, answer_model=model, accelerator=SimpleNamespace(num_processes=1))

    def step():
        if isinstance(task, WrappedTask):
            task.fill_gradients(run, weights)
        else:
            for micro in task.micro_batches(number):
                task.loss(model, micro)[0].backward()
        model.zero_grad()

    return step


@pytest.fixture(scope="module")
def items() -> Items:
    """Random items with long answers, so that distributions over the vocabulary are much of a step's memory."""
    draw = np.random.default_rng(0)

    def some(n: int) -> list[Encoded]:
        return [Encoded(draw.integers(0, 100, WIDTH + 1), WIDTH + 1 - ANSWER, False) for _ in range(n)]

    others = Alternates(some(16), np.arange(17), [["x"]] * 16)
    return Items(some(16), some(24), some(16), others, others)


def build(*, lora: bool = False, vocab: int = VOCAB) -> AnswerModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **shape))
    return AnswerModel(add_lora(lm, LoraConfig(rank=4)) if lora else lm).train()


def planned(model, settings, items, n_micro=1):
    shape = read_shape(model.lm)
    updates, beside = forgetting(settings, shape, items, 1, n_micro)
    return memory(shape, [update.largest for update in updates], "one", 1, beside, n_micro=n_micro)


@pytest.mark.parametrize("name", LOSSES)
def test_a_steps_memory_is_the_allocators(items, name):
    model, settings = build(), config(name)
    found = planned(model, settings, items)
    seen = max(live_peak(step_of(model, settings, items, step)) for step in (0, 1))
    assert found.activations + found.gradients == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_wrapped_steps_memory_is_the_allocators(items, gradient, lora, n_micro):
    model, settings = build(lora=lora), config("npo", gradient=gradient, loop={"micro_batch": 8 // n_micro})
    found = planned(model, settings, items, n_micro)
    step = step_of(model, settings, items, n_micro=n_micro)
    step()  # from now on there is a moving average
    assert found.activations + found.gradients == pytest.approx(live_peak(step), rel=0.04)


TERMS = [(name, "forget") for name in ("ga", "undial", "me", "ceu", "pdu", "whp", "scrub", "bad_teacher")]


@pytest.mark.parametrize(("name", "term"), [*TERMS, ("kl", "retain"), ("scrub", "retain"), ("graddiff", "retain")])
def test_what_a_term_keeps_of_a_large_vocabulary(items, name, term):
    model, settings = build(vocab=4000), config(name)
    objective = make_objective(settings.method, model, items, 0, 8, unseen_logp=-20.0)
    task = UnlearnTask(objective, items, 8, 0, Place())
    micro = {name: part for step in (0, 1) for name, part in next(iter(task.micro_batches(step))).items()}
    micro = {name: part for name, part in micro.items() if (name == "retain") == (term == "retain")}
    (work,) = [work for work in method_passes(objective.method, objective.retain, 1) if work.term == term]

    def step():
        task.term(model, micro, term).backward()
        model.zero_grad()

    batch = BatchShape(8, WIDTH, 8 * ANSWER, ANSWER)
    found = step_peak(read_shape(model.lm), [Pass(batch, work.reads)], gradients_kept=False)
    assert sum(found) == pytest.approx(live_peak(step), rel=0.02)


def test_every_term_that_reads_distributions_was_measured():
    measured = {"kl", "scrub", "distil", "undial", "me", "ceu", "pdu", "whp", "bad_teacher", "logp", "hidden"}
    assert measured == LOGITS.keys()


@pytest.mark.parametrize("vocab", [100, 4000])
def test_making_targets_takes_what_the_allocator_sees(items, vocab):
    model, settings = build(vocab=vocab), config("whp")
    found = planned(model, settings, items)
    knobs = check_params(METHODS["whp"], settings.method.params)
    seen = live_peak(lambda: GenericTargets(model, items.forget, knobs, 8, 0))
    assert found.ready - found.weights == pytest.approx(seen, rel=0.06)


@pytest.mark.parametrize("n", [1, 16])
def test_making_a_mask_takes_what_the_allocator_sees(items, n):
    """Of one item ranking the gradients needs more, of sixteen their passes."""
    model, settings = build(), config("salun")
    found = planned(model, settings, replace(items, forget=items.forget[:n]))

    def make():
        alone = SimpleNamespace(num_processes=1, process_index=0)
        saliency(mean_gradient(model, items.forget[:n], alone)[0])

    assert found.ready - found.weights == pytest.approx(live_peak(make), rel=0.06)


def test_turns_come_as_often_as_in_the_run(items):
    """16 items in batches of 8: three passes are six updates that forget, of 20."""
    updates, beside = forgetting(config("scrub", loop={"max_steps": 20}), read_shape(build().lm), items, 1, 1)
    assert [(update.share, [work.reads for work in update.largest]) for update in updates] == [
        (0.3, ["scrub"]), (0.7, ["distil"]),
    ]  # fmt: skip
    assert [update.real_tokens for update in updates] == [8 * WIDTH, 8 * WIDTH]
    assert beside.reference


def test_a_wrapper_repeats_passes(items):
    (update,), beside = forgetting(config("npo_sam"), read_shape(build().lm), items, 1, 1)
    assert [work.term for work in update.typical] == ["forget", "forget", "retain"]
    assert (len(update.largest), update.real_tokens, beside.wrapper) == (2, 3 * 8 * WIDTH, "sam")
    (update,), beside = forgetting(config("npo_sam", gradient="none"), read_shape(build().lm), items, 1, 1)
    assert (len(update.typical), beside.wrapper) == (2, None)


def test_the_best_step_is_held_unless_the_last_is_kept(items):
    shape = read_shape(build().lm)
    kept = {
        keep: forgetting(config("ga", stop={"keep": keep}), shape, items, 1, 1)[1].best for keep in ("best", "last")
    }
    assert kept == {"best": True, "last": False}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        *[(name, {}, f"method '{name}' edits the weights once, which is not planned") for name in EDITS],
        ("nop", {}, "unknown method 'nop'"),
        ("npo", {"layer": 3, "retain": "embed"}, "method.layer=3"),
        ("npo", {"params": {"bet": 1}}, "unknown parameter 'bet'"),
        ("ga", {"gradient": "sam"}, "needs both terms"),
        ("scrub", {"retain": "none"}, "needs a retain term"),
        ("salun", {"mask_params": {"share": 2}}, "share must be in"),
    ],
)
def test_what_is_not_planned_is_one_line(items, name, changes, said):
    with pytest.raises(UserError, match=said) as caught:
        forgetting(config(name, **changes), read_shape(build().lm), items, 1, 1)
    assert len(str(caught.value).splitlines()) == 1
