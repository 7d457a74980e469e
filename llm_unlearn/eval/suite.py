"""Suites: which metric on which split, under which name. YAML files, versioned."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import Field

from llm_unlearn.config import Config, digest, load_config
from llm_unlearn.data.source import DataKind
from llm_unlearn.data.tokenise import FormatName
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.eval.metrics.table import METRICS


class Entry(Config):
    """One number of a suite."""

    metric: str = Field(description="Name in the table of metrics.")
    split: str = Field(default="", description="Split whose records it reads; a metric of named parts needs none.")
    against: str = Field(default="", description="For an attack: the split of items no model was trained on.")
    optional: bool = Field(default=False, description="Leave it out where the data has no such split.")


class Generation(Config):
    """How the answers to one split are generated."""

    max_new_tokens: int | None = Field(default=None, ge=1, description="Longest generation; null: the suite's.")
    stop: list[str] = Field(default=[], description="Texts an answer is cut at, the first of them that occurs.")


class SuiteConfig(Config):
    """The content of a suite's file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=60, description="Name of the suite; part of a folder's name."
    )
    version: int = Field(default=1, ge=1, description="Goes up when a number of the suite changes its meaning.")
    data: DataKind | None = Field(default=None, description="Benchmark it reads; null: the data the model came from.")
    max_new_tokens: int = Field(default=64, ge=1, description="Longest generation.")
    format: FormatName = Field(
        default="auto", description="Prompt format for models that neither say their own nor have a chat template."
    )
    generation: dict[str, Generation] = Field(default={}, description="Split -> what is different there.")
    metrics: dict[str, Entry] = Field(description="Name in the results -> metric and split.")


@dataclass(frozen=True)
class Suite:
    """A checked suite."""

    config: SuiteConfig

    @property
    def digest(self) -> str:
        """Identity: the file's content and the version of every metric it names or computes one from."""
        used = {name for entry in self.config.metrics.values() for name in _with_parts(entry.metric)}
        content = self.config.model_dump(exclude={"data"})  # what is read has an identity of its own
        for entry in content["metrics"].values():
            del entry["optional"]
        if not content["generation"]:
            del content["generation"]  # suites from before it was known keep their results
        return digest({"suite": content, "metrics": {name: METRICS[name].version for name in used}})

    def on(self, splits: Collection[str]) -> Suite:
        """Return the suite without what is optional and reads a split that is none of these."""
        kept = {
            name: entry
            for name, entry in self.config.metrics.items()
            if not entry.optional or {entry.split, entry.against} - {""} <= set(splits)
        }
        return Suite(self.config.model_copy(update={"metrics": kept}))

    def splits(self) -> dict[str, frozenset[str]]:
        """Return what has to be scored: split -> subset of {"perturbed", "generation"} beyond the plain answers."""
        wanted: dict[str, set[str]] = {}
        for entry in self.config.metrics.values():
            if METRICS[entry.metric].kind == "combine":
                for part in METRICS[entry.metric].of:
                    split, _, name = part.partition("/")
                    wanted.setdefault(split, set()).update(METRICS[name].needs)
                continue
            needs = set().union(*(METRICS[name].needs for name in _with_parts(entry.metric)))
            for split in filter(None, (entry.split, entry.against)):
                wanted.setdefault(split, set()).update(needs)
        return {split: frozenset(needs - {"reference"}) for split, needs in wanted.items()}

    def generation(self, split: str) -> tuple[int, tuple[str, ...]]:
        """Return the longest generation on a split, in tokens, and the texts an answer is cut at."""
        own = self.config.generation.get(split, Generation())
        return own.max_new_tokens or self.config.max_new_tokens, tuple(own.stop)


def suite_names() -> list[str]:
    """Return the names of the suites in the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in resources.files("llm_unlearn.eval").joinpath("suites").iterdir()
        if path.name.endswith(".yaml")
    )


def load_suite(name: str) -> Suite:
    """Load a suite by name, or from a YAML file. Raises UserError for an unknown suite or metric, with a suggestion."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in suite_names():
        with resources.as_file(resources.files("llm_unlearn.eval").joinpath("suites", f"{name}.yaml")) as path:
            return _checked(path)
    else:
        raise UserError(f"unknown suite '{name}'{suggest(name, suite_names())}")
    return _checked(path)


def _with_parts(name: str) -> set[str]:
    """A metric and everything it is computed from."""
    return {name}.union(*(_with_parts(part.rpartition("/")[2]) for part in METRICS[name].of))


def _checked(path: Path) -> Suite:
    config = load_config(SuiteConfig, path)
    for name, entry in config.metrics.items():
        if entry.metric not in METRICS:
            raise UserError(f"{path}: {name}: unknown metric '{entry.metric}'{suggest(entry.metric, METRICS)}")
        kind = METRICS[entry.metric].kind
        if kind != "combine" and not entry.split:
            raise UserError(f"{path}: {name}: metric '{entry.metric}' needs a split")
        if (kind in ("attack", "relative")) != bool(entry.against):
            what = "needs" if not entry.against else "takes no"
            raise UserError(f"{path}: {name}: metric '{entry.metric}' {what} 'against', a split nothing was trained on")
    suite = Suite(config)
    for split in config.generation:
        if split not in suite.splits():
            raise UserError(f"{path}: generation: no metric reads split '{split}'{suggest(split, suite.splits())}")
    return suite
