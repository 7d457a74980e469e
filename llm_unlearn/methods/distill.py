"""Loss terms on whole distributions, to train towards or away from. Pure functions; suffixes as in `losses`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_unlearn.methods.checks import not_empty, same_shape
from llm_unlearn.methods.losses import kl, nll

__all__ = ["bad_teacher", "distil", "generic_targets", "pdu", "scrub", "undial", "whp"]


def scrub(logits_NV: Tensor, ref_logits_NV: Tensor) -> Tensor:
    """Forget term of SCRUB: L = -mean_N KL( softmax(ref_logits) || softmax(logits) ). Nats per token, <= 0, UNBOUNDED
    BELOW.

    0 at the first step, and so is its gradient: the student is the teacher.
    Source: Kurmanji et al. 2023, arXiv:2302.09880, section 3 (the max-step). The authors' code softens both by a
    temperature (kd_T); the paper's objective, followed here, has none.

    Args:
        logits_NV: (N, V) under the model being edited (student), forget batch.
        ref_logits_NV: (N, V) under the frozen start model (teacher); no gradient flows here.
    """
    return -kl(logits_NV, ref_logits_NV)


def distil(
    logp_N: Tensor,
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    *,
    kl_weight: float = 0.001,
    nll_weight: float = 0.99,
) -> Tensor:
    """Retain term of SCRUB: L = kl_weight * mean_N KL(ref || p) - nll_weight * mean_N logp. Nats per token, >= 0.

    Source: Kurmanji et al. 2023, arXiv:2302.09880, section 3 (the min-step, their alpha and gamma). The default weights
    are those of the authors' code.

    Args:
        logp_N: (N,) log-probability of each retain answer token.
        logits_NV: (N, V) under the model being edited (student).
        ref_logits_NV: (N, V) under the frozen start model (teacher); no gradient flows here.
        kl_weight: weight of staying near the teacher, >= 0.
        nll_weight: weight of the answers themselves, >= 0.
    """
    return kl_weight * kl(logits_NV, ref_logits_NV) + nll_weight * nll(logp_N)


def bad_teacher(logits_NV: Tensor, bad_logits_NV: Tensor) -> Tensor:
    """Distillation of a model that was never trained: L = mean_N KL( softmax(bad_logits) || softmax(logits) ). Nats per
    token, >= 0; 0 where the model answers as the untrained one does.

    Source: Chundawat et al. 2023, arXiv:2205.08096, the part of the loss on forget samples (its incompetent teacher).
    Direction and temperature 1 are those of the authors' code, which divides by the number of classes too.

    Args:
        logits_NV: (N, V) under the model being edited (student), forget batch.
        bad_logits_NV: (N, V) under a model of the same architecture with random weights; no gradient flows here.
    """
    return kl(logits_NV, bad_logits_NV)


def pdu(logits_NV: Tensor) -> Tensor:
    """Logit-margin flattening: L = mean_N (max_V z - mean_V z)^2. >= 0, in squared logits; 0 for uniform predictions.

    Source: Entesari et al. 2025, arXiv:2506.05314, the logit-margin loss. Their code averages over all positions,
    prompt and padding included; here only answer tokens exist.

    Args:
        logits_NV: (N, V) under the model being edited, forget batch.
    """
    not_empty("pdu", logits_NV)
    z_NV = logits_NV.float()
    return (z_NV.amax(-1) - z_NV.mean(-1)).square().mean()


def whp(generic_logp_N: Tensor) -> Tensor:
    """Fine-tuning on generic answers: L = -mean_N log p(generic token). Nats per token, >= 0.

    The inputs stay those of the real answer; only what is to be predicted changes.
    Source: Eldan and Russinovich 2023, arXiv:2310.02238, section 2; see `generic_targets`.

    Args:
        generic_logp_N: (N,) log-probability of each generic target token, forget batch.
    """
    return nll(generic_logp_N)


def generic_targets(ref_logits_NV: Tensor, reinforced_logits_NV: Tensor, *, strength: float = 5.0) -> Tensor:
    """What a model that never saw the forget set might say: (N,) token ids argmax(v_b - strength ReLU(v_r - v_b)).

    Source: Eldan and Russinovich 2023, arXiv:2310.02238, section 2.1 (equation with the ReLU). Their replacement of
    anchored terms by generic ones is left out: it needs a list of names per text.

    Args:
        ref_logits_NV: (N, V) v_b, under the start model.
        reinforced_logits_NV: (N, V) v_r, under the start model fine-tuned further on the forget set.
        strength: how much a token that reinforcement made likelier is pushed down, >= 0; 0 keeps the start model's own
            choice.

    Raises:
        ValueError: shapes differ.
    """
    same_shape("generic_targets", ref_logits_NV=ref_logits_NV, reinforced_logits_NV=reinforced_logits_NV)
    v_NV = ref_logits_NV.float()
    return (v_NV - strength * (reinforced_logits_NV.float() - v_NV).clamp(min=0)).argmax(-1)


def undial(logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, *, beta: float = 10.0) -> Tensor:
    """Self-distillation from the start model with the forget token's logit lowered.

        L = mean_N CE( softmax(z_ref - beta * onehot(y)), softmax(z) )

    Source: Dong et al. 2024 (UNDIAL), arXiv:2402.10052, method section. OpenUnlearning averages over prompt and padding
    too, where the label -100 lowers vocabulary entry V - 100; here only answer tokens exist.

    Args:
        logits_NV: (N, V) under the model being edited.
        ref_logits_NV: (N, V) under the frozen start model; no gradient flows here.
        labels_N: (N,) the forget answer tokens.
        beta: how far their logits are lowered, >= 0; 0 distils the start model into itself.

    Returns:
        () >= 0, nats per token; the entropy of the target where it is reached, and not 0.
    """
    if not beta >= 0:
        raise ValueError(f"undial: beta must be >= 0, got {beta}")
    same_shape("undial", logits_NV=logits_NV, ref_logits_NV=ref_logits_NV)
    not_empty("undial", logits_NV)
    z_NV = ref_logits_NV.detach().float()
    lowered_NV = z_NV.scatter_add(-1, labels_N[:, None], torch.full_like(z_NV[:, :1], -beta))
    return F.cross_entropy(logits_NV.float(), lowered_NV.softmax(-1))
