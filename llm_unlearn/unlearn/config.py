"""Settings of an unlearning run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.data.source import DataConfig
from llm_unlearn.data.splits import Scenario
from llm_unlearn.methods.table import METHODS
from llm_unlearn.models.lora import LoraConfig
from llm_unlearn.models.pretrained import DType
from llm_unlearn.train.config import LoopConfig, OptimConfig


class MethodConfig(Config):
    """Which method, and its knobs; null takes the method's own default (llm-unlearn ls methods)."""

    name: str = Field(default="npo", description="Method.")
    params: dict[str, float] = Field(
        default_factory=dict, description="Hyper-parameters of its terms, steps or edit, for example {beta: 0.1}."
    )
    gamma: float | None = Field(default=None, ge=0, description="Weight of the forget term.")
    alpha: float | None = Field(default=None, ge=0, description="Weight of the retain term.")
    retain: Literal["none", "nll", "kl", "distil", "embed"] | None = Field(default=None, description="Retain term.")
    layer: int | None = Field(
        default=None, ge=0, description="Layer whose output hidden-state methods read; null: just below the middle."
    )
    alternates: Literal["generated", "swapped", "perturbed"] | None = Field(
        default=None,
        description=(
            "Alternate answers of altpo. generated: sampled from the start model. swapped: other rows' answers to the "
            "same relation in the same wording. perturbed: the data's own wrong answers, which the truth ratio is "
            "measured on. null: swapped where the data names relations and wordings (our worlds), else generated."
        ),
    )
    n_alternates: int = Field(default=5, ge=1, description="Most alternate answers per forget item.")
    gradient: str | None = Field(
        default=None,
        description="Wrapper that rewrites the gradients of any method with both terms: gru, orthograd, orthopenalty, "
        "sam; null: the method's own; none: off.",
    )
    gradient_params: dict[str, float] = Field(
        default_factory=dict, description="Hyper-parameters of the wrapper, for example {rho: 0.01}."
    )
    mask: Literal["none", "saliency"] | None = Field(
        default=None, description="Which weights a loss trains; null: the method's own choice, none: all of them."
    )
    mask_params: dict[str, float] = Field(
        default_factory=dict, description="Hyper-parameters of the mask, for example {share: 0.5}."
    )
    reinforced: str | None = Field(
        default=None,
        description="For task_vector: the start model trained further on the forget set; null: trained by this run.",
    )

    @property
    def label(self) -> str:
        """Name of the method as it runs: with the wrapper and the mask that are not its own."""
        own = METHODS.get(self.name)
        gradient, mask = ("none", "none") if own is None else (own.gradient or "none", own.mask)
        asked = ((self.gradient, gradient), (self.mask, mask))
        return "+".join([self.name, *(name for name, usual in asked if name is not None and name != usual)])


class StopConfig(Config):
    """Evaluation during unlearning: when to stop, and which step is kept.

    Kept is retain accuracy or, where the start answers less than half of the retain items word for word (long answers),
    retain probability; `floor` and `collapse` are shares of the start's. The rules are `unlearn.stopping`'s.
    """

    every: int = Field(default=2, ge=1, description="Updates between evaluations on a small fixed subset.")
    items: int = Field(default=100, ge=4, description="Most items of a split in that subset.")
    until: Literal["max_steps", "target"] = Field(
        default="target", description="target: stop once what `by` reads is at or below it."
    )
    by: Literal["prob", "acc"] = Field(
        default="prob",
        description="What is to come down to the target, and is called forget probability in the other options: prob: "
        "mean probability of the forgotten answers. acc: share of them that the model gives, the UA of images.",
    )
    target: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=(
            "Forget probability to reach; null: gold's plus margin; without gold the start's on authors it never saw "
            "(split holdout, of validation images where there are any) plus margin; without those a tenth of the "
            "start's."
        ),
    )
    margin: float = Field(
        default=0.05, ge=0, description="How far above gold's forget probability counts as forgotten."
    )
    floor: float | None = Field(
        default=0.7, gt=0, le=1, description="Stop when less than this share of what was kept is left; null: never."
    )
    collapse: float | None = Field(
        default=0.1, gt=0, le=1, description="Stop, and call it collapse, below this share; null: never."
    )
    over_forget: float | None = Field(
        default=1.0,
        ge=0,
        description=(
            "Alarm when the forgotten answers' log-probability lies below gold's by more than this many nats a token, "
            "and by more than the start's lies above it; null: no alarm."
        ),
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description=(
            "best: of the steps evaluated after the start, one above the floor before one below it, then one at the "
            "target before one that is not, then one that is not over-forgotten before one that is, then the one with "
            "the highest retain accuracy less what the forget probability lies above the target; the first of equals. "
            "last: the last step, whatever it is."
        ),
    )


class UnlearnConfig(Config):
    """Make a model forget. Data and scenario are the start model's own unless given."""

    out: str | None = Field(
        default=None, description="Folder of the run; null: <run of the start model>/unlearn/<kind>/<method>."
    )
    model: str = Field(default="runs/world40@grok", description="Start model: run@kind, a folder, or a hub name.")
    gold: str | None = Field(
        default=None, description="Model retrained without the forget set; gives the target forget level."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the order of items, the pairing with retain items, and drawn refusals."
    )
    data: DataConfig | None = Field(default=None, description="Needed only for a model that is not ours.")
    scenario: Scenario | None = Field(
        default=None, description="What is forgotten; null: the scenario the start model was trained with."
    )
    method: MethodConfig = Field(default_factory=MethodConfig, description="Method.")
    lora: LoraConfig | None = Field(
        default=None, description="Train adapters only; the reference is the model with adapters off."
    )
    dtype: DType = Field(default="float32", description="Type the weights are held in.")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.01, warmup=5, betas=(0.9, 0.999)),
        description="Optimizer.",
    )
    loop: LoopConfig = Field(
        default_factory=lambda: LoopConfig(max_steps=60, batch_size=32, log_every=5, save_every=1000),
        description="Training loop.",
    )
    stop: StopConfig = Field(default_factory=StopConfig, description="Evaluation during unlearning.")
