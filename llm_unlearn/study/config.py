"""What a study is: a grid of seeds, checkpoints and methods over one grokking design."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llm_unlearn.attacks.config import RelearnConfig
from llm_unlearn.config import Config, load_config
from llm_unlearn.data.splits import Scenario
from llm_unlearn.eval.primary import Primary
from llm_unlearn.files import sha256_file
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.detector import KINDS
from llm_unlearn.train.config import LoopConfig
from llm_unlearn.unlearn.config import UnlearnConfig


class TuneConfig(Config):
    """What `llm-unlearn tune` searches: equally many trials of equally many updates for every method and checkpoint, on
    worlds and forget sets that the study never measures (data that is given, as by `data.path`, is one world for all
    seeds: then on other forget sets of it).

    The budget is that of the run's own updates, an edit's reinforced model included; edits that take no updates have
    their whole grid tried. A model that whp reinforces before them takes its own `reinforce_updates` besides, which
    count in its cost.
    """

    seeds: tuple[int, ...] = Field(
        default=(100,),
        min_length=1,
        description="Seeds that are tuned on; none of the study's own, whose numbers they decide.",
    )
    scenarios: tuple[str, ...] = Field(default=(), description="Which of `scenarios` are tuned on; empty: all of them.")
    lrs: tuple[float, ...] = Field(
        default=(1e-4, 3e-4, 1e-3),
        min_length=2,
        description="Learning rates; a method with few knobs gets more between them.",
    )
    trials: int = Field(default=6, ge=1, description="Settings tried per method and checkpoint, each on every seed.")
    updates: int | None = Field(
        default=None, ge=1, description="Most updates of a trial; null: unlearn.loop.max_steps."
    )
    draw: int = Field(
        default=0, ge=0, description="Seed of the random subset of a grid with more settings than trials."
    )


class Control(Config):
    """A training of its own that a checkpoint of the main run is compared with: the same but for `changes`."""

    take: Literal["early", "fit", "grok", "post", "last"] = Field(
        description="Checkpoint kind of the control's run to unlearn from; last: the end of a run of watch.until: "
        "max_steps."
    )
    changes: dict[str, Any] = Field(
        default_factory=dict, description="What differs from `grok`, for example {optim: {weight_decay: 0.0}}."
    )
    match: str | None = Field(
        default=None, description="Checkpoint whose accuracy it is meant to have; a comparison says how near it is."
    )


class Extra(Config):
    """Cells beyond the grid. Left empty, a list is that of the grid."""

    seeds: tuple[int, ...] = Field(default=(), description="Seeds; others than the grid's are trained for it.")
    checkpoints: tuple[str, ...] = Field(default=(), description="Checkpoint kinds and controls.")
    methods: tuple[str, ...] = Field(default=(), description="Names in `methods`.")
    scenarios: tuple[str, ...] = Field(default=(), description="Names in `scenarios`.")


class StudyConfig(Config):
    """Train a model and its gold per seed, unlearn from every checkpoint with every method, evaluate all against gold.

    The seed is the unit: it draws the world, the forget set, the initial weights and every order.
    """

    out: str = Field("studies/quickstart", description="Folder of the study: its runs, and one JSON per cell.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds.")
    checkpoints: tuple[str, ...] = Field(
        tuple(KINDS),
        min_length=1,
        description="What to unlearn from: checkpoint kinds of the main run (early, fit, fit_scaled, fit_normed, grok, "
        "post) and names of `controls`. What no checkpoint needs is not trained.",
    )
    controls: dict[str, Control] = Field(
        default_factory=dict,
        description="Name -> a training of its own, with golds of its own, for example "
        "{easy: {take: fit, changes: {optim: {weight_decay: 2.0}, watch: {until: fit}}}}.",
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict(knobs) for name, knobs in DEFAULT_METHODS.items()},
        description="Name in the results -> what differs from `unlearn`, for example {optim: {lr: 1e-4}}; "
        "method.name defaults to the name. What is set here, llm-unlearn tune does not search.",
    )
    scenarios: dict[str, Scenario] = Field(
        default_factory=dict,
        description="Name -> what is forgotten, for several requests in one study: the model is trained once per seed, "
        "gold once per scenario (compare one folder unlearn/NAME at a time). Empty: grok.scenario alone.",
    )
    grid_scenarios: tuple[str, ...] = Field(
        default=(), description="Which of `scenarios` the grid has; empty: all of them. The others are for `extra`."
    )
    levels: dict[str, float] = Field(
        default_factory=dict,
        description="Name in `scenarios` -> forget level (see unlearn.stop.by) that every run of it is to reach, the "
        "same for all checkpoints. Without it each run is held to its own gold's, which differs between checkpoints "
        "wherever a model can guess right what it never saw: then one has to forget more than another.",
    )
    extra: tuple[Extra, ...] = Field(
        default=(),
        description="Cells beyond the grid of seeds x scenarios x checkpoints x methods, for example more seeds for "
        "the primary contrast: [{seeds: [5, 6], checkpoints: [fit, grok], methods: [npo]}].",
    )
    primary: Primary | None = Field(
        default=None, description="The contrast the study is to decide, stated beforehand; all else is exploratory."
    )
    tuned: str | None = Field(
        None, description="File that llm-unlearn tune wrote: its settings per checkpoint and method go over `methods`."
    )
    tune: TuneConfig = Field(default_factory=lambda: TuneConfig(), description="Search of llm-unlearn tune.")
    suite: str = Field("tofu_world", description="Suite every model is evaluated on.")
    relearn: RelearnConfig | None = Field(
        default=None, description="Relearning attack on every unlearned model and its gold; null: none."
    )
    train: Literal["configured", "needed"] = Field(
        default="configured",
        description="needed: a run of watch.until: post ends at grok where nothing is unlearned from its post, so that "
        "golds of further scenarios cost half. configured: every run goes as far as grok.watch.until says.",
    )
    design: str | None = Field(
        default=None,
        description="sha256 of the file the study was declared in, and what the command line changed; goes into every "
        "result. Set when the file is read.",
    )
    grok: GrokConfig = Field(
        default_factory=lambda: GrokConfig(loop=LoopConfig(threads=1)),
        description="Training of every model; seeds, out and exclude are set per cell.",
    )
    unlearn: UnlearnConfig = Field(
        default_factory=lambda: UnlearnConfig(), description="Unlearning; model, gold, seed and out are set per cell."
    )


ELSEWHERE = ("out=", "tuned=")  # overrides that say where things lie and change nothing of the design


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's file and say in `design` which one it was. Raises UserError as `load_config`."""
    study = load_config(StudyConfig, path, overrides)
    changed = [text for text in overrides if not text.startswith(ELSEWHERE)]
    design = sha256_file(path) + (f" with {' '.join(changed)}" if changed else "")
    return study.model_copy(update={"design": design})


# RMU's published retain weight (1) leaves nothing of a 64-wide model; with 100 it forgets before it damages (40-author
# world, 60 updates of 32)
DEFAULT_METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "ga": {},
    "graddiff": {},
    "kl": {},
    "idk": {},
    "idk_dpo": {},
    "npo": {},
    "simnpo": {},
    "rmu": {"method": {"alpha": 100.0}},
}
