"""The committed files of results, read and checked: what a page about all studies is made from, and nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_unlearn.errors import UserError
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.packed import unpack
from llm_unlearn.files import read_json

Numbers = list[float | None]


class Expected(NamedTuple):
    """A file that a whole set of results has: its name, what it answers, and the command that makes it."""

    name: str
    what: str
    command: str


LANGUAGE = Expected("language.json", "language", "python benchmarks/language.py --jobs 2")
VISION = (
    Expected("vision_digits_cnn.json", "images: digits, cnn", "python benchmarks/vision.py --jobs 2 --arch cnn"),
    Expected(
        "vision_digits_resnet8.json", "images: digits, resnet8", "python benchmarks/vision.py --jobs 2 --arch resnet8"
    ),
    Expected(
        "vision_digits_cnn_retuned.json",
        "images: digits, cnn, the primary contrast tuned on three seeds",
        "python benchmarks/vision.py --jobs 2 --arch cnn --arm retuned",
    ),
    Expected(
        "vision_digits_resnet8_retuned.json",
        "images: digits, resnet8, the primary contrast tuned on three seeds",
        "python benchmarks/vision.py --jobs 2 --arch resnet8 --arm retuned",
    ),
    Expected(
        "vision_digits_cnn_schedule.json",
        "images: digits, cnn, one schedule for all checkpoints",
        "python benchmarks/vision.py --jobs 2 --arch cnn --arm schedule",
    ),
    Expected(
        "vision_digits_cnn_published.json",
        "images: digits, cnn, one schedule and the published optimiser",
        "python benchmarks/vision.py --jobs 2 --arch cnn --arm published --seeds 0,1,2",
    ),
    Expected(
        "vision_fashion_mnist_cnn.json",
        "images: fashion_mnist, cnn",
        "python benchmarks/vision.py --jobs 2 --data fashion_mnist",
    ),
    Expected(
        "vision_cifar10_cnn.json",
        "images: cifar10, cnn",
        "python benchmarks/vision.py --jobs 2 --data cifar10 --data-path DIR --seeds 0,1,2",
    ),
)
LOCAL = Expected(
    "local_grokking.json",
    "local grokking on TOFU",
    "python benchmarks/local_grokking.py --tofu-dir DIR --below 0.03 --above 0.3",
)
INTERVENTIONS = (
    Expected("interventions.json", "interventions on gradients", "python benchmarks/interventions.py --jobs 2"),
    Expected(
        "interventions_apart.json",
        "interventions on gradients: what the first left open",
        "python benchmarks/interventions.py --jobs 2 --design interventions_apart",
    ),
)
PRETRAINED = Expected(
    "pretrained_start.json", "grokking from a pretrained start", "python benchmarks/pretrained_start.py --jobs 2"
)
SIMULATION = Expected(
    "stats_simulation.json", "the statistics on simulated studies", "python benchmarks/stats_simulation.py"
)

AT_LEVEL = ("main", "retuned")
"""Arms of a study whose runs deliver the step at their forget level."""


class _Part(BaseModel):
    """Part of a file; what it holds besides is not read. Numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Environment(_Part):
    """Where results were made."""

    machine: str
    cores: int | None = None


class Training(_Part):
    """A training of a study: label, when it memorised and generalised, what it took (None: not recorded)."""

    run: str
    phase: str
    ratio: float | None
    steps: int
    cpu_seconds: float
    flops: float | None = None


class Tuning(_Part):
    """What tuning chose for a method at a checkpoint."""

    scenario: str
    checkpoint: str
    method: str
    score: dict[str, Any] | None
    feasible_trials: int


class Trial(_Part):
    """A setting that tuning tried for a method at a checkpoint: by tuning seed whether it reached the forget level with
    enough left, the step kept and the fall of the kept answers' probability there (None: it broke down).
    """

    scenario: str
    checkpoint: str
    method: str
    setting: dict[str, float]
    seeds: list[int]
    reached: list[bool]
    kept: list[int | None]
    fall: list[float | None]


class Spent(_Part):
    """Finished cells of a kind, and seconds they took."""

    cells: int
    seconds: float


class ProbeRow(_Part):
    """The probes of one start model: line -> value, and where it has a null the ends of its range."""

    seed: int
    checkpoint: str
    lines: dict[str, Numbers]


class _Place(_Part):
    scenario: str
    seed: int
    checkpoint: str
    start_step: int | None
    target: float | None
    gold: Numbers
    start: Numbers
    n: Numbers


class _Run(_Part):
    place: int
    method: str
    values: Numbers
    has: list[int] | None
    trajectory: dict[str, Numbers]
    cost: dict[str, float]
    stop: str | None
    primary: int | None = None


class _Packed(_Part):
    schema_version: int
    metrics: list[str]
    primary: list[dict[str, Any]]
    places: list[_Place]
    runs: list[_Run]


class _Scenarios(_Part):
    seeds: list[int]
    checkpoints: list[str]
    methods: dict[str, Any]
    scenarios: dict[str, Any] = {}
    grid_scenarios: list[str] = []
    extra: list[dict[str, list[Any]]] = []
    primary: dict[str, Any] | None = None


class StudyContent(_Part):
    """What of a study's file is read beside its outcomes."""

    command: str
    study: _Scenarios
    cells: dict[str, dict[str, int]]
    cost: dict[str, Spent]
    left_out: list[str]
    trainings: list[Training]
    censored: list[str]
    errors: dict[str, str]
    tuned: list[Tuning]
    trials: list[Trial] = []
    outcomes: _Packed
    environment: Environment
    environments_before: list[Environment] = []
    retrained_otherwise: list[str] = []
    designs: list[str] = []
    digests: dict[str, str] = {}
    probes: list[ProbeRow] = []
    data: str = ""
    arch: str = ""
    arm: str = "main"


class _Difference(_Part):
    mean: float
    lo: float
    hi: float
    n: int


class LocalWay(_Part):
    """Questions drawn in one way: numbers by draw of those learnt early and of those learnt late."""

    seeds: list[int]
    values: list[list[float]]
    difference: _Difference | None = None


class LocalLine(_Part):
    """A measure and a method of local grokking."""

    measure: str
    method: str
    size: int
    published: tuple[float, float] | None
    as_published: LocalWay
    matched: LocalWay


class LocalRule(_Part):
    """Falls of the loss between two epochs by which a question counts as learnt early or late."""

    grokked_below: float
    ungrokked_above: float


class LocalGroups(_Part):
    """How many questions the rule finds between which epochs."""

    early_epoch: float
    late_epoch: float
    questions: dict[str, int]
    matched_pairs: int


class Local(_Part):
    """The file of benchmarks/local_grokking.py."""

    command: str
    draws: int
    rule: LocalRule
    groups: LocalGroups
    left_out: list[str]
    lines: list[LocalLine]
    environment: Environment


class Ratio(_Part):
    """A ratio to from-scratch over seeds, with its interval from three of them on."""

    mean: float
    ci: tuple[float, float] | None
    n: int


class PretrainedLine(_Part):
    """An arm of benchmarks/pretrained_start.py: how many seeds got to a mark, and what it took beside from scratch."""

    arm: str
    to: str
    reached: int
    of: int
    updates: float | None
    flops: float | None
    cpu_seconds: float | None
    updates_ratio: Ratio | None = None
    flops_ratio: Ratio | None = None
    flops_ratio_with_before: Ratio | None = None
    cpu_seconds_ratio: Ratio | None = None


class Brought(_Part):
    """A model of benchmarks/pretrained_start.py probed and made to forget: by name numbers and the step of the
    grid each lies on, or why there are none.
    """

    seed: int
    arm: str
    checkpoint: str
    values: dict[str, tuple[float | None, float]] = {}
    error: str = ""


class PretrainedRow(_Part):
    """A training of benchmarks/pretrained_start.py, or why there is none."""

    seed: int
    arm: str
    error: str = ""
    phase: str = ""
    held_out_at_fit: float | None = None
    held_out_best: float | None = None


class Forgetting(_Part):
    """The one setting at which all models of benchmarks/pretrained_start.py forget."""

    authors: int = 4
    updates: int = 200
    lr: float = 1e-4


class Pretrained(_Part):
    """The file of benchmarks/pretrained_start.py."""

    command: str
    lines: list[PretrainedLine]
    rows: list[PretrainedRow] = []
    brought: list[Brought] = []
    forgetting: Forgetting = Forgetting()
    environment: Environment


class Check(_Part):
    """A rate of the statistics on simulated studies."""

    what: str
    rate: float
    bar: tuple[float | None, float | None]
    kept: bool


class Simulation(_Part):
    """The file of benchmarks/stats_simulation.py."""

    command: str
    studies: int
    checks: dict[str, dict[str, Check | float]]
    environment: Environment


@dataclass(frozen=True)
class StudyFile:
    """A study's file, its outcomes unpacked."""

    path: Path
    content: StudyContent
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """What was studied, as a page calls it."""
        c = self.content
        return ", ".join([c.data, c.arch, *([c.arm] if c.arm != "main" else [])]) if c.arch else self.path.stem

    @property
    def title(self) -> str:
        """The same as a heading."""
        return f"Images: {self.name}" if self.content.arch else self.name.capitalize()

    @property
    def scenario(self) -> str:
        """The request that is shown first: the primary's, else the first of the grid."""
        s = self.content.study
        if s.primary is not None:
            return str(s.primary.get("scenario", ""))
        return next(iter(s.grid_scenarios or s.scenarios), "")

    def of(self, scenario: str) -> list[Outcome]:
        """Return the runs of one request."""
        return self._by_scenario.get(scenario, [])

    @cached_property
    def _by_scenario(self) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        for o in self.outcomes:
            found.setdefault(o.scenario, []).append(o)
        return found

    def planned(self, scenario: str, checkpoint: str, method: str) -> set[int]:
        """Return the seeds that the study planned for a cell."""
        s = self.content.study
        grid = (s.seeds, s.grid_scenarios or list(s.scenarios) or [""], s.checkpoints, list(s.methods))
        keys = ("seeds", "scenarios", "checkpoints", "methods")
        parts = [grid, *(tuple(e.get(k) or usual for k, usual in zip(keys, grid, strict=True)) for e in s.extra)]
        asked = (scenario, checkpoint, method)
        return {seed for part in parts if all(a in names for a, names in zip(asked, part[1:], strict=True))
                for seed in part[0]}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Every file of a folder of results that a page about the studies is made from; None or missing: not run."""

    language: StudyFile | None
    vision: tuple[StudyFile, ...]
    local: Mapping[str, Local]
    """File name -> local grokking."""
    interventions: tuple[StudyFile, ...]
    pretrained: Pretrained | None
    simulation: Simulation | None

    @property
    def studies(self) -> list[StudyFile]:
        """The studies with a primary of their own first, then those of another arm."""
        vision = sorted(self.vision, key=lambda f: (f.content.arm != "main", f.content.data != "digits", f.path.name))
        return [*([self.language] if self.language else []), *vision]

    @property
    def missing(self) -> list[Expected]:
        """What is expected and not there."""
        have = {f.path.name for f in (*self.studies, *self.interventions)} | set(self.local)
        single = ((PRETRAINED, self.pretrained), (SIMULATION, self.simulation))
        have |= {e.name for e, found in single if found}
        return [e for e in (LANGUAGE, *VISION, LOCAL, *INTERVENTIONS, PRETRAINED, SIMULATION) if e.name not in have]


def read_results(folder: Path) -> Results:
    """Read a folder of results. Raises UserError for what is no folder, and, naming it, for a file that is not whole or
    not what its name says.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of results, such as benchmarks/results")
    language = folder / LANGUAGE.name
    local = {path.name: _checked(path, Local) for path in sorted(folder.glob("local_grokking*.json"))}
    pretrained, simulation = folder / PRETRAINED.name, folder / SIMULATION.name
    intervened = (folder / expected.name for expected in INTERVENTIONS)
    return Results(
        language=_study(language) if language.exists() else None,
        vision=vision_files(folder),
        local=local,
        interventions=tuple(_study(path) for path in intervened if path.exists()),
        pretrained=_checked(pretrained, Pretrained) if pretrained.exists() else None,
        simulation=_checked(simulation, Simulation) if simulation.exists() else None,
    )


def vision_files(folder: Path) -> tuple[StudyFile, ...]:
    """Return every vision study of a folder of results, by file name."""
    return tuple(_study(path) for path in sorted(folder.glob("vision_*_*.json")))


T = TypeVar("T", bound=_Part)


def _checked(path: Path, kind: type[T], content: Any = None) -> T:
    content = read_json(path) if content is None else content
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        what = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{path}: {where}: {what}; not the results its name says, make it again") from None


def _study(path: Path) -> StudyFile:
    content = read_json(path)
    checked = _checked(path, StudyContent, content)
    packed, n = checked.outcomes, len(checked.outcomes.metrics)
    lists = [*((p.gold, p.start, p.n) for p in packed.places), *((r.values, r.has or r.values) for r in packed.runs)]
    uneven = any(len({len(v) for v in r.trajectory.values()}) > 1 for r in packed.runs)
    if uneven or any(len(values) != n for part in lists for values in part) or not _numbered(packed):
        raise UserError(f"{path}: outcomes: its tables do not fit together; make the file again")
    try:
        return StudyFile(path, checked, tuple(unpack(content["outcomes"], f"{path}: outcomes")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: outcomes: {error!r}; not what benchmarks write, make the file again") from None


def _numbered(packed: _Packed) -> bool:
    places, declared = range(len(packed.places)), range(len(packed.primary))
    return all(r.place in places for r in packed.runs) and all(
        r.primary is None or r.primary in declared for r in packed.runs
    )
