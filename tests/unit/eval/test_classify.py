"""What a classifier says of images, in the field where a language model's answer stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.data.images import Classes, ImageRow
from llm_unlearn.eval.rows import score_split
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.image_model import build_classifier
from llm_unlearn.models.image_nets import NetConfig

NAMES, SIDE, N = ("cat", "dog", "owl", "emu"), 4, 600  # more than a batch of them


@pytest.fixture(scope="module")
def model() -> Any:
    return answer_model(build_classifier(NetConfig(arch="cnn", alpha=4), (1, SIDE, SIDE), len(NAMES), 0))


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    draw = np.random.default_rng(0)
    return [
        ImageRow(f"train/{i}", NAMES[draw.integers(4)], author=str(i), pixels=pixels)
        for i, pixels in enumerate(draw.normal(size=(N, 1, SIDE, SIDE)).astype(np.float32))
    ]


def test_the_generation_is_the_likeliest_class(model, rows):
    records = score_split(model, Classes(NAMES, (1, SIDE, SIDE)), rows)
    with torch.no_grad():
        likeliest = model.lm(torch.from_numpy(np.stack([row.pixels for row in rows]))).argmax(-1)
    assert [r.generation for r in records] == [NAMES[i] for i in likeliest.tolist()]
    assert [r.correct for r in records] == [r.generation == r.answer for r in records]
    assert 0 < sum(r.correct for r in records) < N - 256, "both sorts, and the wrong ones in several batches"


def test_a_miss_is_never_named_right(model, rows):
    """Equal logits: the first class is said, so the others are misses, and asked alone they must stay so."""
    with torch.no_grad():
        head = model.lm.head
        kept = head.weight.clone(), head.bias.clone()
        head.weight.zero_()
        head.bias.zero_()
    records = score_split(model, Classes(NAMES, (1, SIDE, SIDE)), rows)
    assert {(r.answer, r.generation) for r in records} == {("cat", "cat"), *((name, "cat") for name in NAMES[1:])}
    with torch.no_grad():
        head.weight.copy_(kept[0])
        head.bias.copy_(kept[1])


def test_a_suite_that_asks_for_generations_gets_classes(model, rows):
    classes = Classes(NAMES, (1, SIDE, SIDE))
    asked, unasked = (score_split(model, classes, rows[:20], needs=needs) for needs in (("generation",), ()))
    assert [r.generation for r in asked] == [r.generation for r in unasked]
