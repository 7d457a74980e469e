"""Where data comes from: written folders have to be what the config asks for, and what is trained beside them."""

from __future__ import annotations

import pytest

from llm_unlearn.data.schema import Corpus, QARow, save_corpus
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.data.splits import Scenario, draw_request, eval_splits, training_rows
from llm_unlearn.errors import UserError


def rows(name: str, n: int) -> tuple[QARow, ...]:
    return tuple(QARow(f"{name} {i}?", f"{i}.", author=f"{name}{i}", fact_id=f"{name}{i}.q") for i in range(n))


@pytest.fixture
def folder(tmp_path):
    splits = {"train": rows("a", 6), "real_authors": rows("r", 2), "world_facts": rows("w", 1)}
    meta = {"forget_split": "forget01", "forget_rows": [4, 5], "retain_eval_rows": [0, 1]}
    save_corpus(Corpus("tofu", "tofu", splits, meta), tmp_path / "tofu01")
    return tmp_path / "tofu01"


def config(folder, **changes) -> DataConfig:
    return DataConfig(kind="tofu", path=str(folder), forget_split="forget01").model_copy(update=changes)


def test_a_written_folder_of_another_forget_split_is_refused(folder):
    assert open_corpus(config(folder)).meta["forget_rows"] == [4, 5]
    with pytest.raises(UserError, match="holds TOFU for forget01, asked for is forget10; name the same split"):
        open_corpus(config(folder, forget_split="forget10"))


def test_neutral_rows_are_trained_by_every_model_and_measured_as_before(folder):
    plain, corpus = open_corpus(config(folder)), open_corpus(config(folder, train_neutral=True))
    neutral = {*rows("r", 2), *rows("w", 1)}
    assert corpus.split("train") == (*plain.split("train"), *rows("r", 2), *rows("w", 1))
    assert corpus.identity != plain.identity, "gold trained without them is no gold"
    request = draw_request(corpus, Scenario())
    for exclude in ("none", "forget"):
        assert neutral < set(training_rows(corpus, request, exclude))
    assert set(training_rows(corpus, request, "none")) - set(training_rows(corpus, request, "forget")) == set(
        rows("a", 6)[4:]
    )
    assert eval_splits(corpus, request) == eval_splits(plain, draw_request(plain, Scenario()))


def test_worlds_train_them_anyway_and_not_twice(tmp_path, tiny_world):
    save_corpus(tiny_world, tmp_path / "w")
    opened = open_corpus(DataConfig(path=str(tmp_path / "w"), train_neutral=True))
    assert opened.split("train") == tiny_world.split("train")
