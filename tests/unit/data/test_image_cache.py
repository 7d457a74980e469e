"""Image corpora are kept between the cells of a process, and only as long as their files are the same."""

from __future__ import annotations

import os

import numpy as np

from llm_unlearn.config import build_config
from llm_unlearn.data.source import DataConfig, open_corpus


def data(path=None, **image) -> DataConfig:
    kind = "npz" if path else "digits"
    return build_config(DataConfig, {"kind": kind, "path": path, "image": {"clusters": 1, **image}})


def written(path, first: int) -> str:
    images = np.zeros((40, 4, 4), np.uint8)
    images[:, 0, 0] = np.arange(40) + first
    np.savez(path, images=images, labels=np.arange(40) % 2, classes=np.array(["a", "b"]))
    return str(path)


def test_the_same_config_is_read_once():
    first = open_corpus(data(train=20))
    assert open_corpus(data(train=20)) is first
    other = open_corpus(data(train=30))
    assert len(other.split("train")) == 30
    assert other.identity != first.identity


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "mine.npz"
    config = data(written(path, 0), train=20, test=10)
    before = open_corpus(config)
    assert open_corpus(config) is before
    written(path, 100)
    os.utime(path, ns=(1, 1))
    after = open_corpus(config)
    assert after.meta["pixels"] != before.meta["pixels"]
