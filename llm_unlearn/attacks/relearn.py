"""Relearning: how much of what was forgotten comes back by itself when a few of its facts are told again.

A model that never knew the facts learns nothing about the others from being told a few; one that only hides them gives
them back (Hu et al. 2024, arXiv 2406.13356; Lynch et al. 2024, arXiv 2402.16835, section 5). Gold, told the same, is
what a number is read against: names it has not met, guesses it makes for any author, all of that is in gold's too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.attacks.config import RelearnConfig
from llm_unlearn.config import digest
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.tokenise import Item, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import quick_scores
from llm_unlearn.files import read_json, write_atomic
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.pretrained import fingerprint, load_model, load_tokenizer
from llm_unlearn.seeding import rng, seed_everything
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.loop import Run, join_world, train
from llm_unlearn.train.origin import request_digest
from llm_unlearn.train.tasks import FitTask
from llm_unlearn.unlearn.start import Start

Course = list[dict[str, float]]
"""Evaluations by update: `step`, and accuracy, loss and probability of the facts that are told and of the others."""


def split_forget(rows: Sequence[QARow], facts: int, seed: int) -> tuple[list[QARow], list[QARow]]:
    """Return the rows of `facts` drawn facts, and those of all others: no fact is in both in another wording.

    Raises UserError where none would be left to see whether it comes back.
    """
    names = list(dict.fromkeys(row.fact_id for row in rows))
    if facts >= len(names):
        raise UserError(
            f"relearn.facts={facts}: the forget set has {len(names)} facts, and others must be left; lower it"
        )
    told = {names[int(i)] for i in rng(seed, "relearn").permutation(len(names))[:facts]}
    return [row for row in rows if row.fact_id in told], [row for row in rows if row.fact_id not in told]


class _Watch:
    """Scores both halves of the forget set every few updates."""

    def __init__(self, every: int, told: Sequence[Item], rest: Sequence[Item]) -> None:
        self.every, self.sets, self.course = every, {"told": told, "rest": rest}, Course()

    def __call__(self, run: Run) -> None:
        if run.step % self.every and run.step != run.max_steps:
            return
        line: dict[str, float] = {"step": run.step}
        for name, items in self.sets.items():
            line[f"{name}_acc"], line[f"{name}_loss"], line[f"{name}_prob"] = quick_scores(run.answer_model, items)
        self.course.append(line)

    def state_dict(self) -> dict[str, Any]:
        return {"course": self.course}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.course = state["course"]


def relearn(reference: str, start: Start, config: RelearnConfig) -> Course:
    """Tell a model a few of the facts that `start` asks to forget, by `config`, and return what became of the others.

    Args:
        reference: the model: folder, run@kind or hub name; it is not changed.

    Raises UserError as `split_forget`.
    """
    told, rest = split_forget(start.forget, config.facts, config.seed)
    tokenizer = load_tokenizer(reference)
    items, others = (encode_rows(tokenizer, rows, start.data.format, start.data.max_length) for rows in (told, rest))
    seed_everything(config.seed)
    loop = LoopConfig(max_steps=config.updates, batch_size=len(items), threads=1, log_every=config.updates)
    accelerator, place = join_world(loop, Path())
    model = answer_model(load_model(reference)).to(accelerator.device)
    task = FitTask(items, len(items), config.seed, place, tokenizer.pad_token_id)
    optim = OptimConfig(lr=config.lr, weight_decay=0.0, warmup=0, betas=(0.9, 0.999))
    watch = _Watch(config.every, items, others)
    train(model, task, optim, loop, accelerator=accelerator, callbacks=[watch], label="relearn")
    return watch.course


def relearn_beside(
    reference: str, gold: str, start: Start, config: RelearnConfig, keep: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, Course]]:
    """Relearn a model and its gold; return lines as a results file has them, and both courses by "value" and "gold".

    `relearn_acc` and `relearn_prob` are of the facts that were not told, after the last update; `relearn_updates` is
    when their accuracy was first seen at `config.level` (None: never).

    Args:
        keep: folder for gold's course, which is the same for every model that is judged by it.
    """
    request = request_digest(start.corpus, start.request)
    asked = {"model": fingerprint(gold), "request": request, "relearn": config.model_dump(mode="json")}
    path = keep / f"{digest(asked)[:16]}.json"
    if not path.exists():
        write_atomic(path, (json.dumps({"asked": asked, "course": relearn(gold, start, config)}) + "\n").encode())
    courses = {"value": relearn(reference, start, config), "gold": read_json(path)["course"]}
    n = len(split_forget(start.forget, config.facts, config.seed)[1])
    head = {"metric": "relearn", "split": "forget", "ci": None, "n": n, "start": None}
    units = {"relearn_acc": "share", "relearn_prob": "probability", "relearn_updates": "updates"}
    found = {who: _numbers(course, config.level) for who, course in courses.items()}
    lines = {
        name: {**head, "unit": unit, "direction": "gold", **{who: numbers[name] for who, numbers in found.items()}}
        for name, unit in units.items()
    }
    return lines, courses


def _numbers(course: Course, level: float) -> Mapping[str, float | None]:
    there = next((line["step"] for line in course if line["rest_acc"] >= level), None)
    return {"relearn_acc": course[-1]["rest_acc"], "relearn_prob": course[-1]["rest_prob"], "relearn_updates": there}
