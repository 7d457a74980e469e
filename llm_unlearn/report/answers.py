"""The screen people remember: what a model answered before, what it answers after, and what gold answers, to a few
questions or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_unlearn.eval.compare import MAIN
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.pictures import pictures

NEARNESS = ("forget_acc", "forget_inf_acc", "retain_acc")
NEARNESS_TOFU = ("forget_Q_A_Prob", "model_utility")


@dataclass(frozen=True)
class Said:
    """An answer a model gave, with the probability it gives the true answer (geometric mean over tokens)."""

    text: str
    probability: float | None
    right: bool


@dataclass(frozen=True)
class AnswerRow:
    """One question, or the name of an image; `forget` says whether its answer was to be forgotten."""

    forget: bool
    question: str
    truth: str
    before: Said | None
    after: Said | None
    gold: Said | None
    picture: str | None = None
    """Data URI of the image; None for a question, and where the pixels are not to be had."""


def pick_run(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the run worth showing: at `grok`, else the main run's last checkpoint, the method nearest to gold, not
    collapsed.

    Nearest: smallest sum of distances to gold over `NEARNESS` (forgotten, two-hop, kept), averaged over seeds. A method
    that collapsed on any seed comes after all others. The first seed's run is returned; None without outcomes.
    """
    if not outcomes:
        return None
    found = {o.checkpoint for o in outcomes}
    known = [kind for kind in MAIN if kind in found]
    checkpoint = "grok" if "grok" in found else known[-1] if known else sorted(found)[-1]
    runs = [o for o in outcomes if o.checkpoint == checkpoint]

    def rank(method: str) -> tuple[bool, float, str]:
        mine = [o for o in runs if o.method == method]
        return any(o.collapsed for o in mine), sum(_distance(o) for o in mine) / len(mine), method

    best = min({o.method for o in runs}, key=rank)
    return min((o for o in runs if o.method == best), key=lambda o: o.seed)


def answer_rows(outcome: Outcome, n: int = 3, with_pictures: bool = False) -> list[AnswerRow]:
    """Return up to `n` forgotten and `n` kept questions of a run with everybody's answers; none if it has no answers.

    `with_pictures` opens the data of a run of images for them.
    """
    beside = {
        label: {(a["split"], a["question"]): Said(a["generation"], a.get("probability"), _same(a)) for a in answers}
        for label, answers in outcome.answers.items()
    }
    rows: list[AnswerRow] = []
    for split in ("forget", "retain"):
        for a in [a for a in outcome.answers.get("after", ()) if a["split"] == split][:n]:
            before, after, gold = (
                beside.get(who, {}).get((split, a["question"])) for who in ("start", "after", "gold")
            )
            rows.append(AnswerRow(split == "forget", a["question"], a["answer"], before, after, gold))
    if not with_pictures or outcome.data != "image":
        return rows
    found = pictures(outcome.folder, [row.question for row in rows])
    return [replace(row, picture=found.get(row.question)) for row in rows]


def _distance(outcome: Outcome) -> float:
    names = NEARNESS if "forget_acc" in outcome.metrics else NEARNESS_TOFU
    parts = [d for d in (outcome.number(f"{name}~gold") for name in names) if d is not None]
    return sum(parts) if parts else float("inf")


def _same(answer: Mapping[str, Any]) -> bool:
    return " ".join(answer["generation"].split()) == " ".join(answer["answer"].split())
