"""Norms, logit scale, effective rank, and what passes return."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import batches, features, n_layers
from llm_unlearn.eval.probes.weights import effective_rank, effective_ranks, feature_rank, logit_scale, weight_norms
from llm_unlearn.models.causal import AnswerModel


def test_norms_of_blocks_add_up_to_the_model_s(tiny_lm):
    norms = weight_norms(AnswerModel(tiny_lm))
    whole = math.sqrt(sum(float(p.detach().square().sum()) for p in tiny_lm.parameters()))
    assert norms["all"]["norm"] == pytest.approx(whole, rel=1e-6)
    assert norms["all"]["weights"] == sum(p.numel() for p in tiny_lm.parameters())
    assert norms["all"]["rms"] == pytest.approx(whole / norms["all"]["weights"] ** 0.5, rel=1e-6)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    assert sum(norms[part]["norm"] ** 2 for part in parts) == pytest.approx(whole**2, rel=1e-6)


def test_tied_weights_count_once(make_lm):
    model = AnswerModel(make_lm(tie=True))
    assert "lm_head" not in weight_norms(model)


def test_logit_scale_is_that_of_the_logits(two_layers, pictures):
    items = pictures(9)
    batch = collate(items)
    with torch.no_grad():
        logits = two_layers(batch.inputs, batch.index_N).double().numpy()
    found = logit_scale(two_layers, items)
    labels = batch.labels_N.numpy()
    right = logits[np.arange(9), labels]
    others = np.array([np.delete(row, y) for row, y in zip(logits, labels, strict=True)])
    assert found["std"] == pytest.approx(logits.std(-1).mean(), rel=1e-5)
    assert found["margin"] == pytest.approx((right - others.max(-1)).mean(), rel=1e-5)
    assert found["margin_mean"] == pytest.approx((right - others.mean(-1)).mean(), rel=1e-5)
    assert found["loss"] == pytest.approx((np.log(np.exp(logits).sum(-1)) - right).mean(), rel=1e-5)
    assert found["tokens"] == 9


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 999), scale=st.floats(1e-4, 1e4))
def test_effective_rank_lies_between_1_and_the_smaller_side(m, n, seed, scale):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    value = effective_rank(w)
    assert 1 - 1e-9 <= value <= min(m, n) + 1e-9
    assert effective_rank(scale * w) == pytest.approx(value, rel=1e-4)
    assert effective_rank(w.T) == pytest.approx(value, rel=1e-6)


def test_effective_rank_where_it_is_known():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    p = np.array([0.7, 0.2, 0.1])
    assert effective_rank(torch.diag(torch.tensor(p))) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(torch.eye(6).reshape(6, 3, 2, 1)) == pytest.approx(6), "a convolution is (out, the rest)"
    assert math.isnan(effective_rank(torch.zeros(3, 3)))
    with pytest.raises(UserError, match="is of a matrix"):
        effective_rank(torch.ones(3))


def test_features_are_centred_before_their_rank(two_layers):
    x = torch.zeros(10, 4)
    x[:, 0] = 100
    x[:5, 1] = 1
    assert feature_rank(x) == pytest.approx(1)
    with pytest.raises(UserError, match="at least 2 rows"):
        feature_rank(x[:1])
    assert set(effective_ranks(two_layers)) == {"1.weight", "3.weight"}, "no rank of a bias"


def test_features_are_a_layer_s_output_averaged_over_the_answer(tiny_lm, tiny_items):
    model = AnswerModel(tiny_lm).eval()
    some = tiny_items[:7]
    assert n_layers(model) == 2
    for layer in (0, 1):
        got = features(model, some, layer)
        for row, item in zip(got, some, strict=True):
            batch = collate([item])
            with torch.no_grad():
                hidden = model(batch.inputs, batch.index_N, layer).double()
            torch.testing.assert_close(row, hidden.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 2, 99])
def test_a_layer_out_of_range_is_told(tiny_lm, tiny_items, layer):
    with pytest.raises(UserError, match=f"layer {layer}: the model has layers 0 to 1; give one of them"):
        features(AnswerModel(tiny_lm), tiny_items[:4], layer)


def test_no_items_and_unknown_depth_are_told(two_layers):
    with pytest.raises(UserError, match="no items to look at"):
        list(batches(two_layers, []))
    del two_layers.lm.config
    with pytest.raises(UserError, match="does not say how many layers"):
        n_layers(two_layers)
