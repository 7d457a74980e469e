"""Several answers to one question scored together: the question goes through the model once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import collate
from llm_unlearn.data.tokenise import Encoded, Item, only_texts
from llm_unlearn.eval.metrics.base import Scored
from llm_unlearn.eval.scoring import MAX_TOKENS, score_answers, scored_from_states
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import AnswerModel

log = get_logger(__name__)
Family = Sequence[Encoded]
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of a log-probability; half precision rounds far more
CLOSE_IN_HALF = 0.25


def score_families(
    model: AnswerModel, families: Sequence[Sequence[Item]], max_tokens: int = MAX_TOKENS, *, vocabulary: bool = False
) -> list[list[Scored]]:
    """Score every answer of every question, in the order given; the same numbers as `score_answers` up to rounding.

    Answers of a family continue the keys and values of the tokens they share. One answer is scored both ways first, and
    a model that gives two different numbers (one whose cache does not hold all that its layers remember) is scored
    answer by answer.

    Args:
        model: an AnswerModel.
        families: encoded answers, those of one question together.
        max_tokens: largest padded batch, the question counted with every answer, whose keys and values it holds.
        vocabulary: also take mean and variance of log p over the vocabulary, of each family's first answer.

    Raises UserError when the model's output is NaN.
    """
    texts = [only_texts(f) for f in families] if model.plain_head else []  # images never have a plain head
    if not _shares(model, texts):
        first = score_answers(model, [f[0] for f in families], max_tokens, vocabulary=vocabulary)
        rest = iter(score_answers(model, [item for f in families for item in f[1:]], max_tokens))
        return [[one, *(next(rest) for _ in f[1:])] for one, f in zip(first, families, strict=True)]
    return _score(model, texts, max_tokens, vocabulary)


def _shares(model: AnswerModel, families: Sequence[Family]) -> bool:
    family = next((f for f in families if len(f) > 1 and _shared(f)), None)
    if family is None:
        return False
    try:
        together = _score(model, [family], MAX_TOKENS, False)[0][-1].logp
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        log.info("answers are scored one by one: this model takes no shared prompt (%s)", error)
        return False
    alone = score_answers(model, [family[-1]])[0].logp
    close = CLOSE.get(next(model.parameters()).dtype, CLOSE_IN_HALF)
    if not np.allclose(together, alone, atol=close, rtol=0):
        log.info("answers are scored one by one: a shared prompt changes this model's numbers")
        return False
    return True


@torch.no_grad()
def _score(model: AnswerModel, families: Sequence[Family], max_tokens: int, vocabulary: bool) -> list[list[Scored]]:
    was_training = model.training
    model.eval()
    out: list[list[Scored]] = [[] for _ in families]
    for shared, group in _batches(families, max_tokens):
        members = [(Encoded(i.ids[shared:], i.start - shared, i.has_eos)) for f in group for i in families[f]]
        sizes = [len(families[f]) for f in group]
        heads = np.stack([families[f][0].ids[:shared] for f in group])
        firsts = np.cumsum([0, *sizes[:-1]]) if vocabulary else ()
        scored = iter(scored_from_states(model, *_states(model, heads, sizes, members), members, set(map(int, firsts))))
        for f in group:
            out[f] = [next(scored) for _ in families[f]]
    model.train(was_training)
    return out


def _states(
    model: AnswerModel, heads: np.ndarray, sizes: Sequence[int], members: Sequence[Encoded]
) -> tuple[Tensor, Tensor]:
    """States that predict the members' answer tokens (N, H), and those tokens (N,)."""
    from transformers import DynamicCache

    decoder: Any = model.lm.get_decoder()
    batch = collate(members).to(next(model.parameters()).device)
    ids_BT = batch.inputs
    cache = None
    if heads.shape[1]:
        cache = DynamicCache(config=model.lm.config)
        decoder(input_ids=torch.from_numpy(heads).to(ids_BT), past_key_values=cache, use_cache=True)
        of_family: Any = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(ids_BT.device)
        cache.reorder_cache(of_family)
    positions_1T = torch.arange(heads.shape[1], heads.shape[1] + ids_BT.shape[1], device=ids_BT.device)[None]
    hidden_BTH = decoder(
        input_ids=ids_BT, past_key_values=cache, position_ids=positions_1T, use_cache=cache is not None
    ).last_hidden_state
    return hidden_BTH.flatten(0, 1)[batch.index_N], batch.labels_N


def _batches(families: Sequence[Family], max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (tokens shared, families that share as many): nothing has to be padded on the left."""
    lengths = [_shared(f) for f in families]
    longest = [max(len(i.ids) for i in f) - n for f, n in zip(families, lengths, strict=True)]
    group: list[int] = []
    rows = 0
    for f in sorted(range(len(families)), key=lambda f: (lengths[f], -longest[f], f)):
        size = (rows + len(families[f])) * (lengths[f] + longest[group[0]] if group else 0)
        full = size > max_tokens
        if group and (full or lengths[group[0]] != lengths[f]):
            yield lengths[group[0]], group
            group, rows = [], 0
        group.append(f)
        rows += len(families[f])
    if group:
        yield lengths[group[0]], group


def _shared(family: Family) -> int:
    """Number of leading tokens all answers of a question share, short of the one that predicts an answer."""
    n = min(item.start for item in family) - 1
    first = family[0].ids[:n]
    for item in family[1:]:
        differing = np.flatnonzero(item.ids[:n] != first[:n])
        n = min(n, int(differing[0]) if differing.size else n)
    return n
