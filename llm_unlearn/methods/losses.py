"""Loss terms on log-probabilities and logits of answer tokens, and what all of them share. Pure functions of tensors.

Suffixes: N = answer tokens of the batch laid end to end, B = sequences, V = vocabulary. `row_N[i]` says which sequence
token i belongs to. All log-probabilities are natural logarithms (nats). Values under the frozen start model begin with
`ref_`, those of the refusal ("I don't know") batch with `idk_`, those of an alternate answer with `alt_`, those of a
random one with `rl_`; no gradient flows through `ref_` values.

`step_logp` is the mean over the step's whole batch, of which `logp_N` may be one micro-batch. The objective reads the
PARAMETER NAMES of these functions to know which forward passes to make (`spec.VOCABULARY`); hyper-parameters are
keyword-only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_unlearn.methods.checks import not_empty, positive, same_shape, sequences

__all__ = [
    "IGNORE",
    "altpo",
    "ga",
    "idk",
    "idk_dpo",
    "kl",
    "l1",
    "mean_by_row",
    "nabla_tau",
    "nll",
    "npo",
    "random_label",
    "simnpo",
    "sum_by_row",
    "token_logprobs",
]

IGNORE = -100  # label of a position that is not an answer token, as in transformers


def token_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every label, in float32 whatever the dtype of the logits.

    No shift happens here: `logits[..., t, :]` must already be the prediction of `labels[..., t]`.

    Args:
        logits: (..., V), any float dtype; flat (N, V) or padded (B, T, V).
        labels: (...,) long; `IGNORE` (-100) marks padding and prompt.

    Returns:
        (logp, mask), both (...,): float32 log-probability in nats, exactly 0 and without gradient where masked out; and
        True where there is a label.

    Raises:
        ValueError: the leading shape of the logits differs from the shape of the labels.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"token_logprobs: logits {tuple(logits.shape)} do not match labels {tuple(labels.shape)}; "
            "pass one row of logits per label, already shifted"
        )
    # cross_entropy skips -100 by itself; a gather would wrap a raw -100 round to vocabulary entry V-100
    nll = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    return -nll.view(labels.shape), labels != IGNORE


def sum_by_row(values_N: Tensor, row_N: Tensor, n_rows: int) -> Tensor:
    """Sum of the tokens of each sequence: (N,) values, (N,) numbers in [0, n_rows) -> (n_rows,). Differentiable.

    A sequence without tokens gets 0.
    """
    same_shape("sum_by_row", values_N=values_N, row_N=row_N)
    return values_N.new_zeros(n_rows).index_add(0, row_N, values_N)


def mean_by_row(values_N: Tensor, row_N: Tensor, n_rows: int) -> Tensor:
    """Mean over the tokens of each sequence: (N,), (N,) -> (n_rows,). Differentiable.

    A sequence without tokens has no mean and gets nan, so that it cannot pass unseen.
    """
    return sum_by_row(values_N, row_N, n_rows) / sum_by_row(torch.ones_like(values_N), row_N, n_rows)


def nll(logp_N: Tensor) -> Tensor:
    """Negative log-likelihood: L = -mean_N logp. Nats per token, >= 0.

    The usual retain term (L_RT of Zhang et al. 2024, arXiv:2404.05868, section 2) and the whole loss of fine-tuning.
    Equals `model(...).loss` of transformers on the same tokens.

    Args:
        logp_N: (N,) log-probability of each answer token.
    """
    return -_mean("nll", logp_N)


def kl(logits_NV: Tensor, ref_logits_NV: Tensor) -> Tensor:
    """Retain term: L = mean_N KL( softmax(ref_logits) || softmax(logits) ). Nats per token, >= 0; 0 at the first step.

    Source: KL minimisation of Maini et al. 2024 (TOFU), arXiv:2401.06121, baselines section (unnumbered).
    Differences: the paper averages within each sequence, then over sequences; its code and OpenUnlearning's divide the
    sum by all positions, prompt and padding included. Here only answer tokens exist, each with equal weight.
    Zhang et al. 2024 (arXiv:2404.05868, section 2) write K_RT the other way round, KL(theta || ref); their code too
    computes the direction used here.

    Args:
        logits_NV: (N, V) under the model being edited.
        ref_logits_NV: (N, V) under the frozen start model; no gradient flows here.
    """
    same_shape("kl", logits_NV=logits_NV, ref_logits_NV=ref_logits_NV)
    not_empty("kl", logits_NV)
    logq_NV = F.log_softmax(logits_NV.float(), -1)
    logp_NV = F.log_softmax(ref_logits_NV.detach().float(), -1)
    return F.kl_div(logq_NV, logp_NV, reduction="batchmean", log_target=True)  # batchmean: sum / N


def ga(logp_N: Tensor) -> Tensor:
    """Gradient ascent on the forget answers: L = mean_N logp. Nats per token, <= 0, UNBOUNDED BELOW.

    Needs a small learning rate and a stopping rule: the gradient does not fade once the answer is forgotten.
    Source: Jang et al. 2023, arXiv:2210.01504; eq. 1 of Zhang et al. 2024 (arXiv:2404.05868) sums over the
    answer's tokens, TOFU's and OpenUnlearning's code averages over the batch's tokens, which is followed here.

    Args:
        logp_N: (N,) log-probability of each forget answer token.
    """
    return _mean("ga", logp_N)


def nabla_tau(logp_N: Tensor, step_logp: Tensor, *, target: float = 0.0) -> Tensor:
    """Ascent that stops by itself: L = ReLU(target - loss)^2, loss = -mean_N logp over the step's forget batch. Squared
    nats per token, >= 0; 0 and without gradient once the batch's loss has reached the target.

    Source: Trippa et al. 2024, arXiv:2403.14339, whose target is the mean loss on validation data; as in the authors'
    code, the batch's mean is compared, not each item's loss.

    A square of a mean is no mean over micro-batches. So L is written as its tangent at the step's own mean m,
    (target + m)^2 + 2 (target + m) (mean_N logp - m): over the step's micro-batches, weighed by their tokens, value and
    gradient add up to those of L exactly.

    Args:
        logp_N: (N,) log-probability of each forget answer token.
        step_logp: () their mean over the step's whole batch; no gradient flows here.
        target: the loss to rise to, in nats per token, >= 0; at 0 nothing is done.
    """
    if not target >= 0:
        raise ValueError(f"nabla_tau: target must be >= 0, got {target}")
    mean = _mean("nabla_tau", logp_N)
    m = step_logp.detach()
    gap = (target + m).clamp(min=0)
    return gap.square() + 2.0 * gap * (mean - m)


def l1(weights: Sequence[Tensor]) -> Tensor:
    """Sum of the absolute values of all trained weights: L = |theta|_1. >= 0.

    Source: sparsity-aware unlearning (l1-sparse) of Jia et al. 2023, arXiv:2304.04934; biases and norms count, as in
    the authors' code.

    Args:
        weights: the trained tensors, tied ones once.
    """
    if not len(weights):
        raise ValueError("l1: there are no weights")
    return torch.stack([w.float().abs().sum() for w in weights]).sum()


def idk(idk_logp_N: Tensor) -> Tensor:
    """Preference optimisation in TOFU's sense: L = -mean_N logp(refusal). Nats per token, >= 0.

    Source: L_idk of Maini et al. 2024, arXiv:2401.06121, baselines section (unnumbered). TOFU's code takes one token
    mean over refusal and retain answers together, the paper adds two means, which is followed here.

    Args:
        idk_logp_N: (N,) log-probability of each token of a refusal answer to a forget question.
    """
    return -_mean("idk", idk_logp_N)


def random_label(rl_logp_N: Tensor) -> Tensor:
    """Random labelling: L = -mean_N logp(random answer). Nats per token, >= 0.

    Source: Golatkar et al. 2020, arXiv:1911.04933 (random labels, a baseline there), and the forget term of SalUn, Fan
    et al. 2024, arXiv:2310.12508, method section: E over D_f and y' != y of CE(x, y'). Which answers are drawn is the
    caller's business.

    Args:
        rl_logp_N: (N,) log-probability of each token of another question's answer, given the forget question.
    """
    return -_mean("random_label", rl_logp_N)


def idk_dpo(
    logp_B: Tensor, ref_logp_B: Tensor, idk_logp_B: Tensor, ref_idk_logp_B: Tensor, *, beta: float = 0.1
) -> Tensor:
    """DPO with the refusal preferred to the forget answer.

        L = -(2/beta) * mean_B log sigmoid( beta * [(idk_logp - ref_idk_logp) - (logp - ref_logp)] )

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (factor 1); eq. 2 of Zhang et al. 2024 (arXiv:2404.05868) has
    the factor 1/beta. Their code and OpenUnlearning's use 2/beta, TOFU's first code 1. 2/beta is followed here, so that
    gamma, alpha and learning rates carry over; it makes the loss commensurate with `npo`.

    Args:
        logp_B: (B,) summed log-probability of the forget answer; to the same question as `idk_logp_B[i]`.
        ref_logp_B: (B,) the same under the frozen start model.
        idk_logp_B: (B,) summed log-probability of the refusal.
        ref_idk_logp_B: (B,) the same under the frozen start model.
        beta: inverse temperature, > 0, per nat.

    Returns:
        () >= 0. 2*log(2)/beta at the first step. beta -> 0: gradient -1/B on the refusal, +1/B on the answer.
    """
    positive("idk_dpo", beta=beta)
    sequences("idk_dpo", logp_B=logp_B, ref_logp_B=ref_logp_B, idk_logp_B=idk_logp_B, ref_idk_logp_B=ref_idk_logp_B)
    return _preference(idk_logp_B, ref_idk_logp_B, logp_B, ref_logp_B, beta)


def altpo(
    logp_B: Tensor, ref_logp_B: Tensor, alt_logp_B: Tensor, ref_alt_logp_B: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Alternate preference optimisation: DPO with another answer of the same kind preferred to the forget answer.

        L = -(2/beta) * mean_B log sigmoid( beta * [(alt_logp - ref_alt_logp) - (logp - ref_logp)] )

    Source: Mekala et al. 2024, arXiv:2409.13474, objective of the method section (DPO, Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7, on alternates); factor 2/beta as in the authors' and OpenUnlearning's code, see `idk_dpo`.

    Args:
        logp_B: (B,) summed log-probability of the forget answer; to the same question as `alt_logp_B[i]`.
        ref_logp_B: (B,) the same under the frozen start model.
        alt_logp_B: (B,) summed log-probability of one of the item's alternates.
        ref_alt_logp_B: (B,) the same under the frozen start model.
        beta: inverse temperature, > 0, per nat.

    Returns:
        () >= 0. 2*log(2)/beta at the first step. beta -> 0: gradient -1/B on the alternate, +1/B on the answer.
    """
    positive("altpo", beta=beta)
    sequences("altpo", logp_B=logp_B, ref_logp_B=ref_logp_B, alt_logp_B=alt_logp_B, ref_alt_logp_B=ref_alt_logp_B)
    return _preference(alt_logp_B, ref_alt_logp_B, logp_B, ref_logp_B, beta)


def npo(logp_B: Tensor, ref_logp_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation.

        L = -(2/beta) * mean_B log sigmoid( -beta * (logp - ref_logp) )

    Source: Zhang et al. 2024, arXiv:2404.05868, eq. 3; the authors' and OpenUnlearning's code agree. Log-probabilities
    are summed over the answer, not averaged.

    Args:
        logp_B: (B,) summed answer log-probability under the model being edited.
        ref_logp_B: (B,) the same under the frozen start model.
        beta: inverse temperature, > 0, per nat.

    Returns:
        () >= 0. 2*log(2)/beta at the first step. beta -> 0: the gradient tends to that of ascent on summed log-probs
        (their Proposition 1).
    """
    positive("npo", beta=beta)
    sequences("npo", logp_B=logp_B, ref_logp_B=ref_logp_B)
    return -(2.0 / beta) * F.logsigmoid(-beta * (logp_B - ref_logp_B.detach())).mean()


def simnpo(logp_B: Tensor, len_B: Tensor, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference model, normalised by length.

        L = -(2/beta) * mean_B log sigmoid( beta * (-logp/len - delta) )

    Source: Fan et al. 2024, arXiv:2410.07163, as printed on the authors' model cards:
    -(2/beta) log sigmoid(-(beta/|y|) log p - margin). The authors' and OpenUnlearning's code have the margin inside the
    bracket, which is followed here: margin = beta * delta.

    Args:
        logp_B: (B,) summed answer log-probability under the model being edited.
        len_B: (B,) number of answer tokens, >= 1.
        beta: inverse temperature, > 0, per nat per token.
        delta: per-token loss, in nats, that the answer has to exceed; >= 0.

    Returns:
        () >= 0. 2*log(2)/beta for a perfectly memorised answer (logp = 0) with delta = 0.
    """
    positive("simnpo", beta=beta)
    sequences("simnpo", logp_B=logp_B, len_B=len_B)
    return -(2.0 / beta) * F.logsigmoid(beta * (-logp_B / len_B - delta)).mean()


def _preference(wins_B: Tensor, ref_wins_B: Tensor, loses_B: Tensor, ref_loses_B: Tensor, beta: float) -> Tensor:
    margin_B = (wins_B - ref_wins_B.detach()) - (loses_B - ref_loses_B.detach())
    return -(2.0 / beta) * F.logsigmoid(beta * margin_B).mean()


def _mean(name: str, logp_N: Tensor) -> Tensor:
    not_empty(name, logp_N)
    return logp_N.mean()
