"""No update makes passes that its method does not declare, and every one that it makes is counted."""

from __future__ import annotations

from collections import Counter

import pytest

from llm_unlearn.eval.scoring import padded_tokens, score_answers
from llm_unlearn.methods.needs import needs
from llm_unlearn.methods.spec import VOCABULARY, input_names
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import RETAIN_TERMS
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import make_accelerator, train
from llm_unlearn.train.tasks import FitTask, Place
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.objective import UnlearnTask, make_objective

LOOP = LoopConfig(max_steps=1, batch_size=8, threads=1)
SLACK = 1.15
LOSSES = [name for name, method in METHODS.items() if method.kind == "loss"]


def meter(lm, seen: Counter, forward: str, backward: str) -> None:
    """Count every token whose embedding is read, and every one whose embedding gets a gradient."""

    def count(_module, inputs, output):
        seen[forward] += inputs[0].numel()
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update({backward: gradient.shape[:-1].numel()}))

    lm.get_input_embeddings().register_forward_hook(count)


def declared(name: str, retain: str, tokens: dict[str, int]) -> Counter:
    """Tokens of the passes that the signatures of both terms ask for: one of the model over each batch, with its
    backward pass, and one of the start model, and of an untrained one, over the batch of a term that compares logits or
    hidden states with theirs.
    """
    trained = sum(tokens[batch] for batch in needs(METHODS[name], retain) & tokens.keys())
    asked = Counter(forward=trained, backward=trained)
    for term, batch in ((METHODS[name].forget, "forget"), (RETAIN_TERMS[retain].fn, "retain")):
        if batch not in tokens:  # not its turn
            continue
        inputs = () if term is None else input_names(term)
        wanted = frozenset().union(*(VOCABULARY[i] for i in inputs))
        for frozen in ({"ref_logits", "ref_hidden"}, {"bad_logits"}):
            asked["reference"] += tokens[batch] if frozen & wanted else 0
    return asked


@pytest.mark.parametrize(
    ("name", "retain"),
    [
        (m, r)
        for m in LOSSES
        for r in RETAIN_TERMS
        if (METHODS[m].forget and not METHODS[m].needs_retain) or r != "none"
    ],
)
def test_an_update_costs_what_its_method_declares(make_lm, items, name, retain):
    model = AnswerModel(make_lm())
    objective = make_objective(MethodConfig(name=name, retain=retain), model, items, 0, unseen_logp=-20.0)
    task = UnlearnTask(objective, items, 8, 0, Place())
    once = Counter(task.tokens)
    seen: Counter = Counter()
    for frozen in (objective.reference, objective.untrained):
        if frozen is not None:
            meter(frozen.model.lm, seen, "reference", "reference backward")
    meter(model.lm, seen, "forward", "backward")
    tokens = {batch: part.batch.inputs.numel() for batch, part in next(iter(task.micro_batches(0))).items()}
    train(model, task, OptimConfig(), LOOP, accelerator=make_accelerator(LOOP, 1))
    asked = declared(name, retain, tokens)
    assert seen["reference backward"] == 0
    for kind in ("forward", "backward", "reference"):
        assert asked[kind] <= seen[kind] <= SLACK * asked[kind], kind
    assert task.tokens == Counter(seen) + once, "what run.json says is what was done"


def test_an_update_of_fitting_is_one_pass(make_lm, tiny_items):
    model, seen = AnswerModel(make_lm()), Counter()
    task = FitTask(tiny_items, 8, 0, Place())
    meter(model.lm, seen, "forward", "backward")
    batch, _ = next(iter(task.micro_batches(0)))
    train(model, task, OptimConfig(), LOOP, accelerator=make_accelerator(LOOP, 1))
    assert seen == task.tokens == Counter(forward=batch.inputs.numel(), backward=batch.inputs.numel())


@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_tokens_of_an_evaluation_are_those_the_model_is_fed(make_lm, tiny_items, limit):
    model, seen = AnswerModel(make_lm()), Counter()
    meter(model.lm, seen, "forward", "backward")
    score_answers(model, tiny_items[:50], limit)
    assert seen == Counter(forward=padded_tokens(tiny_items[:50], limit))
