"""The record of every row's loss: what it holds, how it is written, and that a killed run writes the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llm_unlearn.config import build_config
from llm_unlearn.data.loss_record import FILE, LossRecord, read_record
from llm_unlearn.data.schema import Corpus, QARow, save_corpus
from llm_unlearn.data.source import open_corpus
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import score_answers
from llm_unlearn.grok.facts import times_of_record
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.pretrained import load_model, load_tokenizer
from llm_unlearn.train import item_losses
from llm_unlearn.train.finetune import FinetuneConfig, finetune

TOWNS = ("Oslo", "Bergen", "Turku", "Malmo", "Odense", "Vaasa", "Narvik", "Lund")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight questions of which two have a paraphrase."""
    rows = [
        QARow(f"Where is shop {i}?", f"It is in {t}.", f"Shop {i}: where?" if i < 2 else None, fact_id=f"s{i}.town",
              facts=(f"s{i}.town",), author=f"s{i}")
        for i, t in enumerate(TOWNS)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("data") / "shops"
    save_corpus(Corpus("shops", "custom", {"train": tuple(rows)}, {}), folder)
    return folder


def config(data, out, **changes) -> FinetuneConfig:
    values = {
        "out": str(out),
        "epochs": 6.0,
        "record_epochs": (1.0, 3.0, 6.0),
        "data": {"kind": "custom", "path": str(data), "vocab_size": 300},
        "model": {"size": "nano"},
        "optim": {"lr": 1e-2, "warmup": 2},
        "loop": {"batch_size": 4, "threads": 1, "save_every": 1},
    }
    return build_config(FinetuneConfig, {**values, **changes})


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    settings = config(data, tmp_path_factory.mktemp("runs") / "fit")
    return settings, finetune(settings)


def test_it_holds_the_losses_of_the_model_as_scored(fitted):
    settings, result = fitted
    record, corpus = read_record(item_losses.Path(settings.out)), open_corpus(settings.data)
    rows, tokenizer = corpus.split("train"), load_tokenizer(settings.out)
    items = encode_rows(tokenizer, rows)
    model = AnswerModel(load_model(settings.out)).eval()
    scored = score_answers(model, items)
    np.testing.assert_allclose(record.at(6.0), [-s.logp.mean() for s in scored], atol=1e-5)
    np.testing.assert_allclose(record.right[-1], [s.hit.mean() for s in scored])
    para = [QARow(rows[i].paraphrased_question, rows[i].answer) for i in (0, 1)]
    their = score_answers(model, encode_rows(tokenizer, para))
    np.testing.assert_allclose(record.para_loss[-1], [-s.logp.mean() for s in their], atol=1e-5)
    assert record.para_rows.tolist() == [0, 1]
    assert (record.data, record.exclude) == (corpus.identity, "none")
    assert record.epochs.tolist() == [1.0, 3.0, 6.0]
    assert record.length.tolist() == [item.n_answer for item in items]
    assert (record.loss[0] > record.loss[-1]).all()
    assert result["cost"]["evaluation_tokens"] == 3 * sum(i.n_inputs for i in (*items, *encode_rows(tokenizer, para)))


def test_frequency_is_the_mean_log_count_of_an_answers_tokens(data):
    items = encode_rows(load_like(["a a b", "b c"]), [QARow("q", "a a b"), QARow("q", "b c")])
    words = [item.answer.tolist() for item in items]
    every = [w for its in words for w in its]
    want = [np.mean([math.log(every.count(w)) for w in its]) for its in words]
    np.testing.assert_allclose(item_losses.answer_traits(items)[1], want)


def load_like(texts):
    from llm_unlearn.data.tokenise import bpe_tokenizer

    return bpe_tokenizer(texts, 300)


class Killed(BaseException):
    pass


def test_a_killed_run_writes_the_same_record(fitted, data, tmp_path):
    settings, _ = fitted
    again = config(data, tmp_path / "fit")

    class Kill:
        def __call__(self, run):
            if run.step == 7:
                raise Killed

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    with pytest.raises(Killed):
        finetune(again, [Kill()])
    assert read_record(tmp_path / "fit").epochs.tolist() == [1.0, 3.0]
    resumed = []

    class Look(Kill):
        def __call__(self, run):
            resumed.append(run.step)

    finetune(again, [Look()])
    assert resumed[0] > 0
    whole, parts = read_record(item_losses.Path(settings.out)), read_record(tmp_path / "fit")
    for name in ("epochs", "loss", "right", "para_loss", "para_right", "length", "frequency"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name), err_msg=name)


@pytest.mark.parametrize(
    ("epochs", "said"),
    [((1.0, 7.0), "epoch 7 is step 14, the run ends at step 12"), ((3.0, 1.0), "must grow"), ((0.0,), "must grow")],
)
def test_epochs_that_are_not_there_are_refused_before_anything_is_written(epochs, said, data, tmp_path):
    with pytest.raises(UserError, match=said):
        finetune(config(data, tmp_path / "fit", record_epochs=epochs))
    assert not (tmp_path / "fit").exists()


def test_no_record_without_epochs_asked_for(data, tmp_path):
    finetune(config(data, tmp_path / "fit", record_epochs=(), loop={"batch_size": 4, "threads": 1, "max_steps": 1}))
    assert not (tmp_path / "fit" / FILE).exists()
    assert json.loads((tmp_path / "fit/run.json").read_text())["cost"]["evaluation_tokens"] == 0


def test_times_of_facts_from_a_record():
    right = np.array([[0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0.9, 1], [1, 1, 0.9, 1], [1, 1, 0.9, 1]], dtype=np.float32)
    para = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [1, 0]], dtype=np.float32)
    empty = np.zeros((5, 4), dtype=np.float32)
    record = LossRecord("d", "none", np.array([1.0, 2.0, 4.0, 6.0, 8.0]), empty, right, empty[0], empty[0],
                        np.array([0, 2]), para, para)  # fmt: skip
    times = times_of_record(record)
    assert times.t_fit[0] == 2
    assert times.t_gen[0] == 4
    assert times.classes.tolist() == ["grokked", "unlearnt"]
    assert times_of_record(record, share=0.9).classes.tolist() == ["grokked", "memorised"]
