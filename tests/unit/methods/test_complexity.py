"""The penalty on local complexity: against a calculation by hand, free of scale, and the sum of its parts."""

from __future__ import annotations

import pytest
import torch

from llm_unlearn.methods.complexity import complexity_penalty


def test_by_hand():
    # rms of (3, 4, 0, 0) is 2.5: |z| / rms = 1.2, 1.6, 0, 0; of the second item 1 everywhere
    z = torch.tensor([[3.0, -4.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]])
    first, second = (0.0 + 0.0 + 1.2 + 1.2) / 4 + 0.0, 0.2
    assert complexity_penalty([z], 1.2).item() == pytest.approx((first + second) / 2)
    other = torch.full((2, 3), -5.0)
    assert complexity_penalty([z, other], 1.2).item() == pytest.approx(((first + second) / 2 + 0.2) / 2)
    assert complexity_penalty([other], 0.9).item() == 0


def test_it_is_free_of_each_layers_scale_and_of_the_neurons_shape():
    torch.manual_seed(0)
    conv, dense = torch.randn(5, 4, 3, 3), torch.randn(5, 7)
    value = complexity_penalty([conv, dense], 0.5)
    assert 0 < value < 0.5
    torch.testing.assert_close(complexity_penalty([100 * conv, 0.01 * dense], 0.5), value)
    torch.testing.assert_close(complexity_penalty([conv.flatten(1), dense], 0.5), value)


def test_parts_of_a_batch_add_up_and_16_bits_are_read_as_32():
    torch.manual_seed(0)
    layers = [torch.randn(6, 8), torch.randn(6, 2, 2, 2)]
    whole = complexity_penalty(layers, 0.5)
    parts = [complexity_penalty([z[i : i + n] for z in layers], 0.5) * n / 6 for i, n in ((0, 2), (2, 4))]
    torch.testing.assert_close(sum(parts), whole)
    assert complexity_penalty([z.bfloat16() for z in layers], 0.5).dtype == torch.float32


def test_descent_takes_items_away_from_the_hyperplanes():
    torch.manual_seed(0)
    z = torch.randn(4, 32, requires_grad=True)
    before = (z / z.square().mean(1, keepdim=True).sqrt()).abs().lt(0.5).sum()
    optimizer = torch.optim.SGD([z], lr=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        complexity_penalty([z], 0.5).backward()
        optimizer.step()
    assert complexity_penalty([z], 0.5) < 0.01
    assert (z / z.square().mean(1, keepdim=True).sqrt()).abs().lt(0.4).sum() == 0 < before


def test_dead_items_have_a_finite_gradient():
    z = torch.zeros(2, 3, requires_grad=True)
    value = complexity_penalty([z], 0.5)
    value.backward()
    assert value.item() == 0.5
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(("layers", "margin"), [([], 0.5), ([torch.ones(1, 1)], 0.0)])
def test_refusals(layers, margin):
    with pytest.raises(ValueError, match="want pre-activations and margin > 0"):
        complexity_penalty(layers, margin)
