"""What takes two models at once: how far the model's next-token distributions are from gold's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llm_unlearn.data.batches import collate, length_sorted
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import MAX_TOKENS
from llm_unlearn.models.causal import AnswerModel


@torch.no_grad()
def kl_divergence(model: AnswerModel, gold: AnswerModel, items: Sequence[Item]) -> np.ndarray:
    """Mean over an answer's tokens, end token included, of KL(gold || model) between next-token distributions.

        KL = sum over the vocabulary of p_gold (log p_gold - log p_model), in fp32

    Args:
        model, gold: in eval mode, on one device, of one vocabulary.
        items: encoded answers.

    Returns:
        (n,) float64 >= 0 up to rounding, nats per token.

    Raises:
        UserError: the two have vocabularies of different sizes.
    """
    sizes = [m.lm.get_output_embeddings().weight.shape[0] for m in (model, gold)]
    if sizes[0] != sizes[1]:
        raise UserError(f"kl_to_gold: the model has {sizes[0]} tokens, gold {sizes[1]}; they share no distribution")
    device = next(model.parameters()).device
    out = np.zeros(len(items))
    for group in length_sorted(items, MAX_TOKENS):
        batch = collate([items[i] for i in group]).to(device)
        parts = []
        both = (m.logits_in_parts(batch.inputs, batch.index_N) for m in (model, gold))
        for (_, mine_NV), (_, theirs_NV) in zip(*both, strict=True):
            mine_NV, theirs_NV = (logits.float().log_softmax(-1) for logits in (mine_NV, theirs_NV))
            parts.append((theirs_NV.exp() * (theirs_NV - mine_NV)).sum(-1).double())
        kl_N = torch.cat(parts).cpu().numpy()
        for i, answer in zip(group, np.split(kl_N, np.cumsum([items[i].n_answer for i in group])[:-1]), strict=True):
            out[i] = answer.mean()
    return out
