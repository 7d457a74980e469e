"""Hessian-vector products, eigenvalue and trace against the dense Hessian of a tiny net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from llm_unlearn.data.batches import collate
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.curvature import (
    Hessian,
    curvature,
    mean_loss,
    temperature_for_loss,
    top_eigenvalue,
    trace,
)
from llm_unlearn.models.causal import AnswerModel


def dense(model, items, temperature=1.0):
    """The whole Hessian, by differentiating the loss as a function of one flat vector."""
    names, sizes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    batch = collate(items)
    inputs = batch.inputs.double() if batch.inputs.is_floating_point() else batch.inputs

    def loss(vector):
        parts = vector.split([size.numel() for size in sizes])
        weights = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        logits = functional_call(model, weights, (inputs, batch.index_N))
        return torch.nn.functional.cross_entropy(logits / temperature, batch.labels_N)

    return torch.autograd.functional.hessian(loss, flat)


@pytest.fixture
def net(two_layers):
    return two_layers


def test_products_eigenvalue_and_trace_are_those_of_the_dense_hessian(net, pictures):
    items = pictures(20)
    h = dense(net, items)
    values = torch.linalg.eigvalsh(h)
    hessian = Hessian(net, items)
    v = hessian.draw(torch.Generator().manual_seed(1), signs=False)
    flat = torch.cat([x.flatten() for x in v]).double()
    torch.testing.assert_close(torch.cat([x.flatten() for x in hessian(v)]).double(), h @ flat, rtol=1e-4, atol=1e-6)
    top = top_eigenvalue(hessian, iterations=200, tolerance=1e-6)
    assert top["converged"]
    assert top["value"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert top["residual"] < 0.05
    found = trace(hessian, samples=400)
    assert abs(found["value"] - float(h.trace())) < 4 * found["se"]
    # the variance of z'Hz is twice the sum of squares off the diagonal
    off = 2 * (h.square().sum() - h.diagonal().square().sum())
    assert found["se"] == pytest.approx(float(off / 400) ** 0.5, rel=0.2)


def test_of_a_language_model_whose_kernel_has_no_second_derivative(make_lm, tiny_items):
    torch.manual_seed(0)
    lm = make_lm(0, hidden=8, layers=1, heads=1, ff=8)
    model = AnswerModel(lm)
    for p in lm.parameters():
        p.requires_grad_(False)
    for p in lm.model.layers[0].self_attn.parameters():  # 256 weights: the dense Hessian is quick
        p.requires_grad_(True)
        p.data.mul_(20)
    items = tiny_items[:6]
    top = top_eigenvalue(Hessian(model, items), iterations=300, tolerance=1e-7)
    attention = [p for p in lm.parameters() if p.requires_grad]

    def loss(*weights):
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        batch = collate(items)
        logits = functional_call(model, dict(zip(names, weights, strict=True)), (batch.inputs, batch.index_N))
        return torch.nn.functional.cross_entropy(logits, batch.labels_N)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        blocks = torch.autograd.functional.hessian(loss, tuple(attention))
    n = [p.numel() for p in attention]
    h = torch.cat([torch.cat([b.reshape(n[i], n[j]) for j, b in enumerate(row)], 1) for i, row in enumerate(blocks)])
    assert top["value"] == pytest.approx(float(torch.linalg.eigvalsh(h.double())[-1]), rel=1e-2)


class Quadratic(Hessian):
    """A Hessian that is given."""

    def __init__(self, matrix):
        self.matrix, self.weights, self.products = matrix, [torch.zeros(len(matrix), dtype=matrix.dtype)], 0

    def __call__(self, vector):
        self.products += 1
        return [self.matrix @ vector[0]]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=8), seed=st.integers(0, 100))
def test_the_largest_eigenvalue_is_found_where_the_smallest_is_of_larger_modulus(values, seed):
    values = sorted(values)
    ahead = values[-1] - values[-2]
    assume(abs(values[-1]) > 0.1 and ahead > 0.05 * (values[-1] - values[0]))
    assume(abs(abs(values[-1]) - abs(values[0])) > 0.05 * max(abs(values[0]), abs(values[-1])))
    assume(abs(values[0]) <= abs(values[-1]) or values[1] - values[0] > 0.05 * (values[-1] - values[0]))
    q, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed)).double()
    )
    found = top_eigenvalue(
        Quadratic(q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T), iterations=3000, tolerance=1e-9
    )
    assert found["value"] == pytest.approx(values[-1], rel=1e-2, abs=1e-3)


def test_signs_give_the_trace_of_a_diagonal_hessian_exactly():
    found = trace(Quadratic(torch.diag(torch.tensor([1.0, -2.0, 5.0]))), samples=3)
    assert found == {"value": 4.0, "se": 0.0, "samples": 3}


def test_what_has_not_converged_says_so():
    found = top_eigenvalue(Quadratic(torch.diag(torch.tensor([1.0, 1.0001, -0.5]))), iterations=1)
    assert found == {**found, "converged": False, "iterations": 1}
    same = top_eigenvalue(Quadratic(torch.eye(5) * 3))
    assert same["value"] == pytest.approx(3)
    assert same["converged"]
    zero = top_eigenvalue(Quadratic(torch.zeros(4, 4)))
    assert zero["value"] == 0
    assert zero["converged"]


def test_at_a_matched_loss_it_is_the_hessian_of_tempered_logits(net, pictures):
    items = pictures(20)
    with torch.no_grad():
        batch = collate(items)
        logits = net(batch.inputs, batch.index_N)
    target = 1.09
    temperature = temperature_for_loss(logits, batch.labels_N, target)
    assert temperature > 1.1
    found = curvature(net, items, loss=target, iterations=200, tolerance=1e-6)
    assert found["temperature"] == temperature
    assert found["loss"] == pytest.approx(target, rel=1e-3)
    values = torch.linalg.eigvalsh(dense(net, items, temperature))
    assert found["top"]["value"] == pytest.approx(float(values[-1]), rel=1e-3)
    norm = sum(float(p.detach().square().sum()) for p in net.parameters())
    assert found["top_scaled"] == pytest.approx(found["top"]["value"] * norm, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.02, 0.98), scale=st.floats(0.1, 30), right=st.floats(0.3, 1))
def test_any_loss_between_the_bounds_is_reached(seed, share, scale, right):
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * draw.normal(size=(12, 5)))
    labels = torch.where(torch.from_numpy(draw.random(12) < right), logits.argmax(-1), logits.argmin(-1))
    grid = [mean_loss(logits, labels, beta) for beta in np.geomspace(1e-4, 1e3, 400)]
    target = min(grid) + share * (np.log(5) - min(grid))
    assume(target - min(grid) > 1e-3 and np.log(5) - target > 1e-3)
    temperature = temperature_for_loss(logits, labels, target)
    assert mean_loss(logits, labels, 1 / temperature) == pytest.approx(target, rel=2e-4)


def test_a_loss_out_of_reach_is_told():
    logits, labels = torch.eye(4), torch.arange(4)
    with pytest.raises(UserError, match=r"no temperature gives a mean loss of 1.5: it goes from .* to 1.386"):
        temperature_for_loss(logits, labels, 1.5)
    with pytest.raises(UserError, match="no temperature"):
        temperature_for_loss(-logits, labels, 1.0)
    with pytest.raises(UserError, match="at least 2 random vectors"):
        trace(Quadratic(torch.eye(2)), samples=1)
