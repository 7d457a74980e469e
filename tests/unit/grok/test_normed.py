"""fit_normed: the function of one checkpoint in weights with the norms of another."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llm_unlearn.errors import UserError
from llm_unlearn.grok.controls import logit_spread, predictions
from llm_unlearn.grok.normed import groups, norm, publish_fit_normed, take_norms
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.pretrained import load_model, read_origin
from llm_unlearn.train.snapshot import save_model


@pytest.fixture
def make(make_lm):
    def build(seed, scale=1.0, **changes):
        model = AnswerModel(make_lm(seed, **changes))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p)).mul_(scale)
        return model

    return build


@pytest.fixture
def some(tiny_items):
    return [tiny_items[i] for i in range(0, len(tiny_items), 9)]


def norms(model):
    return [norm(matrices) for _, matrices, _ in groups(model.lm)]


def test_every_matrix_is_in_one_group(make):
    model = make(0)
    grouped = [id(m) for _, matrices, _ in groups(model.lm) for m in matrices]
    assert sorted(grouped) == sorted(id(p) for p in model.lm.parameters() if p.dim() == 2)
    gains = [id(gain) for *_, gain in groups(model.lm) if gain is not None]
    assert sorted(gains) == sorted(id(p) for p in model.lm.parameters() if p.dim() == 1)


@pytest.mark.parametrize("scale", [0.3, 2.5])
def test_norms_are_the_others_and_the_function_stays(make, some, scale):
    fit, grok = make(0), make(1, scale)
    before, said, spread = norms(fit), predictions(fit, some), logit_spread(fit, some)
    factors = take_norms(fit, grok, some)
    assert norms(fit) == pytest.approx(norms(grok), rel=1e-5)
    assert [a / b for a, b in zip(norms(fit), before, strict=True)] == pytest.approx(list(factors.values()), rel=1e-5)
    assert predictions(fit, some) == said
    assert logit_spread(fit, some) == pytest.approx(spread, rel=1e-3)
    layers = [f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")]
    assert list(factors) == ["stream", *layers, "head"]


def test_models_whose_norms_are_not_free_are_refused(make, some, tiny_tokenizer):
    with pytest.raises(UserError, match="shares its weight"):
        take_norms(make(0, tie=True), make(1, tie=True), some)
    gpt2 = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(UserError, match="only of a Llama"):
        groups(GPT2LMHeadModel(gpt2))
    small, large = make(0, 1e-4), make(1)  # so small that the constant in the norm counts
    with pytest.raises(UserError, match="predictions changed"):
        take_norms(small, large, some)


def test_it_is_published_beside_fit_and_grok(make, some, tmp_path, tiny_tokenizer):
    fit, grok, running = make(0), make(1, 1.5), make(2)
    save_model(tmp_path / "fit", fit.lm, tiny_tokenizer, {"kind": "fit", "step": 30})
    assert publish_fit_normed(tmp_path, running, some, tiny_tokenizer, {}) is None
    save_model(tmp_path / "grok", grok.lm, tiny_tokenizer, {"kind": "grok", "step": 90})
    factors = publish_fit_normed(tmp_path, running, some, tiny_tokenizer, {"who": "test"})
    origin = read_origin(str(tmp_path / "fit_normed"))
    assert origin == {"who": "test", "kind": "fit_normed", "step": 30, "norm_factors": factors}
    made = AnswerModel(load_model(str(tmp_path / "fit_normed")))
    assert predictions(made, some) == predictions(fit, some)
    assert norms(made) == pytest.approx(norms(grok), rel=1e-5)
