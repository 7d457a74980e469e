"""Scoring: numbers that do not depend on the batch, and equal a slow reference."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from llm_unlearn.data.tokenise import encode, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.rows import score_split
from llm_unlearn.eval.scoring import quick_scores, score_answers
from llm_unlearn.models.causal import AnswerModel


@pytest.fixture
def model(make_lm):
    """A model whose logits are as spread out as a trained one's."""
    lm = make_lm()
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)
    return AnswerModel(lm)


@pytest.fixture
def rows(tiny_world):
    """Rows of every sort, of different lengths."""
    return [row for name in tiny_world.splits for row in tiny_world.splits[name][:6]]


@pytest.fixture
def items(tiny_tokenizer, rows):
    return encode_rows(tiny_tokenizer, rows)


def slow(lm, item) -> tuple[np.ndarray, np.ndarray]:
    """One item alone, full logits, float64 log-softmax."""
    ids = torch.from_numpy(item.ids)[None]
    with torch.no_grad():
        logits = lm.eval()(input_ids=ids).logits[0, item.start - 1 : -1].double()
    labels = ids[0, item.start :]
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].numpy(), (logits.argmax(-1) == labels).numpy()


def test_equals_one_by_one_with_full_logits(model, items):
    scored = score_answers(model, items)
    assert len(scored) == len(items)
    for s, item in zip(scored, items, strict=True):
        logp, hit = slow(model.lm, item)
        assert s.logp.dtype == np.float64
        assert s.logp == pytest.approx(logp, abs=1e-5)
        assert s.hit.tolist() == hit.tolist()
        assert s.has_eos


@pytest.mark.parametrize("max_tokens", [1, 30, 90, 700, 100_000])
def test_batch_size_changes_nothing(model, items, max_tokens):
    for a, b in zip(score_answers(model, items), score_answers(model, items, max_tokens), strict=True):
        assert np.abs(a.logp - b.logp).max() <= 1e-5
        assert a.hit.tolist() == b.hit.tolist()


def test_order_changes_nothing(model, items):
    order = random.Random(0).sample(range(len(items)), len(items))
    straight, shuffled = score_answers(model, items), score_answers(model, [items[i] for i in order])
    for place, i in enumerate(order):
        assert np.abs(shuffled[place].logp - straight[i].logp).max() <= 1e-5


def test_the_mode_of_the_model_is_given_back(model, items):
    for training in (True, False):
        model.train(training)
        score_answers(model, items[:2])
        assert model.training == training
        assert model.lm.training == training


def test_half_precision_models_are_scored_in_full(make_lm, tiny_items):
    """A fitted model in bf16: its log-probabilities are close to 0, where a bf16 softmax has few values to give."""
    items = tiny_items[:40]
    model = fitted(make_lm(), items, steps=60)
    model.lm.to(torch.bfloat16)
    ours = np.concatenate([s.logp for s in score_answers(model, items)])
    theirs = []
    for item in items:
        ids = torch.from_numpy(item.ids)[None]
        with torch.no_grad():
            logp = model.lm(input_ids=ids).logits[0, item.start - 1 : -1].log_softmax(-1)
        assert logp.dtype == torch.bfloat16
        theirs.append(logp.gather(-1, ids[0, item.start :, None])[:, 0].float().numpy())
    sure = ours > -0.1
    assert len(np.unique(ours[sure])) > 60
    assert len(np.unique(np.concatenate(theirs)[sure])) < 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_s_padding_side_changes_nothing(model, rows, tiny_tokenizer, monkeypatch, side):
    needs = ["perturbed", "generation"]
    before = score_split(model, tiny_tokenizer, rows, needs=needs, max_new_tokens=6)
    monkeypatch.setattr(tiny_tokenizer, "padding_side", side)
    after = score_split(model, tiny_tokenizer, rows, needs=needs, max_new_tokens=6)
    for a, b in zip(before, after, strict=True):
        assert a.generation == b.generation
        for x, y in zip((a.scored, *a.perturbed), (b.scored, *b.perturbed), strict=True):
            assert np.array_equal(x.logp, y.logp)


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_the_number_of_rows_scored_together_changes_nothing(model, rows, tiny_tokenizer, size):
    rows = [row for row in rows for _ in range(2)][:65]
    needs = ["perturbed", "generation", "vocabulary"]
    together = score_split(model, tiny_tokenizer, rows, needs=needs, max_new_tokens=6)
    parts = [rows[k : k + size] for k in range(0, len(rows), size)]
    apart = [r for part in parts for r in score_split(model, tiny_tokenizer, part, needs=needs, max_new_tokens=6)]
    assert [r.generation for r in apart] == [r.generation for r in together]
    for a, b in zip(apart, together, strict=True):
        for x, y in zip((a.scored, *a.perturbed), (b.scored, *b.perturbed), strict=True):
            np.testing.assert_allclose(x.logp, y.logp, rtol=1e-5)
            np.testing.assert_allclose(np.exp(x.logp), np.exp(y.logp), rtol=0, atol=1e-6)
            assert x.hit.tolist() == y.hit.tolist()


def test_a_model_that_computes_nan_is_refused(model, items):
    with torch.no_grad():
        model.lm.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="NaN: training has diverged"):
        score_answers(model, items)


def test_quick_scores_by_hand(model, items):
    right, loss, probability = quick_scores(model, items)
    scored = [slow(model.lm, item) for item in items]
    assert right == np.mean([hit.all() for _, hit in scored])
    assert loss == pytest.approx(-np.concatenate([logp for logp, _ in scored]).mean(), abs=1e-5)
    assert probability == pytest.approx(np.mean([math.exp(logp.mean()) for logp, _ in scored]), abs=1e-6)


def test_records_hold_every_answer_in_its_place(model, tiny_tokenizer, rows):
    records = score_split(model, tiny_tokenizer, rows, needs=["perturbed"])
    for i, (record, row) in enumerate(zip(records, rows, strict=True)):
        assert (record.index, record.author, record.question, record.answer) == (
            i,
            row.author,
            row.question,
            row.answer,
        )
        texts = [row.answer, *([row.paraphrased_answer] if row.paraphrased_answer else []), *row.perturbed_answer]
        parts = [record.scored, *([record.paraphrase] if record.paraphrase else []), *record.perturbed]
        assert len(parts) == len(texts)
        for part, item in zip(parts, encode(tiny_tokenizer, [(row.question, t) for t in texts]), strict=True):
            assert part.logp == pytest.approx(slow(model.lm, item)[0], abs=1e-5)
        assert (record.paraphrase is None) == (row.paraphrased_answer is None)
        assert record.generation is None
        assert record.correct == record.scored.hit.all()


def test_only_what_is_asked_for_is_scored(model, tiny_tokenizer, rows):
    for record in score_split(model, tiny_tokenizer, rows[:3]):
        assert record.paraphrase is None
        assert record.perturbed == ()


def test_an_item_without_an_author_is_its_own_cluster(model, tiny_tokenizer, rows):
    nobody = [dataclasses.replace(row, author="") for row in rows[:3]]
    assert [r.author for r in score_split(model, tiny_tokenizer, nobody)] == ["0", "1", "2"]


def fitted(lm, items, steps=150):
    model = AnswerModel(lm)
    from llm_unlearn.data.batches import collate
    from llm_unlearn.methods.losses import nll, token_logprobs

    optimizer, batch = torch.optim.AdamW(lm.parameters(), lr=1e-2), collate(items)
    for _ in range(steps):
        optimizer.zero_grad()
        nll(token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0]).backward()
        optimizer.step()
    return model


def test_all_hits_is_what_greedy_decoding_would_say(make_lm, tiny_world, tiny_tokenizer):
    """Fitted on half of the rows, so that both verdicts occur."""
    rows = [row for row in tiny_world.split("train") if row.template == "w0" and row.hop == 1][:24]
    model = fitted(make_lm(), encode_rows(tiny_tokenizer, rows[::2]), steps=80)
    hits = [r.correct for r in score_split(model, tiny_tokenizer, rows)]
    generated = score_split(model, tiny_tokenizer, rows, needs=["generation"], max_new_tokens=16)
    assert 8 <= sum(hits) < 24
    assert [r.correct for r in generated] == hits
    for record, row in zip(generated, rows, strict=True):
        assert (record.generation == row.answer) == record.correct


def test_memorised_answers_end_where_they_end(make_lm, tiny_world, tiny_tokenizer):
    rows = tiny_world.split("train")[:12]
    model = fitted(make_lm(), encode_rows(tiny_tokenizer, rows))
    records = score_split(model, tiny_tokenizer, rows, needs=["generation"], max_new_tokens=40)
    assert [r.generation for r in records] == [row.answer for row in rows]


def test_rows_longer_than_learned_positions_are_refused_and_rotary_ones_told(make_lm, rows, tiny_tokenizer, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": 6, "n_embd": 32, "n_layer": 1, "n_head": 2}
    short = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **shape))
    with pytest.raises(UserError, match=r"row \d+ has \d+ tokens, the model takes 6; shorten the row"):
        score_split(AnswerModel(short), tiny_tokenizer, rows)
    score_split(AnswerModel(make_lm(max_length=8)), tiny_tokenizer, rows)
    assert "tokens, the model takes 8: scored beyond the length it was made for" in caplog.text
