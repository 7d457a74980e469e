"""A world's stored facts as plain text: what a model reads before it is asked questions."""

from __future__ import annotations

from llm_unlearn.data.qa import pieces
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.world import World, WorldConfig, text


def statement_rows(world: World) -> list[QARow]:
    """Return every stored fact of the trained authors in every wording (`Dmitri Malik's mentor is Ines Tamm.`), as rows
    that continue an empty text. No two-hop question is answered by one of them.
    """
    return [
        QARow(
            question="",
            answer=wording.replace("|", "").format(
                author=f" {world.names[author]}", relation=f" {fact.relation}", value=f" {world.says(fact)}"
            ),
            author=author,
            relation=fact.relation,
            fact_id=fact.id,
            template=f"s{k}",
            facts=(fact.id,),
            continues=True,
        )
        for author in world.authors
        for fact in world.facts[author].values()
        for k, wording in enumerate(text("wordings")["statements"])
    ]


def text_pieces(config: WorldConfig) -> list[str]:
    """Return the tokens of the world's questions (`qa.pieces`) and of its statements, longest first; questions are
    split as without them.
    """
    found = set(pieces(config))
    for wording in text("wordings")["statements"]:
        found.update(part for part in wording.split("|") if "{" not in part)
    return sorted(found, key=lambda piece: (-len(piece), piece))
