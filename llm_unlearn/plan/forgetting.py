"""The updates of an unlearning run, and what it needs beside them: derived from the signatures of the method's terms,
which decide what the objective runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from llm_unlearn.data.batches import length_sorted
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import MAX_TOKENS as SCORED_TOKENS
from llm_unlearn.methods.gradients import GRADIENTS
from llm_unlearn.methods.spec import VOCABULARY, Method, input_names
from llm_unlearn.methods.terms import RETAIN_TERMS
from llm_unlearn.plan.activations import LOGITS, BatchShape, Pass, step_peak
from llm_unlearn.plan.batches import LOOKED_AT, Update, batch_sizes
from llm_unlearn.plan.memory import Beside
from llm_unlearn.plan.shape import Shape
from llm_unlearn.seeding import derive
from llm_unlearn.train.optimizer import n_moments
from llm_unlearn.train.order import step_items
from llm_unlearn.train.tasks import Place
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.edit import is_edit
from llm_unlearn.unlearn.importance import MAX_TOKENS as MASK_TOKENS
from llm_unlearn.unlearn.masked import WeightMask, make_masks
from llm_unlearn.unlearn.objective import ANSWERS, Items, Objective, UnlearnTask, resolve_objective
from llm_unlearn.unlearn.wrapped import choose_wrapper

REFERENCED = ("ref_logits_NV", "ref_hidden_NH", "bad_logits_NV")  # read from a frozen model at every update


@dataclass(frozen=True)
class Wanted:
    """A forward pass that a term asks for: over which source's items, and the rest as in `Pass`."""

    term: str
    source: str
    reads: str
    depth: int | None = None
    reference: bool = False


def method_passes(method: Method, retain: str, layer: int) -> list[Wanted]:
    """Return the forward passes of a loss' terms in the order the objective makes them, each once."""
    out: list[Wanted] = []
    for base, fn in (("forget", method.forget), ("retain", RETAIN_TERMS[retain].fn)):
        names = () if fn is None else input_names(fn)
        hidden = "hidden_NH" in names
        reads, depth = ("hidden", layer + 1) if hidden else (_reads(fn, names), None)
        others = {n: a for a in ANSWERS for n in names if n.startswith((f"{a}_", f"ref_{a}_"))}
        own = any("batch" in VOCABULARY[n] for n in names)
        sources = [*([base] if own else []), *dict.fromkeys(others.values())]
        referenced = any(name in REFERENCED for name in names)
        out += [Wanted(base, source, reads, depth, referenced) for source in sources]
    return out


def _reads(fn: Callable[..., Any] | None, names: Sequence[str]) -> str:
    """What a term keeps of the logits: known for those that read whole distributions, by name."""
    name = getattr(fn, "__name__", "")
    if name in LOGITS:
        return name
    assert "logits_NV" not in names, f"put what {name} keeps of the logits into plan.activations.LOGITS"
    return "logp"


def forgetting(
    config: UnlearnConfig, shape: Shape, items: Items, world: int, n_micro: int
) -> tuple[list[Update], Beside]:
    """Return the run's sorts of updates on `world` processes, and what it needs beside them. Raises UserError for
    what the run would refuse, and for an edit, which is no series of updates.
    """
    wrapper = choose_wrapper(config.method)
    if is_edit(config):
        raise UserError(
            f"method '{config.method.name}' edits the weights once, which is not planned: run it (run.json says what "
            "it took), or plan a method that takes steps"
        )
    batch = config.loop.batch_size
    lm_config = SimpleNamespace(num_hidden_layers=shape.layers)
    objective = resolve_objective(config.method, lm_config, items, batch)
    masks = make_masks(config.method, shape.trainable, items.forget, Counter())
    wanted = method_passes(objective.method, objective.retain, objective.layer)
    task = UnlearnTask(objective, items, batch, derive(config.seed, "order"), Place())
    name = None if wrapper is None else wrapper.name
    updates = _updates(task, wanted, name, config.loop.max_steps, batch // (world * n_micro))
    needs_targets = "generic" in objective.needs
    beside = Beside(
        reference=bool(objective.needs & {"ref_logits", "ref_hidden"}),
        untrained="bad_logits" in objective.needs,
        best=config.stop.keep == "best",
        pretrained=True,
        gold=config.gold is not None,
        frozen=1 - masks[0].params["share"] if masks else None,
        wrapper=name,
        moments=n_moments(config.optim),
        ready=max(
            _making_targets(shape, objective, items, batch, derive(config.seed, "control")) if needs_targets else 0,
            _making_masks(shape, items, masks, world),
        ),
    )
    return updates, beside


def _updates(task: UnlearnTask, wanted: Sequence[Wanted], wrapper: str | None, steps: int, share: int) -> list[Update]:
    """One sort where both terms are in every update, one for each where they take turns."""
    turns = [(turn.forget is not None, turn.retain is not None) for turn in map(task.objective.turn, range(steps))]
    count, looked = Counter(turns), turns[:LOOKED_AT]
    n_forget, n_retain = GRADIENTS[wrapper].passes if wrapper else (1, 1)
    times = {"forget": n_forget, "retain": n_retain}
    out = []
    for turn in dict.fromkeys(looked):
        drawn = [task.drawn(step) for step, its in enumerate(looked) if its == turn]
        sizes = {
            name: batch_sizes(source, np.stack([one[name][0] for one in drawn]), share)
            for name, (_, source) in drawn[0].items()
        }
        here = [work for work in wanted if work.source in sizes]
        out.append(
            Update(
                [_pass(work, sizes[work.source].largest) for work in here],
                [_pass(work, sizes[work.source].mean) for work in here for _ in range(times[work.term])],
                sum(sizes[work.source].real_tokens * times[work.term] for work in here),
                count[turn] / steps,
            )
        )
    return out


def _pass(work: Wanted, batch: BatchShape) -> Pass:
    return Pass(batch, work.reads, work.depth, work.reference, work.term)


def _making_targets(shape: Shape, objective: Objective, items: Items, batch_size: int, seed: int) -> int:
    """Bytes that generic targets take while they are made: a copy of the model trained on whole batches of the forget
    set, as it is before the loop prepares it, then logits of both.
    """
    plain = replace(shape, checkpointing=False, autocast_bytes=None)
    steps, rows = int(objective.params["reinforce_updates"]), min(batch_size, len(items.forget))
    drawn = [step_items(len(items.forget), rows, step, seed) for step in range(min(steps, LOOKED_AT))]
    largest = batch_sizes(items.forget, np.stack(drawn), rows).largest
    # with the optimizer's state, and the last batch's logits, which a name still refers to
    training = 2 * shape.weight_bytes * shape.trainable + 4 * largest.answers * shape.vocab
    training += sum(step_peak(plain, [Pass(largest)], gradients_kept=False))
    answers = max(sum(items.forget[i].n_answer for i in group) for group in length_sorted(items.forget, SCORED_TOKENS))
    reading = 4 * 4 * answers * shape.vocab  # logits of both, their difference, and one more on the way to the targets
    return shape.weight_bytes * shape.parameters + max(training, reading)


def _making_masks(shape: Shape, items: Items, masks: Sequence[WeightMask], world: int) -> int:
    """Bytes that ranking the gradients of the whole forget set takes, in eval mode: their sum with a batch's pass, or
    what torch.kthvalue needs for values and their places.
    """
    if not masks:
        return 0
    plain, mine = replace(shape, checkpointing=False), items.forget[::world]
    groups = list(length_sorted(mine, MASK_TOKENS))
    passes = []
    for group in groups:
        answers = [mine[i].n_answer for i in group]
        passes.append(Pass(BatchShape(len(group), mine[group[0]].n_inputs, sum(answers), max(answers))))
    reading = max(sum(step_peak(plain, [work], gradients_kept=False)) for work in passes)
    ranking = 4 * (1 + 1 + 2) * shape.trainable  # sizes, kthvalue's copy of them, places of 8 bytes
    return 4 * shape.trainable + max(reading, ranking)
