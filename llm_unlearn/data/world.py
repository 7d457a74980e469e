"""The embedded world: fictitious authors, their random facts, and which facts may be combined, as a pure function of a
seed.

TOFU as shipped cannot be expected to grok: each of its facts is independent and asked once, so a generalising solution
stores as much as a memorising one. Here facts are random too (forgetting one is meaningful) but two of them can be
chained ("Whose birthplace ... her mentor's?"), and the chained questions are what a model first memorises and much
later infers (Wang et al. 2024, arXiv 2405.15071, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import Field
from ruamel.yaml import YAML

from llm_unlearn.config import Config
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.seeding import rng


@cache
def text(name: str) -> dict[str, Any]:
    """Return one of the package's word lists (`names`, `wordings`, `neutral`) as plain data."""
    source = resources.files("llm_unlearn.data").joinpath("text", f"{name}.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(source)


class WorldConfig(Config):
    """What decides a world. Two equal configs give the same world, byte for byte."""

    seed: int = Field(default=0, ge=0, description="Seed of names, facts and of which questions are held out.")
    n_authors: int = Field(default=40, ge=8, description="Authors whose facts are trained.")
    n_holdout: int = Field(default=4, ge=0, description="Further authors that no model ever sees.")
    n_relations: int = Field(default=6, ge=1, description="Functions author -> author (mentor, editor, ...).")
    n_attributes: int = Field(default=4, ge=1, description="Functions author -> value (birthplace, genre, ...).")
    values_per_attribute: int = Field(
        default=12, ge=6, le=20, description="Values an attribute can take; one is right and five are the wrong ones."
    )
    n_invertible: int = Field(
        default=2, ge=0, description="How many relations are also asked backwards (Whose editor is X?)."
    )
    wordings: int = Field(
        default=2,
        ge=1,
        le=3,
        description="Question wordings each stored fact is trained in, of 4; the others are held out (`para`).",
    )
    phi: float = Field(
        default=4.8,
        gt=0,
        description="Trained two-hop questions per stored fact. The strongest lever: more of them, earlier grokking.",
    )
    hop_wordings: int = Field(
        default=1,
        ge=1,
        le=4,
        description="Question wordings each trained two-hop question is trained in: more of them is hop augmentation.",
    )
    held_out: float = Field(
        default=0.10, gt=0, lt=1, description="Share of the two-hop questions held out (`inf_id`): the grokking axis."
    )
    support: int = Field(
        default=3,
        ge=0,
        description="A two-hop question is held out only if each of its facts stands in the same place of this many "
        "trained ones at least; without that it is not in distribution.",
    )
    ood: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the facts that are in no trained two-hop question (`inf_ood`); pays from 80 authors on.",
    )
    answers: Literal["sentence", "short"] = Field(default="sentence", description="'It is Oslo.' or 'Oslo'.")


PRESETS: dict[str, WorldConfig] = {
    "world12": WorldConfig(
        n_authors=12,
        n_holdout=2,
        n_relations=3,
        n_attributes=2,
        values_per_attribute=6,
        n_invertible=1,
        phi=2.0,
        support=1,
    ),
    "world40": WorldConfig(),
    "short40": WorldConfig(answers="short", phi=5.2),
    "world80": WorldConfig(n_authors=80, n_relations=10, n_attributes=4, phi=5.5, ood=0.2),
    "world200": WorldConfig(
        n_authors=200, n_holdout=20, n_relations=14, n_attributes=6, values_per_attribute=20, phi=7.0, ood=0.2
    ),
}


def preset(name: str) -> WorldConfig:
    """Return a named preset, or raise a UserError that suggests one."""
    if name not in PRESETS:
        raise UserError(f"unknown world preset '{name}'{suggest(name, PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class Fact:
    """One stored fact: `value` is an author id for a relation, and text for an attribute."""

    author: str
    relation: str
    value: str

    @property
    def id(self) -> str:
        """Identity of the fact, for example `a012.birthplace`."""
        return f"{self.author}.{self.relation.replace(' ', '_')}"


@dataclass(frozen=True)
class World:
    """Authors and facts. `facts[author][relation]` finds one; `names[author]` is what a question says."""

    config: WorldConfig
    names: dict[str, str]
    relations: tuple[str, ...]
    attributes: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    facts: dict[str, dict[str, Fact]]
    holdout: tuple[str, ...]

    @property
    def authors(self) -> tuple[str, ...]:
        """The authors whose facts are trained."""
        return tuple(a for a in self.names if a not in self.holdout)

    @property
    def invertible(self) -> tuple[str, ...]:
        """The relations that are also asked backwards: permutations of the authors."""
        return self.relations[: self.config.n_invertible]

    def says(self, fact: Fact) -> str:
        """Return the answer's entity as text."""
        return self.names[fact.value] if fact.relation in self.relations else fact.value

    def alternatives(self, fact: Fact) -> tuple[str, ...]:
        """Return every wrong answer of the right type, in a fixed order."""
        if fact.relation in self.relations:
            return tuple(self.names[a] for a in self.authors if a not in (fact.value, fact.author))
        return tuple(v for v in self.values[fact.relation] if v != fact.value)


def make_world(config: WorldConfig) -> World:
    """Build the world of a config. Raises UserError when the word lists are too short for it."""
    names_text = text("names")
    relations, attributes = tuple(names_text["relations"]), tuple(names_text["attributes"])
    for wanted, have, what in (
        (config.n_relations, len(relations), "n_relations"),
        (config.n_attributes, len(attributes), "n_attributes"),
        (config.n_invertible, config.n_relations, "n_invertible"),
        (config.n_authors + config.n_holdout, 3600, "n_authors"),
    ):
        if wanted > have:
            raise UserError(f"world: {what}={wanted} is more than the {have} there are; lower it")
    names = _draw_names(config)
    relations, attributes = relations[: config.n_relations], attributes[: config.n_attributes]
    values = {a: tuple(names_text["attributes"][a][: config.values_per_attribute]) for a in attributes}
    ids = list(names)
    trained, holdout = ids[: config.n_authors], tuple(ids[config.n_authors :])
    facts: dict[str, dict[str, Fact]] = {a: {} for a in ids}
    for position, relation in enumerate(relations):
        targets = _author_targets(config, relation, len(trained), permutation=position < config.n_invertible)
        for i, author in enumerate(ids):
            facts[author][relation] = Fact(author, relation, trained[targets[i]])
    for attribute in attributes:
        draws = rng(config.seed, "attribute", attribute).integers(config.values_per_attribute, size=len(ids))
        for i, author in enumerate(ids):
            facts[author][attribute] = Fact(author, attribute, values[attribute][draws[i]])
    return World(config, names, relations, attributes, values, facts, holdout)


def _draw_names(config: WorldConfig) -> dict[str, str]:
    first, last = text("names")["first"], text("names")["last"]
    n = config.n_authors + config.n_holdout
    picks = rng(config.seed, "names").permutation(len(first) * len(last))[:n]
    return {f"a{i:03d}": f"{first[p // len(last)]} {last[p % len(last)]}" for i, p in enumerate(picks)}


def _author_targets(config: WorldConfig, relation: str, n: int, *, permutation: bool) -> list[int]:
    """Return for each author, holdout authors last, the index of a trained author that is never itself.

    Only relations that are asked backwards are permutations. Making all of them permutations gives every author equally
    many two-hop questions as a bridge, but then none is a frequent one, and held-out accuracy rises later (seed 0: .37
    instead of .62 at step 1,488).
    """
    draw = rng(config.seed, "relation", relation)
    if permutation:
        order = draw.permutation(n)
        # a single cycle through all authors: a permutation without fixed points
        targets = {int(order[i]): int(order[(i + 1) % n]) for i in range(n)}
        head = [targets[i] for i in range(n)]
    else:
        head = [int(t + (t >= i)) for i, t in enumerate(draw.integers(n - 1, size=n))]
    return head + [int(t) for t in draw.integers(n, size=config.n_holdout)]
