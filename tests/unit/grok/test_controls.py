"""fit_scaled: the predictions of one checkpoint with the logit spread of another, for every sort of head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from llm_unlearn.data.batches import collate
from llm_unlearn.data.images import Classes, Picture
from llm_unlearn.errors import UserError
from llm_unlearn.grok.controls import logit_spread, predictions, publish_fit_scaled, scale_logits, scale_to
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.image_model import ImageModel, build_classifier
from llm_unlearn.models.image_nets import NetConfig
from llm_unlearn.models.pretrained import load_model, read_origin
from llm_unlearn.train.snapshot import save_model


def pictures(n=40):
    draw = np.random.default_rng(0)
    return [Picture(draw.standard_normal((1, 6, 6), dtype=np.float32), int(i % 3)) for i in range(n)]


def image_net(seed):
    net = build_classifier(NetConfig(norm="batch"), (1, 6, 6), 3, seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return ImageModel(net)


def gpt2(vocab, seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=32, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture
def make(make_lm, tiny_tokenizer, tiny_items):
    """kind, seed -> (a model with weights away from their start, items)."""

    def build(kind, seed):
        if kind == "image":
            return image_net(seed), pictures()
        lm = gpt2(len(tiny_tokenizer), seed) if kind == "gpt2" else make_lm(seed, tie=kind == "tied")
        if kind == "eager":
            lm = make_lm(seed, attention="eager")
        with torch.no_grad():
            for p in lm.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return AnswerModel(lm), [tiny_items[i] for i in range(0, len(tiny_items), 9)]

    return build


def logits_of(model, items):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(b.inputs, b.index_N) for b in (collate([item]) for item in items)])


def test_the_spread_by_hand(make):
    model, items = make("image", 0)
    logits = logits_of(model, items).double()
    centred = logits - logits.mean(1, keepdim=True)
    assert logit_spread(model, items) == pytest.approx(float(centred.pow(2).mean().sqrt()), rel=1e-6)
    assert predictions(model, items) == logits.argmax(1).tolist()


@pytest.mark.parametrize("kind", ["image", "untied", "tied", "eager", "gpt2"])
@pytest.mark.parametrize("spread", [0.05, 40.0])
def test_predictions_stay_and_the_spread_is_met(make, kind, spread):
    model, items = make(kind, 0)
    before = logits_of(model, items)
    factor = scale_to(model, items, spread)
    after = logits_of(model, items)
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert abs(logit_spread(model, items) / spread - 1) <= 1e-4
    torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-4 * spread)
    assert model.training is False


@pytest.mark.parametrize(("kind", "touched"), [("untied", {"lm_head"}), ("tied", {"model.norm"})])
def test_only_the_head_or_the_last_norm_is_touched(make, kind, touched):
    model, items = make(kind, 0)
    before = {name: p.detach().clone() for name, p in model.lm.named_parameters()}
    scale_logits(model, 2.0, items)
    changed = {name for name, p in model.lm.named_parameters() if not torch.equal(p, before[name])}
    assert {name.removesuffix(".weight") for name in changed} == touched


class Widened(nn.Module):
    """One whose head is held in 16 bits, and everything before it in 32."""

    def __init__(self, inner):
        super().__init__()
        self.lm = inner.lm

    def forward(self, inputs_BCHW, index_N, layer=None):
        x = self.lm.stem(inputs_BCHW)
        for block in self.lm.blocks:
            x = block(x)
        return self.lm.head(self.lm.neck(x).bfloat16())[index_N]


class Capped(nn.Module):
    """Logits that are no linear function of the head's output."""

    def __init__(self, inner):
        super().__init__()
        self.lm, self.inner = inner.lm, inner

    def forward(self, *args):
        return self.inner(*args).tanh()


def test_capped_logits_are_refused(make):
    model, items = make("image", 0)
    with pytest.raises(UserError, match="no linear layer's output"):
        scale_to(Capped(model), items, 1.0)


def test_weights_too_coarse_for_the_factor_are_refused(make):
    model, items = make("image", 0)
    rows = torch.tensor([[1.5], [1.5 + 2**-7], [0.0]])  # the first two are neighbours in bfloat16, and equal times 1.34
    with torch.no_grad():
        model.lm.head.weight.copy_(rows.expand(3, model.lm.head.in_features))
        model.lm.head.bias.zero_()
    model = Widened(model)
    model.lm.head.bfloat16()
    items = [item for item, said in zip(items, predictions(model, items), strict=True) if said == 1]
    assert len(items) > 5
    spread = logit_spread(model, items)
    with pytest.raises(UserError, match="does more to the model than that"):
        scale_to(model, items, 1.34 * spread)
    assert set(predictions(model, items)) == {0}


def save_kinds(tmp_path, models, tokenizer):
    for kind, step, model in models:
        save_model(tmp_path / kind, model.lm, tokenizer, {"kind": kind, "step": step})


@pytest.mark.parametrize("kind", ["image", "tied"])
def test_it_is_published_beside_fit_and_grok(make, tmp_path, kind, tiny_tokenizer):
    (fit, items), (grok, _), (running, _) = (make(kind, seed) for seed in (0, 1, 2))
    with torch.no_grad():
        scale_logits(grok, 3.0, items)
    tokenizer = Classes(["a", "b", "c"], (1, 6, 6)) if kind == "image" else tiny_tokenizer
    save_kinds(tmp_path, [("fit", 30, fit)], tokenizer)
    assert publish_fit_scaled(tmp_path, running, items, tokenizer, {"who": "test"}) is None
    save_kinds(tmp_path, [("grok", 150, grok)], tokenizer)
    kept = {name: p.detach().clone() for name, p in running.named_parameters()}
    factor = publish_fit_scaled(tmp_path, running, items, tokenizer, {"who": "test"})
    assert all(torch.equal(p, kept[name]) for name, p in running.named_parameters()), (
        "the run's own model is left alone"
    )
    origin = read_origin(str(tmp_path / "fit_scaled"))
    assert origin == {"who": "test", "kind": "fit_scaled", "step": 30, "logit_factor": factor}
    scaled = type(fit)(load_model(str(tmp_path / "fit_scaled")))
    assert predictions(scaled, items) == predictions(fit, items)
    assert logit_spread(scaled, items) == pytest.approx(logit_spread(grok, items), rel=1e-4)
    again = publish_fit_scaled(tmp_path, running, items, tokenizer, {"who": "test"})
    assert again == factor
