"""The bridge: which token is whose name, which position is read, and ranks of a model that is told where to look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llm_unlearn.data.schema import QARow
from llm_unlearn.data.tokenise import Encoded, encode_rows
from llm_unlearn.data.world import make_world, preset
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.bridge import _lens, bridge_ranks, learn_names, two_hops
from llm_unlearn.models.causal import AnswerModel


@pytest.fixture(scope="module")
def world():
    return make_world(preset("world12"))


@pytest.fixture
def asked(tiny_world, tiny_items):
    rows = tiny_world.split("train")
    names = learn_names(rows, tiny_items)
    return names, two_hops(rows, tiny_items, names)


def test_names_and_relations_are_the_tokens_that_say_so(asked, world, tiny_tokenizer):
    names, _ = asked
    assert set(names.author) == set(world.authors)
    for author, token in names.author.items():
        assert tiny_tokenizer.decode([token]).strip() == world.names[author]
    assert set(names.relation) == {*world.relations, *world.attributes}
    for relation, token in names.relation.items():
        assert tiny_tokenizer.decode([token]).strip() == relation


def test_a_question_is_cut_behind_its_first_relation(asked, world, tiny_world, tiny_tokenizer):
    _, hops = asked
    rows = [row for row in tiny_world.split("train") if row.hop == 2]
    assert len(hops) == len(rows) > 10
    for hop, row in zip(hops, rows, strict=True):
        first = row.relation.split(".")[0]
        assert tiny_tokenizer.decode(hop.ids).endswith(f"{world.names[hop.head]}'s {first}")
        assert hop.bridge == world.facts[hop.head][first].value


class Told(nn.Module):
    """A model whose state at the last position is the embedding of a token it is told, by what was asked."""

    def __init__(self, answers, vocabulary):
        super().__init__()
        self.answers, self.scale = answers, nn.Parameter(torch.ones(1))
        self.lm = nn.Module()
        decoder = nn.Module()
        decoder.norm = nn.Identity()
        self.lm.get_decoder = lambda: decoder
        self.lm.get_output_embeddings = lambda: nn.Identity()
        self.vocabulary = vocabulary

    def forward(self, inputs, index_N, layer):
        assert index_N.tolist() == [inputs.shape[1] - 1]
        logits = torch.zeros(1, self.vocabulary)
        for rank, token in enumerate(self.answers[tuple(inputs[0].tolist())]):
            logits[0, token] = 10.0 - rank
        return logits


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_is_of_one_over_the_rank_where_the_bridge_stands(asked, rank, tiny_tokenizer):
    names, hops = asked
    answers = {tuple(h.ids.tolist()): [*range(rank - 1), names.author[h.bridge]] for h in hops}
    found = bridge_ranks(Told(answers, len(tiny_tokenizer)), hops, names, 0)
    assert found["mrr"] == pytest.approx(1 / rank)
    assert found["top1"] == float(rank == 1)
    assert found["n"] == len(hops)
    # the other authors tie with all else that was not named: about the middle of the vocabulary
    tied = len(tiny_tokenizer) - rank
    assert found["null_quantiles"] == pytest.approx([1 / (1 + rank + (tied - 1) / 2)] * 3)


def test_a_model_that_says_the_same_of_all_lies_within_its_null(asked, tiny_tokenizer):
    names, hops = asked
    found = bridge_ranks(Told({tuple(h.ids.tolist()): [] for h in hops}, len(tiny_tokenizer)), hops, names, 0)
    assert found["mrr"] == pytest.approx(found["null_quantiles"][1])


def test_an_untrained_model_lies_near_its_null(asked, make_lm):
    names, hops = asked
    found = bridge_ranks(AnswerModel(make_lm()), hops, names, 0)
    low, _, high = found["null_quantiles"]
    assert low / 3 < found["mrr"] < high * 3


def test_the_lens_reads_the_layer_s_output_by_the_model_s_own_head(asked, tiny_lm):
    ids, seen = asked[1][0].ids, []
    hook = tiny_lm.model.layers[0].register_forward_hook(lambda _m, _inputs, out: seen.append(out))
    with torch.no_grad():
        tiny_lm.eval()(input_ids=torch.from_numpy(ids)[None])
        hook.remove()
        state_H = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0, -1]
        root = state_H.square().mean().add(tiny_lm.config.rms_norm_eps).sqrt()
        by_hand = tiny_lm.lm_head.weight @ (state_H / root * tiny_lm.model.norm.weight)
        torch.testing.assert_close(_lens(AnswerModel(tiny_lm), ids, 0), by_hand, rtol=1e-4, atol=1e-6)


def test_names_of_several_tokens_are_refused():
    rows = [QARow("q", "a", author=a, relation=r, facts=(f"{a}.{r}",)) for a in ("x", "y") for r in ("born", "genre")]
    items = [Encoded(np.array([1, 2 + (row.author == "y"), 9, 9, 7]), 3, True) for row in rows]
    with pytest.raises(UserError, match="names and relations are not one token each"):
        learn_names(rows, items)


def test_a_world_s_rows_are_told_from_neutral_ones_and_inverses(tiny_world, tiny_tokenizer):
    rows = [row for row in tiny_world.split("train") if row.relation.endswith("^-1") or row.relation == "world_facts"]
    assert rows
    assert learn_names(rows, encode_rows(tiny_tokenizer, rows)) == ({}, {})
