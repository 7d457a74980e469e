"""From a world to question-answer rows: which questions exist, which are trained, which are held out, and how they are
worded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.world import Fact, World, WorldConfig, make_world, text
from llm_unlearn.errors import UserError
from llm_unlearn.seeding import rng

N_PERTURBED = 5
MIN_OOD_QUESTIONS = 100
Chain = tuple[Fact, Fact]


def world_corpus(config: WorldConfig, name: str = "world") -> Corpus:
    """Return the world's splits, a pure function of the config.

    Splits: `train` (every stored fact in `wordings` wordings, the trained two-hop questions, half of the inverse
    questions and both neutral sets), `inf_id` (held-out two-hop questions over facts that other two-hop questions use:
    the grokking axis), `inf_ood` (two-hop questions over two facts that no trained two-hop question uses; left empty
    below 100 questions), `para` (the untrained wordings of stored facts), `inverse` (the untrained inverse questions),
    `real_authors`, `world_facts`, `holdout`.

    Raises UserError when the world has too few two-hop questions for `phi`.
    """
    world = make_world(config)
    facts = [fact for author in world.authors for fact in world.facts[author].values()]
    wordings = tuple(text("wordings")["questions"])
    trained_in = _trained_wordings(config, facts, wordings)
    atomic = [_direct(world, f, w) for f in facts for w in trained_in[f.id]]
    para = [_direct(world, f, w) for f in facts for w in wordings if w not in trained_in[f.id]]
    two_hop, inf_id, inf_ood = _two_hop(world, facts, wordings)
    inverse, inverse_held_out = _inverse(world)
    neutral = {part: neutral_rows(part) for part in ("real_authors", "world_facts")}
    holdout = [_direct(world, f, "w0") for author in world.holdout for f in world.facts[author].values()]
    splits = {
        "train": [*atomic, *two_hop, *inverse, *neutral["real_authors"], *neutral["world_facts"]],
        "inf_id": inf_id,
        "inf_ood": inf_ood if len(inf_ood) >= MIN_OOD_QUESTIONS else [],
        "para": para,
        "inverse": inverse_held_out,
        **neutral,
        "holdout": holdout,
    }
    meta = {
        "config": config.model_dump(),
        "seed": config.seed,
        "authors": list(world.authors),
        "relations": [*world.relations, *world.attributes],
    }
    return Corpus(name, "world", {k: tuple(v) for k, v in splits.items() if v}, meta)


def neutral_rows(part: str) -> list[QARow]:
    """Return the `real_authors` or `world_facts` rows: facts about the real world, each with five wrong answers."""
    source = text("neutral")[part]
    answers = list(source["facts"].values())
    rows = []
    for i, (subject, answer) in enumerate(source["facts"].items()):
        wrong = [answers[(i + k) % len(answers)] for k in range(1, N_PERTURBED + 1)]
        question = source["ask"].replace("|", "").format(subject=subject)
        rows.append(
            QARow(
                question,
                answer,
                perturbed_answer=tuple(wrong),
                author=f"{part}.{i}",
                relation=part,
                fact_id=f"{part}.{i}",
                template="w0",
                facts=(f"{part}.{i}",),
            )
        )
    return rows


def pieces(config: WorldConfig) -> list[str]:
    """Return every token the world's texts are made of, longest first, so that a greedy split finds them again.

    Names, and the constant parts of a wording, are one token each; relation words and the possessive are tokens of
    their own. Merging across relation words would fuse the pair of relations of a two-hop question and make it a stored
    fact again; merging the possessive into them delays grokking (seed 0: held-out accuracy .28 instead of .62 after
    1,488 steps).
    """
    world = make_world(config)
    wordings = text("wordings")
    found = {".", "?", "'s"}
    found.update(f" {name}" for name in world.names.values())
    found.update(f" {relation}" for relation in (*world.relations, *world.attributes))
    found.update(f" {value}" for values in world.values.values() for value in values)
    for wording in wordings["questions"].values():
        found.update(
            part for key in ("person", "value", "answer") for part in wording[key].split("|") if "{" not in part
        )
    for wording in wordings["inverse"].values():
        found.update(part for part in wording["question"].split("|") if "{" not in part)
    found.update(part for sentence in wordings["refusals"] for part in sentence.split("|"))
    for source in text("neutral").values():
        found.update(part for part in source["ask"].split("|") if "{" not in part)
        found.update(f" {word}" for pair in source["facts"].items() for word in pair)
    return sorted(found, key=lambda piece: (-len(piece), piece))


def _trained_wordings(config: WorldConfig, facts: Sequence[Fact], wordings: Sequence[str]) -> dict[str, list[str]]:
    draw = rng(config.seed, "wordings")
    return {f.id: [wordings[int(i)] for i in sorted(draw.permutation(len(wordings))[: config.wordings])] for f in facts}


def _answer(world: World, wording: str, value: str) -> str:
    if world.config.answers == "short":
        return value
    return text("wordings")["questions"][wording]["answer"].replace("|", "").format(value=f" {value}").strip()


def _ask(world: World, chain: str, wording: str, *, person: bool) -> str:
    template = text("wordings")["questions"][wording]["person" if person else "value"]
    return template.replace("|", "").format(chain=f" {chain}")


def _row(world: World, head: str, path: Sequence[str], answer: Fact, used: Sequence[Fact], wording: str) -> QARow:
    chain = world.names[head] + "".join(f"'s {relation}" for relation in path)
    person = answer.relation in world.relations
    identity = ".".join([head, *(relation.replace(" ", "_") for relation in path)])
    other = text("wordings")["questions"][wording]["paraphrase"]
    right, wrong = world.says(answer), world.alternatives(answer)
    picks = rng(world.config.seed, "perturbed", identity).permutation(len(wrong))[:N_PERTURBED]
    return QARow(
        question=_ask(world, chain, wording, person=person),
        answer=_answer(world, wording, right),
        paraphrased_question=_ask(world, chain, other, person=person),
        paraphrased_answer=_answer(world, other, right),
        perturbed_answer=tuple(_answer(world, other, wrong[i]) for i in picks),
        author=head,
        relation=".".join(path),
        hop=len(path),
        fact_id=identity,
        template=wording,
        facts=tuple(f.id for f in used),
    )


def _direct(world: World, fact: Fact, wording: str) -> QARow:
    return _row(world, fact.author, [fact.relation], fact, [fact], wording)


def _chains(world: World, facts: Sequence[Fact]) -> Iterator[Chain]:
    """Yield (first, second) for every two-hop question "first.author's first.relation's second.relation"."""
    for first in facts:
        if first.relation in world.relations:
            for second in world.facts[first.value].values():
                yield first, second


def _two_hop(
    world: World, facts: Sequence[Fact], wordings: Sequence[str]
) -> tuple[list[QARow], list[QARow], list[QARow]]:
    """Return trained, held-out in-distribution and out-of-distribution two-hop rows; a question with one foot in each
    is dropped.
    """
    config = world.config
    draw = rng(config.seed, "two_hop")
    ood = {facts[i].id for i in draw.permutation(len(facts))[: round(config.ood * len(facts))]}
    chains = list(_chains(world, facts))
    known = [c for c in chains if c[0].id not in ood and c[1].id not in ood]
    trained, held_out = _hold_out(config, known, draw.permutation(len(known)), round(config.phi * len(facts)))
    said = draw.integers(len(wordings), size=len(chains))

    def rows(selected: Sequence[Chain], offset: int, n_wordings: int = 1) -> list[QARow]:
        return [
            _row(
                world,
                a.author,
                [a.relation, b.relation],
                b,
                [a, b],
                wordings[(int(said[(offset + i) % len(chains)]) + k) % len(wordings)],
            )
            for i, (a, b) in enumerate(selected)
            for k in range(n_wordings)
        ]

    outside = [c for c in chains if c[0].id in ood and c[1].id in ood]
    return (
        rows(trained, 0, config.hop_wordings),
        rows(held_out, len(trained)),
        rows(outside, len(trained) + len(held_out)),
    )


def _hold_out(
    config: WorldConfig, known: Sequence[Chain], order: np.ndarray, n_train: int
) -> tuple[list[Chain], list[Chain]]:
    """Return (trained, held out). Only what the trained ones support is held out: a fact that no trained question looks
    up in second place is stored where the second hop never reads, and questions that need one still fail long after the
    jump.
    """
    n_held_out = round(config.held_out * len(known))
    if n_held_out < 1 or n_train > len(known) - n_held_out:
        raise UserError(
            f"world too small: phi={config.phi} asks for {n_train} trained two-hop questions, "
            f"{len(known) - n_held_out} are left beside "
            f"{n_held_out} held out; lower phi or add relations"
        )
    trained = [known[i] for i in np.sort(order[:n_train])]
    first, second = (Counter(chain[place].id for chain in trained) for place in (0, 1))
    supported = [
        (a, b) for a, b in (known[i] for i in order[n_train:]) if min(first[a.id], second[b.id]) >= config.support
    ]
    if len(supported) < n_held_out:
        raise UserError(
            f"world too small: {n_held_out} two-hop questions are to be held out, {len(supported)} have facts that "
            f"{config.support} trained ones use in the same place; lower support, phi or held_out, or add relations"
        )
    return trained, supported[:n_held_out]


def _inverse(world: World) -> tuple[list[QARow], list[QARow]]:
    """Return trained and held-out "Whose editor is X?" rows. None would be learnt if none were trained (Allen-Zhu & Li,
    arXiv 2309.14402).
    """
    facts = [world.facts[author][relation] for relation, author in product(world.invertible, world.authors)]
    order = rng(world.config.seed, "inverse").permutation(len(facts))
    half = len(facts) // 2
    trained = [_inverse_row(world, facts[i], tuple(text("wordings")["inverse"])) for i in sorted(order[:half])]
    # a small world may train fewer wordings than there are: the others would be unknown words
    known = tuple(sorted({row.template for row in trained}))
    return trained, [_inverse_row(world, facts[i], known) for i in sorted(order[half:])] if known else []


def _inverse_row(world: World, fact: Fact, keys: Sequence[str]) -> QARow:
    wordings = text("wordings")
    wording = keys[int(rng(world.config.seed, "inverse wording", fact.id).integers(len(keys)))]
    other = wordings["questions"][wording]["paraphrase"]
    wrong = [world.names[a] for a in world.authors if a not in (fact.author, fact.value)]
    picks = rng(world.config.seed, "perturbed", fact.id, "inverse").permutation(len(wrong))[:N_PERTURBED]

    def ask(key: str) -> str:
        return (
            wordings["inverse"][key]["question"]
            .replace("|", "")
            .format(relation=f" {fact.relation}", value=f" {world.says(fact)}")
        )

    return QARow(
        question=ask(wording),
        answer=_answer(world, wording, world.names[fact.author]),
        paraphrased_question=ask(other),
        paraphrased_answer=_answer(world, other, world.names[fact.author]),
        perturbed_answer=tuple(_answer(world, other, wrong[i]) for i in picks),
        author=fact.author,
        relation=f"{fact.relation}^-1",
        hop=1,
        fact_id=f"{fact.value}.{fact.relation}^-1",
        template=wording,
        facts=(fact.id,),
    )
