"""Modules against masks and gradients written out by hand; what the model of p * rho says where it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llm_unlearn.data.batches import collate
from llm_unlearn.data.schema import QARow
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes import modules
from llm_unlearn.eval.probes.modules import module_overlap
from llm_unlearn.models.causal import AnswerModel


def by_hand(net, item):
    """Attribution of the seven hidden neurons, and the gradient of the first layer's weights, by the chain rule."""
    _, first, _, second = net.lm
    with torch.no_grad():
        x = torch.from_numpy(item.pixels).flatten().double()
        z = first.weight.double() @ x + first.bias.double()
        h = z.clamp(min=0)
        push = (second.weight.double() @ h + second.bias.double()).softmax(0)
        push[item.label] -= 1
        back = second.weight.double().T @ push
    return (h * back).abs().numpy(), torch.outer(back * (z > 0), x).numpy()


def test_overlap_and_correlations_are_those_of_the_chain_rule(two_layers, pictures, picture_rows):
    items = pictures(8, 3)
    rows = picture_rows(items)
    found = module_overlap(two_layers, items, rows, 3, top=3 / 7)
    scores, grads = zip(*(by_hand(two_layers, item) for item in items), strict=True)
    masks = [{j for j in np.argsort(-s)[:3] if s[j] > 0} for s in scores]
    assert min(map(len, masks)) < 3, "one has fewer neurons at work"

    def cos(i, k, at):
        a, b = grads[i][at].ravel(), grads[k][at].ravel()
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    pairs = [(i, k) for i in range(8) for k in range(i + 1, 8)]
    shared = {p: sorted(masks[p[0]] & masks[p[1]]) for p in pairs}
    overlap = np.mean([len(shared[i, k]) * (1 / len(masks[i]) + 1 / len(masks[k])) / 2 for i, k in pairs])
    rho = np.mean([cos(*p, shared[p]) for p in pairs if shared[p]])
    whole = found["by"]["all"]
    assert whole["overlap"] == pytest.approx(overlap)
    assert whole["rho"] == pytest.approx(rho, abs=1e-5)
    assert whole["predicted"] == pytest.approx(overlap * rho, abs=1e-5)
    assert whole["measured"] == pytest.approx(np.mean([cos(*p, range(7)) for p in pairs]), abs=1e-5)
    assert (found["neurons"], found["items"], whole["pairs"]) == (7, 8, 28)
    assert {k: found["by"][k]["pairs"] for k in ("FF", "FR", "RR")} == {"FF": 3, "FR": 15, "RR": 10}


def test_masks_at_random_overlap_by_their_share(two_layers, pictures, picture_rows):
    items = pictures(30, 1)
    low, middle, high = module_overlap(two_layers, items, picture_rows(items), 10, top=2 / 7)["null_overlap"]
    assert low < 2 / 7 < high
    assert middle == pytest.approx(2 / 7, abs=0.05)


def test_where_modules_are_what_the_model_says_the_product_is_the_correlation(monkeypatch):
    """Items that switch 40 of 100 modules on at random; gradients in an active one share a direction with rho .6."""
    draw, rho, m, d = np.random.default_rng(0), 0.6, 100, 300
    n, common = 40, draw.standard_normal((100, 300))
    found = {}
    for i in range(n):
        mask = np.zeros(m, dtype=bool)
        mask[draw.permutation(m)[:40]] = True
        g = (np.sqrt(rho) * common + np.sqrt(1 - rho) * draw.standard_normal((m, d))) * mask[:, None]
        found[i] = torch.from_numpy(mask + 0.01 * draw.random(m)).float(), [torch.from_numpy(g).float()]
    monkeypatch.setattr(modules, "_attributed", lambda _model, item: found[item])
    monkeypatch.setattr(modules, "_feeding", lambda _model, _item: [nn.Linear(1, 1)])
    rows = [QARow(f"q{i}", "a") for i in range(n)]
    whole = module_overlap(nn.Identity(), list(range(n)), rows, 20, top=0.4)["by"]["all"]  # pyright: ignore
    assert whole["overlap"] == pytest.approx(0.4, abs=0.01)
    assert whole["rho"] == pytest.approx(0.6, abs=0.01)
    assert whole["measured"] == pytest.approx(whole["predicted"], abs=0.01)


def test_a_gated_mlp_s_neurons_are_those_of_the_product(tiny_lm, tiny_items, tiny_world):
    """act * gradient at the gate's activation is that of the neuron that down_proj reads."""
    model, item = AnswerModel(tiny_lm).eval(), tiny_items[0]
    seen = []
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
             for layer in tiny_lm.model.layers]  # fmt: skip
    batch = collate([item])
    loss = nn.functional.cross_entropy(model(batch.inputs, batch.index_N), batch.labels_N)
    slopes = torch.autograd.grad(loss, seen)
    for hook in hooks:
        hook.remove()
    expected = torch.cat([(h * g).flatten(0, -2).sum(0).abs() for h, g in zip(seen, slopes, strict=True)])
    scores, rows = modules._attributed(model, item)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-7)
    gate = tiny_lm.model.layers[0].mlp.gate_proj.weight
    assert [tuple(r.shape) for r in rows] == [tuple(gate.shape)] * 2
    found = module_overlap(model, tiny_items[:12], tiny_world.split("train")[:12], 4)
    assert found["neurons"] == 2 * gate.shape[0]
    assert all(0 <= v["overlap"] <= 1 and abs(v["measured"]) <= 1 for v in found["by"].values())


def test_long_gradients_are_read_of_fewer_items(two_layers, pictures, picture_rows, monkeypatch):
    monkeypatch.setattr(modules, "EXACT_FLOATS", 84 * 10)  # of 7 x 12 weights
    items = pictures(30)
    found = module_overlap(two_layers, items, picture_rows(items), 6)
    assert found["items"] == 10
    assert found["by"]["FF"]["pairs"] == 10, "5 to forget"


def test_a_model_whose_activations_read_something_else_is_refused(fake_images, pictures, picture_rows):
    net = fake_images(nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(UserError, match="modules: no activation function"):
        module_overlap(net, pictures(8), picture_rows(pictures(8)), 4)
