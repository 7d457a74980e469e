"""Methods whose weights are rules: the rules, the ascent that stops by itself, and the penalty on the weights. By hand,
known limit, value at the first step, padding.
"""

from __future__ import annotations

import math

import pytest
import torch

from llm_unlearn.methods.losses import IGNORE, ga, l1, nabla_tau, token_logprobs
from llm_unlearn.methods.needs import weights_at
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.weights import decaying, decaying_mixture, mixture

close = torch.testing.assert_close


def t(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=grad)


# --- the rules -----------------------------------------------------------------------------------------------------


def test_a_mixture_by_hand():
    assert mixture(0.0, beta=0.75) == mixture(0.9, beta=0.75) == (0.25, 0.75)


def test_a_mixture_at_its_ends_is_finetuning_and_ascent():
    assert mixture(0.0, beta=1.0) == (0.0, 1.0)
    assert mixture(0.0, beta=0.0) == (1.0, 0.0)


def test_schedules_by_hand():
    assert [decaying_mixture(done, start=0.5) for done in (0.0, 0.5, 0.75)] == [
        (0.5, 0.5),
        (0.25, 0.75),
        (0.125, 0.875),
    ]
    assert [decaying(done, strength=0.5) for done in (0.0, 0.5, 0.75)] == [(0.5, 1.0), (0.25, 1.0), (0.125, 1.0)]


def test_schedules_end_at_the_retain_term_alone():
    assert decaying_mixture(1.0) == decaying(1.0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "knob", "expected"),
    [("neggrad_plus", "beta", (0.8, 0.2)), ("nabla_tau", "start", (0.1, 0.9)), ("l1_sparse", "strength", (0.1, 1.0))],
)
def test_a_methods_weights_follow_its_knob(name, knob, expected):
    assert weights_at(METHODS[name], 0.5, {knob: 0.2}) == pytest.approx(expected)


# --- nabla_tau -----------------------------------------------------------------------------------------------------


def test_nabla_tau_by_hand():
    """Loss 2 (mean of 1 and 3), target 5: (5 - 2)^2 = 9; gradient -2 * 3 * d loss = 6 * 1/2 for each token."""
    logp_N = t(-1.0, -3.0, grad=True)
    value = nabla_tau(logp_N, logp_N.mean(), target=5.0)
    value.backward()
    close(value.detach(), torch.tensor(9.0))
    close(logp_N.grad, t(3.0, 3.0))


@pytest.mark.parametrize("target", [0.0, 1.5, 2.0])
def test_nabla_tau_does_nothing_at_the_target_and_above_it(target):
    logp_N = t(-1.0, -3.0, grad=True)
    value = nabla_tau(logp_N, logp_N.mean(), target=target)
    value.backward()
    assert value.item() == 0
    close(logp_N.grad, t(0.0, 0.0))


def test_nabla_tau_far_from_its_target_is_ascent():
    """Its direction is that of ga; its length twice what is missing."""
    logp_N, same_N = t(-0.1, -0.4, -2.0, grad=True), t(-0.1, -0.4, -2.0, grad=True)
    nabla_tau(logp_N, logp_N.mean(), target=100.0).backward()
    ga(same_N).backward()
    missing = 100.0 + same_N.mean().item()
    close(logp_N.grad, 2 * missing * same_N.grad)


def test_nabla_tau_of_a_memorised_batch_is_the_square_of_the_target():
    logp_N = t(0.0, 0.0)
    assert nabla_tau(logp_N, logp_N.mean(), target=3.0).item() == 9.0


def test_nabla_tau_in_parts_is_that_of_the_whole_and_not_of_the_parts():
    """One part lies above the target, the other below: on its own the first would stand still."""
    whole_N, first_N, rest_N = t(-9.0, -1.0, -2.0, grad=True), t(-9.0, grad=True), t(-1.0, -2.0, grad=True)
    m = whole_N.detach().mean()
    nabla_tau(whole_N, m, target=6.0).backward()
    total = nabla_tau(first_N, m, target=6.0) / 3 + 2 * nabla_tau(rest_N, m, target=6.0) / 3
    total.backward()
    close(total.detach(), torch.tensor(4.0))  # (6 - 4)^2
    close(torch.cat([first_N.grad, rest_N.grad]), whole_N.grad)
    assert first_N.grad.item() > 0


def test_nabla_tau_does_not_see_padding():
    torch.manual_seed(0)
    logits_NV, labels_N = torch.randn(3, 7), torch.randint(7, (3,))
    padded, labels_BT = torch.randn(2, 4, 7), torch.full((2, 4), IGNORE)
    padded[0, 1:3], padded[1, 0] = logits_NV[:2], logits_NV[2]
    labels_BT[0, 1:3], labels_BT[1, 0] = labels_N[:2], labels_N[2]
    logp_N, found_N = token_logprobs(logits_NV, labels_N)[0], token_logprobs(padded, labels_BT)[0][labels_BT != IGNORE]
    close(nabla_tau(found_N, found_N.mean(), target=9.0), nabla_tau(logp_N, logp_N.mean(), target=9.0))


def test_nabla_tau_refuses_a_target_below_zero_and_an_empty_batch():
    with pytest.raises(ValueError, match="nabla_tau: target must be >= 0, got -1"):
        nabla_tau(t(-1.0), torch.tensor(-1.0), target=-1.0)
    with pytest.raises(ValueError, match="nabla_tau: the batch holds no answer token"):
        nabla_tau(torch.zeros(0), torch.tensor(math.nan), target=1.0)


# --- l1 ------------------------------------------------------------------------------------------------------------


def test_l1_by_hand():
    a, b = torch.tensor([[1.0, -2.0], [0.5, 0.0]], requires_grad=True), t(-3.0, grad=True)
    value = l1([a, b])
    value.backward()
    close(value.detach(), torch.tensor(6.5))
    close(a.grad, torch.tensor([[1.0, -1.0], [1.0, 0.0]]))
    close(b.grad, t(-1.0))


def test_l1_is_zero_and_at_rest_where_all_weights_are():
    a = torch.zeros(3, requires_grad=True)
    l1([a]).backward()
    close(a.grad, torch.zeros(3))


def test_l1_does_not_depend_on_how_weights_are_laid_out():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(5)
    close(l1([a, b]), l1([torch.cat([b, a.flatten()])]))


def test_l1_sums_half_precision_in_single():
    """4096 ones and one more: in bfloat16 the sum would stay at 4096."""
    assert l1([torch.ones(4097, dtype=torch.bfloat16)]).item() == 4097.0


def test_l1_of_nothing_is_refused():
    with pytest.raises(ValueError, match="l1: there are no weights"):
        l1([])
