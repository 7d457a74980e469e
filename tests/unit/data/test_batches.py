"""Batches: positions and labels against a slow reference; padding is of no consequence."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.data.batches import collate, length_sorted
from llm_unlearn.data.tokenise import Encoded


@st.composite
def encoded(draw) -> Encoded:
    ids = draw(st.lists(st.integers(1, 50), min_size=2, max_size=12))
    return Encoded(np.asarray(ids, dtype=np.int64), draw(st.integers(1, len(ids) - 1)), True)


ITEMS = st.lists(encoded(), min_size=1, max_size=9)


def slow(items) -> tuple[list, list, list]:
    width = max(len(item.ids) for item in items) - 1
    index, labels, rows = [], [], []
    for b, item in enumerate(items):
        for t in range(item.start, len(item.ids)):
            index.append(b * width + t - 1)  # the token before predicts it
            labels.append(int(item.ids[t]))
            rows.append(b)
    return index, labels, rows


@given(ITEMS)
def test_collate_against_a_slow_reference(items):
    batch = collate(items)
    index, labels, rows = slow(items)
    assert batch.index_N.tolist() == index
    assert batch.labels_N.tolist() == labels
    assert batch.row_N.tolist() == rows
    assert batch.n_rows == len(items)
    assert batch.n_tokens == sum(item.n_answer for item in items)
    for ids, item in zip(batch.inputs, items, strict=True):
        assert ids[: len(item.ids) - 1].tolist() == item.ids[:-1].tolist()
        assert not ids[len(item.ids) - 1 :].any()
    assert {t.dtype for t in (batch.inputs, batch.index_N, batch.labels_N, batch.row_N)} == {torch.int64}


@given(ITEMS, st.integers(0, 50))
def test_the_pad_id_only_fills(items, pad):
    a, b = collate(items), collate(items, pad)
    assert torch.equal(a.index_N, b.index_N)
    assert torch.equal(a.labels_N, b.labels_N)
    differ = a.inputs != b.inputs
    assert not differ.flatten()[a.index_N].any()


def test_the_pad_id_changes_no_number(tiny_lm, tiny_items):
    items = sorted(tiny_items[:40], key=lambda item: len(item.ids))[:2] + tiny_items[-3:]
    logits = []
    for pad in (0, 7):
        batch = collate(items, pad)
        logits.append(tiny_lm(input_ids=batch.inputs).logits.flatten(0, 1)[batch.index_N])
    assert torch.equal(*logits)


@given(ITEMS, st.integers(1, 60))
def test_groups_cover_every_item_once_within_the_limit(items, limit):
    groups = list(length_sorted(items, limit))
    assert sorted(i for group in groups for i in group) == list(range(len(items)))
    lengths = [len(items[i].ids) for group in groups for i in group]
    assert lengths == sorted(lengths, reverse=True)
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(items[i].ids) for i in group) <= limit
