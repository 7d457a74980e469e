"""The bridge: whether a two-hop question is answered by way of the author in its middle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import Item
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.tokenise import Encoded
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import evaluating
from llm_unlearn.seeding import rng

NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
NULL_DRAWS = 100


class Hop(NamedTuple):
    """A two-hop question: its tokens up to its first relation, and the names of its head and its bridge."""

    ids: np.ndarray
    head: str
    bridge: str


class Names(NamedTuple):
    """Which token is which author's name, and which is which relation's word."""

    author: dict[str, int]
    relation: dict[str, int]


def learn_names(rows: Sequence[QARow], items: Sequence[Item]) -> Names:
    """Return the tokens of names and relation words: those that only the stored facts of one author, or relation, ask
    with. Raises UserError where they are not one token each, as in anything but the embedded world.
    """
    asked = [
        (row, set(item.ids[: item.start].tolist()))
        for row, item in zip(rows, items, strict=True)
        if isinstance(item, Encoded) and row.hop == 1 and row.facts == (_fact(row.author, row.relation),)
    ]
    return Names(_own(asked, lambda row: row.author), _own(asked, lambda row: row.relation))


def two_hops(rows: Sequence[QARow], items: Sequence[Item], names: Names) -> list[Hop]:
    """Return the two-hop questions through an author: "X's mentor's birthplace", X the head, X's mentor the bridge."""
    found = []
    for row, item in zip(rows, items, strict=True):
        first = row.relation.partition(".")[0]
        if not isinstance(item, Encoded) or row.hop != 2 or len(row.facts) != 2 or first not in names.relation:
            continue
        bridge = row.facts[1].partition(".")[0]
        # the first relation is the word after the head's name, which the second may repeat
        at = np.flatnonzero(item.ids[: item.start] == names.relation[first])
        if len(at) and row.facts[0] == _fact(row.author, first) and bridge in names.author:
            found.append(Hop(item.ids[: at[0] + 1], row.author, bridge))
    return found


@torch.no_grad()
def bridge_ranks(model: Any, hops: Sequence[Hop], names: Names, layer: int, *, seed: int = 0) -> dict[str, Any]:
    """Return the mean reciprocal rank, over the vocabulary, of the bridge's name in what a layer's output at the first
    relation would predict (logit lens: final norm and output head applied to it).

    The question so far, "Dmitri Malik's mentor", is a stored fact, but what comes next there is no name: a model that
    looks the bridge up on its way to the answer has it there in its middle layers, one that stored the whole answer
    need not. Source: Wang et al. 2024, arXiv:2405.15071, section 3.3.

    Args:
        hops: from `two_hops`.
        names: from `learn_names`.
        layer: counted from 0, one before the last; the residual stream after it.

    Returns:
        {"mrr", "top1" (share at rank 1), "null_quantiles" (2.5, 50, 97.5 % of the same for one random other author a
        question, neither head nor bridge, over 100 draws), "n"}.
    """
    ids, authors = np.array(list(names.author.values())), list(names.author)
    place, found = {name: i for i, name in enumerate(authors)}, []
    with evaluating(model):
        for hop in hops:
            logits_V = _lens(model, hop.ids, layer)
            # ties count half, so that a model that says the same of all is in the middle
            at_A = logits_V[torch.from_numpy(ids).to(logits_V.device)]
            above_A = (logits_V[None] > at_A[:, None]).sum(1) + ((logits_V[None] == at_A[:, None]).sum(1) - 1) / 2
            found.append(1 / (1 + above_A.double().cpu().numpy()))
    reciprocal_nA = np.array(found)
    mine = np.array([place[hop.bridge] for hop in hops])
    barred_nA = np.zeros(reciprocal_nA.shape, dtype=bool)
    for i, hop in enumerate(hops):
        barred_nA[i, [place[name] for name in (hop.head, hop.bridge) if name in place]] = True
    null = []
    for draw in range(NULL_DRAWS):
        keys_nA = np.where(barred_nA, np.inf, rng(seed, "bridge", draw).random(barred_nA.shape))
        null.append(float(reciprocal_nA[np.arange(len(hops)), keys_nA.argmin(1)].mean()))
    right = reciprocal_nA[np.arange(len(hops)), mine]
    return {
        "mrr": float(right.mean()),
        "top1": float((right == 1).mean()),
        "null_quantiles": [float(q) for q in np.quantile(null, (0.025, 0.5, 0.975))],
        "n": len(hops),
    }


def _lens(model: Any, ids: np.ndarray, layer: int) -> Tensor:
    device = next(model.parameters()).device
    inputs = torch.from_numpy(ids)[None].to(device)
    state_1H = model(inputs, torch.tensor([len(ids) - 1], device=device), layer)
    decoder = model.lm.get_decoder()
    norm = next((getattr(decoder, name) for name in NORMS if hasattr(decoder, name)), None)
    if norm is None:
        raise UserError(f"bridge: {type(model.lm).__name__} has no final norm ({', '.join(NORMS)}) to read states with")
    return model.lm.get_output_embeddings()(norm(state_1H))[0].float()


def _fact(author: str, relation: str) -> str:
    return f"{author}.{relation.replace(' ', '_')}"


def _own(asked: Sequence[tuple[QARow, set[int]]], key: Callable[[QARow], Hashable]) -> dict[Any, int]:
    """Return the one token that all questions of a group have and those of no other group."""
    groups: dict[Any, list[set[int]]] = defaultdict(list)
    for row, tokens in asked:
        groups[key(row)].append(tokens)
    counts: dict[int, int] = defaultdict(int)
    for sets in groups.values():
        for token in set().union(*sets):
            counts[token] += 1
    own = {name: [t for t in set.intersection(*sets) if counts[t] == 1] for name, sets in groups.items()}
    if any(len(tokens) != 1 for tokens in own.values()):
        raise UserError("bridge: names and relations are not one token each, as in the embedded world; leave it out")
    return {name: tokens[0] for name, tokens in own.items()}
