"""Plain text of a world: every stored fact, nothing else, in tokens that leave questions as they were."""

from __future__ import annotations

import pytest

from llm_unlearn.data.qa import pieces, world_corpus
from llm_unlearn.data.schema import read_rows, write_rows
from llm_unlearn.data.statements import statement_rows, text_pieces
from llm_unlearn.data.tokenise import encode_rows, pieces_tokenizer
from llm_unlearn.data.world import make_world, preset


@pytest.mark.parametrize("name", ["world12", "short40", "world80"])
def test_statements_are_the_stored_facts_and_their_tokens_are_known(name, tmp_path):
    config = preset(name)
    world = make_world(config)
    rows = statement_rows(world)
    facts = {f.id: f for author in world.authors for f in world.facts[author].values()}
    assert len(rows) == 3 * len(facts)
    assert {row.fact_id for row in rows} == set(facts)
    for row in rows:
        fact = facts[row.fact_id]
        assert world.names[fact.author] in row.answer
        assert world.says(fact) in row.answer
        assert f" {fact.relation}" in row.answer
    held_out = set(world.holdout)
    assert not any(world.names[a] in row.answer for a in held_out for row in rows)
    write_rows(tmp_path / "text.jsonl", rows)
    assert read_rows(tmp_path / "text.jsonl") == rows
    tokenizer = pieces_tokenizer(text_pieces(config))
    for row, item in zip(rows, encode_rows(tokenizer, rows), strict=True):
        assert tokenizer.unk_token_id not in item.ids
        assert tokenizer.decode(item.ids) == row.answer
        assert not item.has_eos


def test_questions_are_split_as_without_statements():
    config = preset("short40")
    plain, with_text = pieces_tokenizer(pieces(config)), pieces_tokenizer(text_pieces(config))
    for split, rows in world_corpus(config).splits.items():
        for a, b in zip(encode_rows(plain, rows), encode_rows(with_text, rows), strict=True):
            assert plain.convert_ids_to_tokens(a.ids) == with_text.convert_ids_to_tokens(b.ids), split
            assert a.start == b.start


def test_hop_wordings_ask_the_same_questions_more_often():
    config = preset("world12")
    once, often = (world_corpus(config.model_copy(update={"hop_wordings": n})) for n in (1, 4))
    assert {k: v for k, v in once.splits.items() if k != "train"} == {
        k: v for k, v in often.splits.items() if k != "train"
    }
    assert set(once.split("train")) <= set(often.split("train"))
    hops = [[row for row in corpus.split("train") if row.hop == 2] for corpus in (once, often)]
    assert len(hops[1]) == 4 * len(hops[0])
    assert {row.fact_id for row in hops[0]} == {row.fact_id for row in hops[1]}
    assert len({(row.fact_id, row.template) for row in hops[1]}) == len(hops[1])
    answers = {row.fact_id: row.facts for row in hops[0]}
    assert all(row.facts == answers[row.fact_id] for row in hops[1])
