"""Local complexity where hyperplanes are known, against an evaluation written out, and as a penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_unlearn.data.images import Picture
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.complexity import local_complexity
from llm_unlearn.methods import complexity as penalty
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.models.preactivations import activation_modules, orthonormal, preactivations

DISTANCES = np.array([0.001, 0.002, 0.004, 0.008, 0.03, 0.2])


def thresholds(fake_images, places, weight=1.0):
    """A net whose hidden neuron i has its hyperplane at x = places[i], of a single pixel x."""
    first, second = nn.Linear(1, len(places)), nn.Linear(len(places), 2)
    with torch.no_grad():
        first.weight.fill_(weight)
        first.bias.copy_(torch.tensor(-weight * np.asarray(places), dtype=torch.float32))
    return fake_images(nn.Flatten(), first, nn.ReLU(), second)


def pixel(*values):
    return [Picture(np.full((1, 1, 1), v, dtype=np.float32), 0) for v in values]


@pytest.mark.parametrize("radius", [0.0005, 0.0015, 0.003, 0.005, 0.01, 0.1, 1.0])
def test_the_count_is_that_of_hyperplanes_within_the_radius(fake_images, radius):
    """In one dimension the neighbourhood is [x - r, x + r], and what cuts it is known."""
    model = thresholds(fake_images, 0.5 + DISTANCES)
    found = local_complexity(model, pixel(0.5), radius=radius)
    assert found["lc"] == (DISTANCES < radius).sum()
    assert found["directions"] == 1, "no more than the dimension"
    assert found["share"] == pytest.approx((DISTANCES < radius).mean())


def test_it_is_the_mean_over_inputs(fake_images):
    model = thresholds(fake_images, 0.5 + DISTANCES)
    found = local_complexity(model, pixel(0.5, 0.9, 0.53), radius=0.005)
    counts = [(np.abs(0.5 + DISTANCES - x) < 0.005).sum() for x in (0.5, 0.9, 0.53)]
    assert found["lc"] == pytest.approx(np.mean(counts))
    assert found["se"] == pytest.approx(np.std(counts, ddof=1) / 3**0.5)


def test_axis_aligned_hyperplanes_in_many_dimensions(fake_images):
    """Neuron i cuts where its distance is below r times the largest component of a direction along axis i."""
    d = 16
    first = nn.Linear(d, d)
    with torch.no_grad():
        first.weight.copy_(torch.eye(d))
        first.bias.copy_(torch.linspace(0.0005, 0.008, d))  # distances from the origin
    model = fake_images(nn.Flatten(), first, nn.ReLU(), nn.Linear(d, 2))
    origin = [Picture(np.zeros((1, 4, 4), dtype=np.float32), 0)]
    for n in (4, 16, 25):
        reach = orthonormal((1, 4, 4), n, 7).flatten(1).abs().amax(0).numpy()
        found = local_complexity(model, origin, radius=0.01, n_directions=n, seed=7)
        assert found["lc"] == (np.linspace(0.0005, 0.008, d) < 0.01 * reach).sum()
        assert 0 < found["lc"] < d


def test_layers_add_up_and_logits_are_no_layer(fake_images):
    torch.manual_seed(0)
    model = fake_images(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.GELU(), nn.Linear(20, 3))
    draw = np.random.default_rng(0)
    items = [Picture(draw.normal(size=(1, 3, 4)).astype(np.float32), 0) for _ in range(5)]
    found = local_complexity(model, items, radius=0.5)
    assert {name: layer["neurons"] for name, layer in found["per_layer"].items()} == {"lm.2": 30, "lm.4": 20}
    assert found["lc"] == pytest.approx(sum(layer["lc"] for layer in found["per_layer"].values()))
    assert all(layer["share"] == layer["lc"] / layer["neurons"] for layer in found["per_layer"].values())


def test_convolutions_count_every_place(fake_images):
    torch.manual_seed(0)
    model = fake_images(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    items = [Picture(np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32), 0)]
    assert local_complexity(model, items, radius=0.1)["per_layer"]["lm.1"]["neurons"] == 4 * 3 * 4


def test_a_relative_radius_does_not_mind_the_scale_of_inputs(fake_images):
    """Pixels and hyperplanes ten times as far apart: the same count at relative r, fewer at absolute r."""
    places, x = 0.5 + DISTANCES, 0.5
    near, far = thresholds(fake_images, places), thresholds(fake_images, 10 * places)
    counts = [local_complexity(m, pixel(k * x), radius=0.01, relative=True) for m, k in ((near, 1), (far, 10))]
    assert counts[0]["lc"] == counts[1]["lc"] == (DISTANCES < 0.005).sum()
    assert counts[1]["radius"] == pytest.approx(10 * counts[0]["radius"])
    assert local_complexity(far, pixel(10 * x), radius=0.005)["lc"] < counts[0]["lc"]


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), radii=st.lists(st.floats(1e-3, 2), min_size=2, max_size=5))
def test_it_grows_with_the_radius_and_does_not_mind_the_scale_of_weights(scale, radii):
    model = _random_net(0)
    items = [Picture(np.random.default_rng(i).normal(size=(1, 3, 4)).astype(np.float32), 0) for i in range(3)]
    counts = [local_complexity(model, items, radius=r, float64=True)["lc"] for r in sorted(radii)]
    assert counts == sorted(counts), "one hidden layer: a wider neighbourhood holds the narrower"
    with torch.no_grad():
        for w in model.lm[1].parameters():
            w.mul_(scale)
    again = [local_complexity(model, items, radius=r, float64=True)["lc"] for r in sorted(radii)]
    assert again == pytest.approx(counts, abs=0.34), "rounding may move one neuron of one picture over the border"


def _random_net(seed):
    from tests.unit.eval.probes.conftest import FakeImages

    torch.manual_seed(seed)
    return FakeImages(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))


def test_directions_are_orthonormal_and_seeded():
    u = orthonormal((3, 8), 10, 0).flatten(1)
    torch.testing.assert_close(u @ u.T, torch.eye(10, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(u, orthonormal((3, 8), 10, 0).flatten(1))
    assert not torch.allclose(u, orthonormal((3, 8), 10, 1).flatten(1))
    assert orthonormal((2,), 10, 0).shape == (2, 2)


def test_of_a_language_model_as_written_out(tiny_lm, tiny_items):
    """Item by item through `inputs_embeds`, without any of our model code."""
    model, radius = AnswerModel(tiny_lm), 0.02
    some = [*tiny_items[:3], *tiny_items[-3:]]
    lengths = {item.n_inputs for item in some}
    assert len(lengths) > 1
    found = local_complexity(model, some, radius=radius, n_directions=6, seed=5, float64=True)
    lm = tiny_lm.double()
    acts = [layer.mlp.act_fn for layer in lm.model.layers]
    counts = []
    for item in some:
        base = lm.model.embed_tokens(torch.from_numpy(item.ids[:-1])[None]).detach()
        at = []
        for u in orthonormal((item.n_inputs, base.shape[-1]), 6, 5):
            for sign in (1, -1):
                seen = []
                hooks = [
                    act.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0])) for act in acts
                ]
                with torch.no_grad():
                    lm(inputs_embeds=base + sign * radius * u)
                for hook in hooks:
                    hook.remove()
                at.append(torch.cat([z[0, item.start - 1 :] for z in seen], 1).sign())
        counts.append(float((torch.stack(at) != at[0]).any(0).sum(1).double().mean()))
    assert found["lc"] == pytest.approx(np.mean(counts), abs=1e-12)
    assert found["lc"] > 0
    assert sum(layer["neurons"] for layer in found["per_layer"].values()) == 2 * 64


def test_a_model_that_runs_its_last_layer_everywhere_counts_the_same(make_lm, tiny_items):
    plain, eager = AnswerModel(make_lm(0)), AnswerModel(make_lm(0, attention="eager"))
    assert plain.plain_last_layer
    assert not eager.plain_last_layer
    counts = [local_complexity(m, tiny_items[:8], radius=0.05, float64=True)["per_layer"] for m in (plain, eager)]
    assert counts[0] == counts[1]


def test_it_does_not_depend_on_neighbours_in_a_batch(tiny_lm, tiny_items):
    model = AnswerModel(tiny_lm)
    some = tiny_items[:10]
    alone = [local_complexity(model, [item], radius=0.05, float64=True)["lc"] for item in some]
    assert local_complexity(model, some, radius=0.05, float64=True)["lc"] == pytest.approx(np.mean(alone))
    assert next(model.parameters()).dtype == torch.float32, "the copy is double, the model stays"


def test_a_module_used_twice_is_two_layers(fake_images):
    relu = nn.ReLU()
    model = fake_images(nn.Flatten(), nn.Linear(12, 5), relu, nn.Linear(5, 4), relu, nn.Linear(4, 2))
    seen = preactivations(model, torch.randn(2, 1, 3, 4), torch.arange(2))
    assert {name: tuple(z.shape) for name, z in seen.items()} == {"lm.2": (2, 5), "lm.2#2": (2, 4)}


def test_bad_use_is_told(fake_images, pictures):
    plain = fake_images(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(UserError, match="has no activation modules"):
        local_complexity(plain, pictures(2))
    with pytest.raises(UserError, match="has no activation modules"):
        activation_modules(plain)
    with pytest.raises(UserError, match="radius must be > 0"):
        local_complexity(thresholds(fake_images, [0.0]), pixel(0.0), radius=0.0)
    with pytest.raises(UserError, match="no items"):
        local_complexity(plain, [])


def test_one_vertex_has_nothing_to_differ_from():
    with pytest.raises(ValueError, match="at least 2 vertices"):
        penalty.crossed(torch.zeros(1, 3))
