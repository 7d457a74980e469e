"""Alternate answers to the forget questions, for methods that prefer them to the true ones (AltPO)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llm_unlearn.data.batches import length_sorted
from llm_unlearn.data.schema import QARow, normalised
from llm_unlearn.data.tokenise import FormatName, Item, encode_answers, only_texts, resolve_format
from llm_unlearn.errors import UserError
from llm_unlearn.models.causal import AnswerModel, position_limit
from llm_unlearn.seeding import rng

ROUNDS = 8  # of drawing: what is empty, unfinished, or holds the true answer is drawn again
MAX_TOKENS = 4_096  # of a batch of padded prompts

# ours; the source asks with other words, and in the same way
REQUEST = (
    "Question: {question}\nAnswer: {answer}\nWrite a different answer to this question. It has to be plausible, of the "
    "same kind and length, and wrong in every fact the answer states. Reply with the new answer alone."
)


@dataclass(frozen=True)
class Alternates:
    """Alternates of all forget items, one group after another: those of item i are `items[starts[i]:starts[i+1]]`."""

    items: Sequence[Item]
    starts: np.ndarray
    texts: Sequence[Sequence[str]]
    tokens: int = 0
    """What the model read and wrote to make them, padding included."""

    def numbers(self, forget: np.ndarray, position: int) -> np.ndarray:
        """Return which alternate (B,) each of a step's forget items (B,) is paired with.

        Args:
            forget: the step's items, out of range(n).
            position: place of the first of them in the endless stream of epochs. Every epoch an item moves on to its
                next alternate, so that all are used equally often.
        """
        epoch_B = (position + np.arange(len(forget))) // (len(self.starts) - 1)
        counts_B = self.starts[forget + 1] - self.starts[forget]
        return self.starts[forget] + (epoch_B + forget) % counts_B


def group_alternates(
    tokenizer: Any,
    rows: Sequence[QARow],
    texts: Sequence[Sequence[str]],
    fmt: FormatName = "auto",
    max_length: int | None = None,
    tokens: int = 0,
) -> Alternates:
    """Tokenise the alternates of every row, made at a cost of `tokens`; longer ones than `max_length` are dropped.

    Raises UserError when a row is left without any.
    """
    flat = [(i, text) for i, drawn in enumerate(texts) for text in drawn]
    coded = encode_answers(tokenizer, [(rows[i], text) for i, text in flat], fmt)
    kept = [k for k, item in enumerate(coded) if max_length is None or item.n_inputs < max_length]
    counts = np.bincount([flat[k][0] for k in kept], minlength=len(rows))
    if (empty := np.flatnonzero(counts == 0)).size:
        raise UserError(
            f"no alternates for {len(empty)} of {len(rows)} forget items, {rows[empty[0]].question[:60]!r} for one; "
            "set method.alternates to another of generated, swapped, perturbed, or choose another method"
        )
    starts = np.concatenate([[0], np.cumsum(counts)])
    groups = [[flat[k][1] for k in kept[starts[i] : starts[i + 1]]] for i in range(len(rows))]
    return Alternates([coded[k] for k in kept], starts, groups, tokens)


def perturbed(rows: Sequence[QARow], n: int) -> list[list[str]]:
    """Return the rows' own wrong answers, at most `n` each. The truth ratio is measured on them."""
    return [[text for text in row.perturbed_answer if not _holds(text, row)][:n] for row in rows]


def swapped(rows: Sequence[QARow], train: Sequence[QARow], n: int, seed: int) -> list[list[str]]:
    """Return at most `n` answers per row that other training rows give to the same relation, or to the same last
    relation of two hops, in the same wording; none for rows that do not name them.
    """
    answers: dict[tuple[str, str], dict[str, None]] = {}
    for row in train:
        answers.setdefault(_kind(row), {})[row.answer] = None
    out = []
    for i, row in enumerate(rows):
        known = [text for text in answers.get(_kind(row), {}) if all(_kind(row)) and not _holds(text, row)]
        out.append([known[k] for k in rng(seed, "swapped", i).permutation(len(known))[:n]])
    return out


def _kind(row: QARow) -> tuple[str, str]:
    return row.relation.rsplit(".", 1)[-1], row.template


def generated(
    model: AnswerModel, tokenizer: Any, rows: Sequence[QARow], n: int, seed: int, fmt: FormatName = "auto"
) -> tuple[list[list[str]], int]:
    """Sample `n` answers per row from the model at temperature 1; fewer where they keep coming out unusable. Return
    them and the tokens that took.

    Where there is a chat template the model is asked for another answer, given the true one; otherwise it is asked the
    question, which gives little but the true answer if that is memorised. The global generators stay as they were.
    """
    chat = resolve_format(tokenizer, fmt) == "chat"
    asked = [(_request(row) if chat else row, row.answer) for row in rows]
    items = only_texts(encode_answers(tokenizer, asked, fmt))
    prompts = [item.ids[: item.start] if item.prompt is None else item.prompt for item in items]
    limit = 2 * max(item.n_answer for item in items)
    room, ends_there = position_limit(model.lm.config)
    if room is not None and ends_there:
        limit = min(limit, room - max(map(len, prompts)))
    ends = sorted({tokenizer.eos_token_id, *(int(item.ids[-1]) for item in items if item.has_eos)})
    texts: list[list[str]] = [[] for _ in rows]
    tokens = 0
    if limit < 1:
        return texts, tokens
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(ROUNDS):
            missing = [i for i, have in enumerate(texts) for _ in range(n - len(have))]
            for group in length_sorted([items[i] for i in missing], MAX_TOKENS):
                members = [missing[k] for k in group]
                drawn, read = _sampled(model.lm, [prompts[i] for i in members], limit, ends)
                tokens += read
                for i, ids in zip(members, drawn, strict=True):
                    text = "" if ids is None else tokenizer.decode(ids, skip_special_tokens=True)
                    if text.strip() and not _holds(text, rows[i]):
                        texts[i].append(text if rows[i].continues else text.strip())
    model.train(was_training)
    return texts, tokens


def _request(row: QARow) -> QARow:
    return row if row.continues else replace(row, question=REQUEST.format(question=row.question, answer=row.answer))


def _holds(text: str, row: QARow) -> bool:
    """Whether a text says the true answer, or part of it, or more than it."""
    said, truth = (" ".join(["", *re.findall(r"\w+", normalised(words)), ""]) for words in (text, row.answer))
    return truth in said or said in truth


def _sampled(
    lm: Any, prompts: Sequence[np.ndarray], limit: int, ends: Sequence[int]
) -> tuple[list[np.ndarray | None], int]:
    """Sample a text behind each prompt, None where none of the end tokens comes within `limit` tokens; return them and
    the tokens of all rows.
    """
    width, device = max(map(len, prompts)), next(lm.parameters()).device
    ids_BT = torch.full((len(prompts), width), ends[0])
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :], mask_BT[b, width - len(prompt) :] = torch.from_numpy(prompt), 1
    whole_BT = lm.generate(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), max_new_tokens=limit, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, eos_token_id=list(ends), pad_token_id=ends[0],
    )  # fmt: skip
    out: list[np.ndarray | None] = []
    for ids in whole_BT[:, width:].cpu().numpy():
        over = np.flatnonzero(np.isin(ids, ends))
        out.append(ids[: over[0]] if over.size else None)
    return out, whole_BT.numel()
