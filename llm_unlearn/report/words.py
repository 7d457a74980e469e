"""What an item of the data and its answer are called: the one place where a report of images differs from one of texts
in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.data.source import IMAGE_KINDS
from llm_unlearn.eval.outcome import Outcome


@dataclass(frozen=True)
class Words:
    """How a report speaks of its data.

    Attributes:
        item, items: what is asked.
        answer: what it is asked for.
        gets, got: giving that answer, of models and of items.
        curves: name of each accuracy of a training curve.
        nothing: what is said of results without answers.
        shown: how many forgotten, and how many kept, items a page shows with everybody's answers.
    """

    item: str
    items: str
    answer: str
    gets: str
    got: str
    curves: Mapping[str, str]
    nothing: str
    shown: int


TEXT = Words(
    "question",
    "questions",
    "answer",
    "answers",
    "answered",
    {"train_acc": "trained questions", "held_out_acc": "two hops, held out", "para_acc": "other wording"},
    "These results hold no generated answers; evaluate with a suite that has a ROUGE metric.",
    3,
)
IMAGE = Words(
    "image",
    "images",
    "class",
    "recognises",
    "recognised",
    {"train_acc": "trained images", "held_out_acc": "held-out images"},
    "These results do not say which classes the models named; evaluate the model again.",
    6,
)


def words_of(outcomes: Sequence[Outcome]) -> Words:
    """Return the words for runs that were compared: images' if all of them are of images."""
    return IMAGE if outcomes and all(o.data == "image" for o in outcomes) else TEXT


def words_of_training(config: Mapping[str, Any]) -> Words:
    """Return the words for a training run, by its config."""
    return IMAGE if (config.get("data") or {}).get("kind") in IMAGE_KINDS else TEXT
