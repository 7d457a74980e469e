"""Images as rows: a picture is asked for its class, which is an answer of one token from a vocabulary of classes.

So that everything downstream of a batch (losses, metrics, statistics) is one code for text and images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.errors import UserError
from llm_unlearn.files import read_json

CLASSES_FILE = "classes.json"
RELATION = "class"


@dataclass(frozen=True, slots=True)
class ImageRow(QARow):
    """An image and its class. `question` is its identity ("train/17"), `answer` its class, `facts` what a forget
    request can name: the image itself, its class ("class:7") and its sub-class ("subclass:7.1") if there is one.
    """

    pixels: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(C, H, W) float32, normalised; left out of `to_json` (the corpus names the hash of all)."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image with one class, as a model reads it: what `Encoded` is to text."""

    pixels: np.ndarray
    label: int

    @property
    def answer(self) -> np.ndarray:
        """(1,) the class's number."""
        return np.array([self.label])

    @property
    def n_answer(self) -> int:
        """One token: the class."""
        return 1

    @property
    def n_inputs(self) -> int:
        """One image."""
        return 1

    @property
    def has_eos(self) -> bool:
        """A class has no end token."""
        return False


class Classes:
    """The vocabulary of a classifier and the (C, H, W) of the images it reads. Stands where a language model has its
    tokenizer.
    """

    pad_token_id = 0  # nothing is ever padded

    def __init__(self, names: Sequence[str], shape: Sequence[int]) -> None:
        self.names, self.shape = tuple(names), tuple(shape)
        self._number: Mapping[str, int] = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, asked: Sequence[tuple[QARow, str]]) -> list[Picture]:
        """Return (image row, class) pairs as items. Raises UserError for a class that is none of these."""
        return [Picture(_pixels(row), self._of(answer)) for row, answer in asked]

    def _of(self, name: str) -> int:
        if name not in self._number:
            raise UserError(f"unknown class '{name}'; known: {', '.join(self.names)}")
        return self._number[name]

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the names beside a model."""
        text = json.dumps({"classes": self.names, "shape": self.shape}, indent=1)
        (Path(folder) / CLASSES_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Classes:
        """Read what `save_pretrained` wrote. Raises UserError for anything else."""
        try:
            told = read_json(folder / CLASSES_FILE)
            return cls([str(name) for name in told["classes"]], [int(n) for n in told["shape"]])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder / CLASSES_FILE}: names no classes; copy the model again") from None


def corpus_classes(corpus: Corpus) -> Classes:
    """Return the classes of an image corpus, in the order of their numbers, and the shape of its images."""
    return Classes(corpus.meta["classes"], corpus.meta["shape"])


def stacked(items: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (B, C, H, W) images and what `Batch` has besides: (B,) positions, (B,) classes, (B,) rows."""
    at = torch.arange(len(items))
    labels = torch.tensor([item.label for item in items], dtype=torch.int64)
    return torch.from_numpy(np.stack([item.pixels for item in items])), at, labels, at


def _pixels(row: QARow) -> np.ndarray:
    pixels = getattr(row, "pixels", None)
    if pixels is None:
        raise UserError(f"{row.question}: is no image; this model classifies images, give the data it was trained on")
    return pixels
