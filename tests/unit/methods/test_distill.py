"""Losses on whole distributions: by hand, known limit, value at the first step, padding."""

from __future__ import annotations

import math

import pytest
import torch

from llm_unlearn.methods.distill import bad_teacher, distil, generic_targets, pdu, scrub, undial, whp
from llm_unlearn.methods.losses import IGNORE, kl, nll, token_logprobs
from llm_unlearn.methods.tokenwise import me

close = torch.testing.assert_close
LOG2, LOG3 = math.log(2), math.log(3)


def t(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=grad)


@pytest.fixture
def flat():
    """(logits, reference logits, labels, log-probabilities) of five answer tokens."""
    torch.manual_seed(0)
    logits_NV, ref_NV, labels_N = torch.randn(5, 7), torch.randn(5, 7), torch.randint(7, (5,))
    return logits_NV, ref_NV, labels_N, token_logprobs(logits_NV, labels_N)[0]


def padded(values_N, labels_N):
    """The same tokens as two rows of a padded batch, noise where there is no answer."""
    torch.manual_seed(1)
    out = torch.randn(2, 6, *values_N.shape[1:])
    labels_BT = torch.full((2, 6), IGNORE)
    out[0, 1:4], out[1, 0:2] = values_N[:3], values_N[3:]
    labels_BT[0, 1:4], labels_BT[1, 0:2] = labels_N[:3], labels_N[3:]
    return out[labels_BT != IGNORE], token_logprobs(out, labels_BT)[0][labels_BT != IGNORE]


# --- scrub -------------------------------------------------------------------------------------------------------


def test_scrub_by_hand():
    logits = torch.log(t(0.5, 0.5))[None]
    ref = torch.log(t(0.75, 0.25))[None]
    close(scrub(logits, ref), t(-(0.75 * math.log(1.5) + 0.25 * math.log(0.5)))[0])


def test_scrub_falls_without_bound_as_the_teachers_token_loses():
    ref = t(10.0, 0.0)[None]
    values = [scrub(t(-x, 0.0)[None], ref).item() for x in (0.0, 10.0, 100.0, 1000.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(-1000, rel=1e-2)


def test_scrub_is_zero_at_the_first_step_and_so_is_its_gradient(flat):
    logits_NV, *_ = flat
    student = logits_NV.clone().requires_grad_()
    value = scrub(student, logits_NV)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_scrub_does_not_see_padding(flat):
    logits_NV, ref_NV, labels_N, _ = flat
    close(scrub(padded(logits_NV, labels_N)[0], padded(ref_NV, labels_N)[0]), scrub(logits_NV, ref_NV))


# --- distil ------------------------------------------------------------------------------------------------------


def test_distil_by_hand():
    logits, ref = torch.log(t(0.5, 0.5))[None], torch.log(t(0.75, 0.25))[None]
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(distil(t(-LOG2), logits, ref, kl_weight=2.0, nll_weight=3.0), t(2 * divergence + 3 * LOG2)[0])


def test_distil_with_one_weight_zero_is_the_other_term(flat):
    logits_NV, ref_NV, _, logp_N = flat
    close(distil(logp_N, logits_NV, ref_NV, kl_weight=0.0, nll_weight=1.0), nll(logp_N))
    close(distil(logp_N, logits_NV, ref_NV, kl_weight=1.0, nll_weight=0.0), kl(logits_NV, ref_NV))


def test_distil_at_the_first_step_is_the_answers_loss(flat):
    logits_NV, _, _, logp_N = flat
    close(distil(logp_N, logits_NV, logits_NV, kl_weight=5.0, nll_weight=0.5), 0.5 * nll(logp_N))


def test_distil_does_not_see_padding(flat):
    logits_NV, ref_NV, labels_N, logp_N = flat
    wide_NV, wide_N = padded(logits_NV, labels_N)
    close(distil(wide_N, wide_NV, padded(ref_NV, labels_N)[0]), distil(logp_N, logits_NV, ref_NV))


# --- pdu ---------------------------------------------------------------------------------------------------------


def test_pdu_by_hand():
    close(pdu(torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, -2.0]])), t((4 + 1) / 2)[0])


def test_pdu_is_zero_for_uniform_predictions_whatever_their_level():
    close(pdu(torch.full((4, 9), 17.0)), t(0.0)[0])


def test_pdu_at_a_model_that_knows_pushes_the_likeliest_token_down():
    logits = t(8.0, 0.0, 0.0, 0.0, grad=True)
    value = pdu(logits[None])
    value.backward()
    assert value.item() == pytest.approx(36.0)
    close(logits.grad, 2 * 6.0 * t(0.75, -0.25, -0.25, -0.25))


def test_pdu_does_not_see_padding(flat):
    logits_NV, _, labels_N, _ = flat
    close(pdu(padded(logits_NV, labels_N)[0]), pdu(logits_NV))


def test_pdu_of_no_token_is_an_error():
    with pytest.raises(ValueError, match="pdu: the batch holds no answer token"):
        pdu(torch.zeros(0, 5))


# --- whp ---------------------------------------------------------------------------------------------------------


def test_whp_by_hand():
    close(whp(t(-LOG2, -LOG3)), t((LOG2 + LOG3) / 2)[0])


def test_whp_is_zero_where_the_generic_answer_is_certain():
    close(whp(t(0.0, 0.0)), t(0.0)[0])


def test_whp_at_the_first_step_is_the_loss_of_the_start_models_second_choice():
    base = t(5.0, 3.0, 0.0)[None]
    target = generic_targets(base, t(6.0, 3.0, 0.0)[None])
    assert target.tolist() == [1]  # 5 - 5 * 1 = 0 < 3
    close(whp(token_logprobs(base, target)[0]), -base.log_softmax(-1)[0, 1])


def test_whp_does_not_see_padding(flat):
    logits_NV, _, labels_N, logp_N = flat
    close(whp(padded(logits_NV, labels_N)[1]), whp(logp_N))


def test_generic_targets_by_hand():
    base = torch.tensor([[5.0, 4.0, 0.0], [5.0, 4.0, 0.0], [5.0, 4.0, 0.0]])
    reinforced = torch.tensor([[5.1, 4.0, 0.0], [5.3, 4.0, 0.0], [4.0, 9.0, 9.0]])
    # 5 - 5 * .1 = 4.5 stays ahead; 5 - 5 * .3 = 3.5 falls behind; what reinforcement lowers is not touched
    assert generic_targets(base, reinforced).tolist() == [0, 1, 0]


def test_generic_targets_of_no_strength_or_no_reinforcement_are_the_start_models_choice(flat):
    logits_NV, ref_NV, *_ = flat
    assert torch.equal(generic_targets(ref_NV, logits_NV, strength=0.0), ref_NV.argmax(-1))
    assert torch.equal(generic_targets(ref_NV, ref_NV, strength=9.0), ref_NV.argmax(-1))


def test_generic_targets_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match="generic_targets: shapes must be equal"):
        generic_targets(torch.zeros(2, 3), torch.zeros(2, 4))


# --- undial -----------------------------------------------------------------------------------------------------


def test_undial_by_hand():
    # teacher (4/5, 1/5) with the first logit lowered by ln 4: (1/2, 1/2); model (3/4, 1/4): CE = -.5 ln(3/16)
    logits_NV = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    value = undial(logits_NV, torch.tensor([[math.log(4), 0.0]]), torch.tensor([0]), beta=math.log(4))
    value.backward()
    close(value, torch.tensor(-0.5 * math.log(3 / 16)))
    close(logits_NV.grad, torch.tensor([[0.25, -0.25]]))  # p - target


def test_undial_without_penalty_is_flat_at_the_entropy_of_the_start_model():
    torch.manual_seed(0)
    ref_NV = torch.randn(5, 11)
    logits_NV = ref_NV.clone().requires_grad_()
    value = undial(logits_NV, ref_NV, torch.arange(5), beta=0.0)
    value.backward()
    close(value, torch.distributions.Categorical(logits=ref_NV).entropy().mean())
    close(logits_NV.grad, torch.zeros(5, 11), atol=1e-7, rtol=0)


def test_undial_with_a_large_penalty_distils_all_tokens_but_the_true_one():
    logits_NV = torch.zeros(1, 4, requires_grad=True)
    undial(logits_NV, torch.tensor([[9.0, 1.0, 1.0, 1.0]]), torch.tensor([0]), beta=100.0).backward()
    close(logits_NV.grad, torch.tensor([[1 / 4, 1 / 4 - 1 / 3, 1 / 4 - 1 / 3, 1 / 4 - 1 / 3]]))


def test_undial_at_the_first_step_is_the_start_models_distance_from_its_own_target():
    # the model is its own teacher: p = (1/2, 1/4, 1/4); target ~ (1/2 e^-beta, 1/4, 1/4); e^beta = 2: (1/3, 1/3, 1/3)
    ref_NV = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    logits_NV = ref_NV.detach().clone().requires_grad_()
    value = undial(logits_NV, ref_NV, torch.tensor([0]), beta=math.log(2))
    value.backward()
    close(value, torch.tensor(-(math.log(1 / 2) + 2 * math.log(1 / 4)) / 3))
    close(logits_NV.grad, torch.tensor([[1 / 6, -1 / 12, -1 / 12]]))
    assert ref_NV.grad is None


@pytest.mark.parametrize("extra", [1, 6])
def test_undial_ignores_padding(extra):
    torch.manual_seed(0)
    logits_BTV, ref_BTV = torch.randn(2, 4 + extra, 7), torch.randn(2, 4 + extra, 7)
    labels_BT = torch.full((2, 4 + extra), IGNORE)
    labels_BT[0, 1:3], labels_BT[1, 0:4] = 3, 5
    flat_NV, flat_ref_NV = (torch.cat([z[0, 1:3], z[1, 0:4]]) for z in (logits_BTV, ref_BTV))
    mask_BT = labels_BT != IGNORE
    close(
        undial(logits_BTV[mask_BT], ref_BTV[mask_BT], labels_BT[mask_BT]),
        undial(flat_NV, flat_ref_NV, torch.tensor([3, 3, 5, 5, 5, 5])),
    )


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="undial: beta must be >= 0, got -1"):
        undial(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), beta=-1.0)
    with pytest.raises(ValueError, match="undial: shapes must be equal"):
        undial(torch.zeros(2, 3), torch.zeros(1, 3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="undial: the batch holds no answer token"):
        undial(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0).long())


# --- bad_teacher -------------------------------------------------------------------------------------------------


def test_bad_teacher_by_hand():
    """Teacher (1/4, 3/4), student (1/2, 1/2): KL(teacher || student) = log 2 - H(1/4)."""
    logits_NV, bad_NV = torch.zeros(1, 2), torch.tensor([[0.0, LOG3]])
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    close(bad_teacher(logits_NV, bad_NV), torch.tensor(wanted))
    other_way = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    close(bad_teacher(bad_NV, logits_NV), torch.tensor(other_way))


def test_bad_teacher_with_a_uniform_teacher_is_maximum_entropy(flat):
    logits_NV = flat[0]
    close(bad_teacher(logits_NV, torch.zeros_like(logits_NV)), me(logits_NV))


def test_bad_teacher_is_zero_where_the_student_is_the_teacher_and_does_not_train_it(flat):
    logits_NV = flat[0].clone().requires_grad_()
    teacher_NV = (flat[0] + 3.0).requires_grad_()  # a shift of all logits is no other distribution
    value = bad_teacher(logits_NV, teacher_NV)
    value.backward()
    close(value.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)
    close(logits_NV.grad, torch.zeros_like(flat[0]), atol=1e-6, rtol=0)
    assert teacher_NV.grad is None


def test_bad_teacher_does_not_see_padding(flat):
    logits_NV, bad_NV, labels_N, _ = flat
    found = bad_teacher(padded(logits_NV, labels_N)[0], padded(bad_NV, labels_N)[0])
    close(found, bad_teacher(logits_NV, bad_NV))
