"""Teacher-forced scoring: one pass gives every answer token's log-probability and whether greedy decoding would have
chosen it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import Batch, collate, length_sorted
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import Diverged
from llm_unlearn.eval.metrics.base import Scored
from llm_unlearn.interrupt import end_if_asked
from llm_unlearn.methods.losses import nll, token_logprobs
from llm_unlearn.models.causal import AnswerModel

# of a padded batch; on CPU its states are to fit a cache
MAX_TOKENS = 16_384 if torch.cuda.is_available() else 2_048
COLUMNS = (torch.float64, torch.bool, torch.float64, torch.float64)  # log p, hit, mean and variance of log p


@torch.no_grad()
def score_answers(
    model: AnswerModel, items: Sequence[Item], max_tokens: int = MAX_TOKENS, *, vocabulary: bool = False
) -> list[Scored]:
    """Score encoded answers, in the order given.

    Log-probabilities are fp32 whatever the model's dtype, and only answer positions reach the vocabulary. Batches are
    sorted by length and sized by tokens; neither changes an item's numbers beyond rounding, since right padding is
    never attended to.

    Args:
        model: an AnswerModel, in eval mode on return to the mode it came in.
        items: what to score.
        max_tokens: largest padded batch.
        vocabulary: also take mean and variance of log p over the vocabulary.

    Raises Diverged when the model's output is NaN, Interrupted as `end_if_asked`.
    """
    out: list[Scored | None] = [None] * len(items)
    for group, members, batch in _passes(model, items, max_tokens):
        if model.plain_head:
            states_NH = model.states(batch.inputs, batch.index_N)
            wanted = set(range(len(members))) if vocabulary else set()
            scored = scored_from_states(model, states_NH, batch.labels_N, members, wanted)
        else:
            logits_NV = model(batch.inputs, batch.index_N)
            scored = _by_item(_token_scores(logits_NV, batch.labels_N, vocabulary), members)
        for i, its in zip(group, scored, strict=True):
            out[i] = its
    return [scored for scored in out if scored is not None]


def _passes(
    model: AnswerModel, items: Sequence[Item], max_tokens: int
) -> Iterator[tuple[list[int], list[Item], Batch]]:
    """Yield padded batches with their items and those items' numbers, the model in eval mode meanwhile. Raises
    Interrupted as `end_if_asked`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for group in length_sorted(items, max_tokens):
        end_if_asked()
        members = [items[i] for i in group]
        yield group, members, collate(members).to(device)
    model.train(was_training)


def scored_from_states(
    model: AnswerModel, states_NH: Tensor, labels_N: Tensor, items: Sequence[Item], vocabulary: Collection[int]
) -> list[Scored]:
    """Score answers from the states that predict their tokens, a few rows of logits at a time.

    Args:
        model: one with a plain head.
        states_NH: what the head reads, answer after answer.
        labels_N: the answers' tokens.
        items: whose they are.
        vocabulary: numbers of the items whose mean and variance over the vocabulary are taken too.

    Raises Diverged when the model's output is NaN.
    """
    row_N = np.repeat(np.arange(len(items)), [item.n_answer for item in items])
    out: dict[int, Scored] = {}
    for moments in (False, True):
        chosen = [i for i in range(len(items)) if (i in vocabulary) == moments]
        if not chosen:
            continue
        at = torch.from_numpy(np.flatnonzero(np.isin(row_N, chosen))).to(labels_N.device)
        labels = labels_N[at]
        # made beforehand: results kept between the logits of two parts would keep their memory from being used again
        columns = [labels.new_empty(len(labels), dtype=kind) for kind in COLUMNS[: 4 if moments else 2]]
        for part, logits in model.head_in_parts(states_NH[at]):
            for column, values in zip(columns, _token_scores(logits, labels[part], moments), strict=True):
                column[part] = values
        out |= dict(zip(chosen, _by_item(columns, [items[i] for i in chosen]), strict=True))
    return [out[i] for i in range(len(items))]


def _by_item(columns: Sequence[Tensor], items: Sequence[Item]) -> list[Scored]:
    logp, hit, *moments = (column.cpu().numpy() for column in columns)
    _refuse_nan(logp)
    ends = np.cumsum([item.n_answer for item in items])
    return [
        Scored(logp[begin:end], hit[begin:end], item.has_eos, *(m[begin:end] for m in moments))
        for item, begin, end in zip(items, [0, *ends[:-1]], ends, strict=True)
    ]


def _refuse_nan(logp: np.ndarray) -> None:
    if np.isnan(logp).any():
        raise Diverged("the model's log-probabilities are NaN: training has diverged; lower optim.lr")


def _token_scores(logits_NV: Tensor, labels_N: Tensor, vocabulary: bool) -> list[Tensor]:
    logits_NV = logits_NV.float()
    label_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    hit_N = label_N == logits_NV.amax(-1)
    rows = hit_N.nonzero()[:, 0]  # equal logits are settled as greedy decoding would; argmax over all rows is slow
    hit_N[rows] = logits_NV[rows].argmax(-1) == labels_N[rows]
    columns = [(label_N - logits_NV.logsumexp(-1)).double(), hit_N]
    if vocabulary:
        logp_NV = logits_NV.log_softmax(-1)
        p_NV = logp_NV.exp()
        mean_N = torch.linalg.vecdot(p_NV, logp_NV)
        # centred: the difference of two large numbers would leave few digits of a small variance
        columns += [mean_N.double(), torch.linalg.vecdot(p_NV, logp_NV.sub_(mean_N[:, None]).square_()).double()]
    return columns


def padded_tokens(items: Sequence[Item], max_tokens: int = MAX_TOKENS) -> int:
    """Return how many tokens `score_answers` feeds to the model for these items, padding included."""
    return sum(len(group) * items[group[0]].n_inputs for group in length_sorted(items, max_tokens))


def gradient_norms(model: AnswerModel, items: Sequence[Item]) -> list[float]:
    """Return, for each item, the norm of the gradient of its mean loss per answer token (end token left out), mean over
    the parameter tensors.

    One forward and backward pass an item, in eval mode; gradients are left as they were found.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    out = []
    for item in items:
        batch = collate([item]).to(device)
        with torch.enable_grad():
            logp_N = token_logprobs(model(batch.inputs, batch.index_N), batch.labels_N)[0]
            loss = nll(logp_N[:-1] if item.has_eos and len(logp_N) > 1 else logp_N)
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
        norms = torch.stack([g.norm() for g in grads if g is not None])
        out.append(float(norms.mean()))
    model.train(was_training)
    return out


@torch.no_grad()
def quick_scores(model: AnswerModel, items: Sequence[Item]) -> tuple[float, float, float]:
    """Return (share of answers greedy decoding gets right to the last token, mean answer-token loss, mean answer
    probability).
    """
    if model.plain_head or any(item.n_answer > 1 for item in items):
        scored = score_answers(model, items)
        right = float(np.mean([s.hit.all() for s in scored]))
        loss = -float(np.concatenate([s.logp for s in scored]).mean())
        return right, loss, float(np.mean([np.exp(s.logp.mean()) for s in scored]))
    # a classifier of small images takes less time than an object per image would
    logp, hit = np.empty(len(items)), np.empty(len(items), dtype=bool)
    for group, _, batch in _passes(model, items, MAX_TOKENS):
        columns = _token_scores(model(batch.inputs, batch.index_N), batch.labels_N, vocabulary=False)
        logp[group], hit[group] = (column.cpu().numpy() for column in columns)
    _refuse_nan(logp)
    return float(hit.mean()), -float(logp.mean()), float(np.exp(logp).mean())
