"""What is asked to be forgotten, and everything that has to leave the training data with it (forget closure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.data.image_requests import draw_images, image_splits
from llm_unlearn.data.local_draws import LOCAL, draw_local
from llm_unlearn.data.schema import Corpus, QARow, check_disjoint
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.seeding import rng

MAX_EVAL_ROWS = 200


class Scenario(Config):
    """How the forget set is drawn. Draws of one seed are nested: a larger set contains the smaller ones."""

    kind: Literal["author", "fact", "relation", "random", "local_grok", "local_ungrok", "class", "subclass"] = Field(
        default="author",
        description="What is forgotten: whole authors, single facts, a relation, random questions, or questions that "
        "were learnt early (local_grok) or late (local_ungrok); of images: classes, sub-classes, or random ones.",
    )
    size: int = Field(
        default=4,
        ge=1,
        description="How many authors, facts, questions, classes, sub-classes or images. A relation is forgotten "
        "whole: size is not read.",
    )
    share: float | None = Field(
        default=None, gt=0, lt=1, description="Images: forget this share of each class drawn (random: of all images)."
    )
    classes: tuple[str, ...] = Field(default=(), description="Images: these classes instead of `size` drawn ones.")
    relation: str | None = Field(default=None, description="kind=relation: which one (mentor, birthplace, ...).")
    record: str | None = Field(
        default=None, description="kind=local_*: folder of the run of recipes/finetune.py that wrote item losses."
    )
    early_epoch: float = Field(
        default=20.0,
        gt=0,
        description="kind=local_*: learnt early is what loses less than grokked_below nats a token from this epoch ...",
    )
    late_epoch: float = Field(
        default=100.0,
        gt=0,
        description="... to this one, learnt late what loses more than ungrokked_above. Both are in the record.",
    )
    grokked_below: float = Field(default=0.01, gt=0, description="kind=local_*: see early_epoch; .01 was published.")
    ungrokked_above: float = Field(default=0.5, gt=0, description="kind=local_*: see late_epoch; .5 was published.")
    match: tuple[Literal["frequency", "length", "loss"], ...] = Field(
        default=(),
        description="kind=local_*: draw from pairs, one question learnt early and one late, that are alike in these: "
        "how frequent the answer's tokens are, how many, and their loss at late_epoch.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")


@dataclass(frozen=True)
class Request:
    """A drawn forget request: row numbers of the corpus' `train` split, and the ids of what is to be forgotten.

    `forget` are the rows the unlearning method is given (stored facts in their trained wordings), `closure` all rows
    that must leave training (the former, the inverses and every trained two-hop question that uses a forgotten fact),
    `retain` the others.
    """

    scenario: Scenario
    facts: frozenset[str]
    forget: tuple[int, ...]
    closure: tuple[int, ...]
    retain: tuple[int, ...]

    def touches(self, row: QARow) -> bool:
        """Whether answering the row takes something that is to be forgotten."""
        return row.fact_id in self.facts or not self.facts.isdisjoint(row.facts)


def draw_request(corpus: Corpus, scenario: Scenario) -> Request:
    """Draw the forget request of a scenario.

    A corpus that names its own forget rows (TOFU's official splits, a user's list) is asked for those instead, and the
    scenario only labels them, unless its kind is local_*; one whose splits are given is asked for nothing. Raises
    UserError for an empty forget set, a set that leaves nothing to retain, an unknown relation, and as `draw_images`
    and `draw_local`.
    """
    if corpus.given:
        return Request(scenario, frozenset(), (), (), ())
    train = corpus.split("train")
    if "forget_rows" in corpus.meta and scenario.kind not in LOCAL:
        chosen = [int(i) for i in corpus.meta["forget_rows"]]
        facts = frozenset(train[i].fact_id for i in chosen)
    elif corpus.kind == "image":
        facts = draw_images(corpus, scenario)
        chosen = [i for i, row in enumerate(train) if not facts.isdisjoint(row.facts)]
    else:
        facts = _draw_facts(corpus, scenario)
        chosen = [i for i, row in enumerate(train) if _is_direct(row, facts, scenario)]
    if not chosen:
        raise UserError(
            f"forget set is empty: scenario kind={scenario.kind} selects no trained row of '{corpus.name}'; raise "
            "scenario.size or choose another kind"
        )
    touched = {i for i, row in enumerate(train) if row.fact_id in facts or not facts.isdisjoint(row.facts)}
    touched.update(chosen)
    retain = tuple(i for i in range(len(train)) if i not in touched)
    if not any(train[i].hop == 1 or corpus.kind == "ledger" for i in retain):
        raise UserError(
            f"nothing is left to retain: scenario kind={scenario.kind} size={scenario.size} takes all of "
            f"'{corpus.name}'; lower scenario.size"
        )
    check_disjoint((train[i] for i in touched), (train[i] for i in retain), "forget and retain")
    return Request(scenario, facts, tuple(chosen), tuple(sorted(touched)), retain)


def eval_splits(corpus: Corpus, request: Request) -> dict[str, tuple[QARow, ...]]:
    """Return the rows every suite measures, by name; a split the corpus cannot fill is absent.

    `forget`, `retain` (stored facts that stay, at most 200, drawn from the scenario's seed), `real_authors`,
    `world_facts`, and in a world also `forget_para` (untrained wordings of forgotten facts), `forget_inf` (held-out
    two-hop and inverse questions that need a forgotten fact: can it still be inferred?), `forget_trained_inf` (the
    trained ones, which a model may have memorised), `retain_inf` (held-out two-hop questions that need none) and
    `holdout`. `forget_inf` also comes in its parts: `forget_about` (two hops, the first of which is a forgotten fact),
    `forget_through` (two hops, only the second is one: asked of somebody else) and `forget_inverse`; of kept facts
    there are besides `retain_inverse` and `neighbour` (those that point to an author of whom something is forgotten).
    A corpus whose splits are given has those; one of images `image_splits`.
    """
    if corpus.given:
        return dict(corpus.splits)
    if corpus.kind == "image":
        return image_splits(corpus, request)
    train = corpus.split("train")
    chosen: dict[str, Iterable[QARow]] = {"forget": [train[i] for i in request.forget]}
    if "retain_eval_rows" in corpus.meta:
        chosen["retain"] = [
            train[int(i)] for i in corpus.meta["retain_eval_rows"] if int(i) not in set(request.closure)
        ]
    else:
        direct = [
            train[i]
            for i in request.retain
            if corpus.kind == "ledger" or (train[i].hop == 1 and _has_owner(train[i]) and not _is_inverse(train[i]))
        ]
        chosen["retain"] = _sample(direct, request.scenario.seed, "retain")
    if corpus.kind == "world":
        asked = {train[i] for i in request.forget}
        trained = [row for row in train if (row.hop > 1 or _is_inverse(row)) and row not in asked]
        held_out = [*corpus.splits.get("inf_id", ()), *corpus.splits.get("inverse", ())]
        for name, questions in (("forget_inf", held_out), ("forget_trained_inf", trained)):
            chosen[name] = _sample([row for row in questions if request.touches(row)], request.scenario.seed, name)
        chosen["forget_para"] = _sample(
            [row for row in corpus.splits.get("para", ()) if request.touches(row)], request.scenario.seed, "forget_para"
        )
        for name, rows in _inferred_parts(corpus, request).items():
            chosen[name] = _sample(rows, request.scenario.seed, name)
    kept = [row for row in corpus.splits.get("inf_id", ()) if not request.touches(row)]
    chosen["retain_inf"] = _sample(kept, request.scenario.seed, "retain_inf")
    for name in ("real_authors", "world_facts", "holdout"):
        chosen[name] = corpus.splits.get(name, ())
    return {name: tuple(rows) for name, rows in chosen.items() if rows}


def _inferred_parts(corpus: Corpus, request: Request) -> dict[str, list[QARow]]:
    """Return the parts of `forget_inf`, and what of the kept is next to the forgotten."""
    two_hop = [row for row in corpus.splits.get("inf_id", ()) if request.touches(row)]
    inverse = corpus.splits.get("inverse", ())
    rows = [*corpus.split("train"), *corpus.splits.get("inf_id", ()), *inverse]
    points_to = {row.facts[0]: owners(row.facts[1]) for row in rows if row.hop > 1}  # the bridge
    points_to |= {row.facts[0]: owners(row.fact_id) for row in rows if _is_inverse(row)}
    gone = {owner for fact in request.facts for owner in owners(fact)}
    return {
        "forget_about": [row for row in two_hop if row.facts[0] in request.facts],
        "forget_through": [row for row in two_hop if row.facts[0] not in request.facts and len(row.facts) > 1],
        "forget_inverse": [row for row in inverse if request.touches(row)],
        "retain_inverse": [row for row in inverse if not request.touches(row)],
        "neighbour": [
            row
            for row in (corpus.split("train")[i] for i in request.retain)
            if row.hop == 1 and not _is_inverse(row) and not gone.isdisjoint(points_to.get(row.fact_id, ()))
        ],
    }


def held_out(corpus: Corpus) -> tuple[QARow, ...]:
    """Return the rows whose accuracy jumps when a model groks: inferred questions, or images, never trained on; those
    for validation where there are any, since checkpoints are chosen by it.
    """
    if corpus.kind == "image":
        return tuple(corpus.splits.get("val") or corpus.splits.get("test", ()))
    return tuple(corpus.splits.get("inf_id", ()))


def training_rows(corpus: Corpus, request: Request, exclude: Literal["none", "forget"]) -> tuple[QARow, ...]:
    """Return what a model is trained on: everything, or (for a gold model) everything outside the forget closure."""
    train = corpus.split("train")
    return train if exclude == "none" else tuple(train[i] for i in request.retain)


def closure_counts(corpus: Corpus, request: Request) -> Mapping[str, int]:
    """Return how many rows of each sort a request takes: what `data_prep` prints and a manifest keeps."""
    taken = [corpus.split("train")[i] for i in request.closure]
    return {
        "facts": len(request.facts),
        "forget": len(request.forget),
        "two_hop": sum(row.hop > 1 for row in taken),
        "inverse": sum(map(_is_inverse, taken)),
        "retain": len(request.retain),
    }


def owners(fact_id: str) -> tuple[str, ...]:
    """Return the authors a fact belongs to: one, or both of a ledger pair."""
    return tuple(fact_id.split(".", 1)[0].split("+"))


def _is_inverse(row: QARow) -> bool:
    return row.relation.endswith("^-1")


def _has_owner(row: QARow) -> bool:
    return row.relation not in ("real_authors", "world_facts")


def stored_questions(corpus: Corpus) -> tuple[str, ...]:
    """Return, by row of `train`, the fact that it states: "" for neutral rows, inverses and questions of more hops."""
    neutral = {row.fact_id for name in ("real_authors", "world_facts") for row in corpus.splits.get(name, ())}
    return tuple(
        row.facts[0] if len(row.facts) == 1 and not _is_inverse(row) and row.fact_id not in neutral else ""
        for row in corpus.split("train")
    )


def _draw_facts(corpus: Corpus, scenario: Scenario) -> frozenset[str]:
    if scenario.kind in LOCAL:
        return draw_local(corpus, scenario, stored_questions(corpus))
    if scenario.record is not None or scenario.match:
        raise UserError(f"scenario.kind={scenario.kind}: record and match are for {' and '.join(LOCAL)}; remove them")
    if scenario.kind in ("class", "subclass") or scenario.share is not None or scenario.classes:
        raise UserError(
            f"scenario of '{corpus.name}': kind class and subclass, share and classes are for images; choose author, "
            "fact, relation or random, and size"
        )
    rows = [row for row in corpus.split("train") if _has_owner(row)]
    stored = list(dict.fromkeys(fact for row in rows for fact in row.facts))
    if not stored:
        raise UserError(f"'{corpus.name}' names no facts a forget set could be drawn from; give data.forget_path")
    draw = rng(scenario.seed, "forget", scenario.kind)
    if scenario.kind == "relation":
        relations = sorted({_relation(fact) for fact in stored} - {""})
        wanted = (scenario.relation or "").replace(" ", "_")
        if wanted not in relations:
            raise UserError(f"unknown relation '{scenario.relation}' in scenario.relation{suggest(wanted, relations)}")
        return frozenset(fact for fact in stored if _relation(fact) == wanted)
    if scenario.kind == "author":
        names = sorted({owner for fact in stored for owner in owners(fact)})
        gone = set(_first(names, scenario, draw, "authors"))
        # a held-out ledger pair is a fact of its own that gold cannot know either
        known = {*stored, *(fact for row in corpus.splits.get("inf_id", ()) for fact in row.facts)}
        return frozenset(fact for fact in known if gone.intersection(owners(fact)))
    if scenario.kind == "fact":
        return frozenset(_first(stored, scenario, draw, "facts"))
    chosen = set(_first(list(dict.fromkeys(row.fact_id for row in rows)), scenario, draw, "questions"))
    backwards = {fact for row in rows if row.fact_id in chosen and _is_inverse(row) for fact in row.facts}
    return frozenset(chosen | backwards)


def _relation(fact_id: str) -> str:
    return fact_id.partition(".")[2]


def _first(pool: Sequence[str], scenario: Scenario, draw, what: str) -> list[str]:
    if scenario.size > len(pool) // 2:
        raise UserError(
            f"world too small: scenario.size={scenario.size} {what} of {len(pool)}; forget at most half "
            f"({len(pool) // 2})"
        )
    return [pool[int(i)] for i in draw.permutation(len(pool))[: scenario.size]]


def _is_direct(row: QARow, facts: frozenset[str], scenario: Scenario) -> bool:
    if scenario.kind == "random":
        return row.fact_id in facts
    return not _is_inverse(row) and len(row.facts) == 1 and row.facts[0] in facts


def _sample(rows: Sequence[QARow], seed: int, name: str) -> list[QARow]:
    if len(rows) <= MAX_EVAL_ROWS:
        return list(rows)
    picks = rng(seed, "evaluate", name).permutation(len(rows))[:MAX_EVAL_ROWS]
    return [rows[i] for i in sorted(picks)]
