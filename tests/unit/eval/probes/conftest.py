"""A small image classifier with the interface of a language model, and pictures for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llm_unlearn.data.images import ImageRow, Picture


class FakeImages(nn.Module):
    """What probes see of an image model: `.lm`, and forward(inputs, index_N, layer)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.lm = nn.Sequential(*layers)
        self.lm.config = SimpleNamespace(num_hidden_layers=len(layers))  # pyright: ignore

    def forward(self, inputs, index_N, layer=None):
        if layer is None:
            return self.lm(inputs)[index_N]
        x = inputs
        for module in list(self.lm)[: layer + 1]:
            x = module(x)
        return x.flatten(1)[index_N]


@pytest.fixture
def two_layers():
    """Linear 12 -> 7, ReLU, Linear 7 -> 3 on images of 1 x 3 x 4."""
    torch.manual_seed(3)
    return FakeImages(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))


@pytest.fixture
def pictures():
    """A function (n, seed) -> n random pictures of three classes."""

    def make(n: int, seed: int = 0) -> list[Picture]:
        draw = np.random.default_rng(seed)
        return [Picture(draw.normal(size=(1, 3, 4)).astype(np.float32), int(draw.integers(3))) for _ in range(n)]

    return make


@pytest.fixture
def picture_rows():
    """A function (pictures, name) -> their rows."""

    def make(pictures, name="train"):
        return [
            ImageRow(f"{name}/{i}", f"c{p.label}", author=f"{name}/{i}", relation="class")
            for i, p in enumerate(pictures)
        ]

    return make


@pytest.fixture
def fake_images():
    """The class itself."""
    return FakeImages
