"""Settings of a grokking run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.data.source import DataConfig
from llm_unlearn.data.splits import Scenario
from llm_unlearn.models.pretrained import ModelConfig
from llm_unlearn.train.config import LoopConfig, OptimConfig


class WatchConfig(Config):
    """When a run is evaluated, what counts as grokking, and when it has been trained enough."""

    thresholds: Literal["language", "vision"] = Field(
        default="language",
        description="Preset of the detector. language: levels of accuracy. vision: shares of the rise after fit, since "
        "a classifier of images is far above chance by then.",
    )
    ratio: float = Field(
        default=1.05, gt=1, description="Evaluations are evenly spaced in log(step): the ratio of two neighbours."
    )
    first: int = Field(default=25, ge=1, description="First evaluated step, and the smallest distance of two.")
    items: int = Field(
        default=1000, ge=10, description="Most items of a split that an evaluation reads; the draw is fixed."
    )
    until: Literal["post", "grok", "fit", "max_steps"] = Field(
        default="post", description="Checkpoint kind after which training ends."
    )


class GrokfastConfig(Config):
    """Grokfast-EMA (Lee et al. 2024, arXiv 2405.20233): amplify slow gradients. Another optimiser path: keep it out of
    main contrasts.
    """

    alpha: float = Field(default=0.98, ge=0, lt=1, description="Decay of the running mean of gradients.")
    lamb: float = Field(default=2.0, ge=0, description="How much of it is added.")


class SamConfig(Config):
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412): every step takes the gradient where the loss
    is worst nearby.
    """

    rho: float = Field(default=0.05, gt=0, description="How far that is, a length over all weights together.")


class SplineConfig(Config):
    """Keep training items away from the neurons' hyperplanes, so that few linear regions lie around them.

    A construction of this package, see methods.complexity. It does not keep a run from grokking: on digits it lowered
    local complexity to a quarter and the jump stayed; without weight decay it brought part of the jump by itself.
    """

    weight: float = Field(default=1.0, gt=0, description="Weight of the penalty beside the loss of the answers.")
    margin: float = Field(
        default=0.5,
        gt=0,
        description="Pre-activations closer to 0 than this are penalised; in root mean squares of the item's in the "
        "layer.",
    )


class DistilConfig(Config):
    """Learn from another model's answers beside the true ones (Hinton et al. 2015, arXiv:1503.02531): for example from
    one that has grokked. It reads the training questions only.
    """

    teacher: str = Field(description="Model to learn from: run@kind or folder, with the tokenizer of this run.")
    weight: float = Field(
        default=0.9, gt=0, le=1, description="Share of the teacher's part in the loss; the rest is the answers' own."
    )
    temperature: float = Field(default=2.0, gt=0, description="Softens both models' logits in the teacher's part.")


class OrthogonalityConfig(Config):
    """Push the gradients of two random halves of the authors (or classes) apart while the answers go on being fitted:
    the loss gets weight * cos^2 of the two, the halves drawn anew at every step. An intervention on what a trained
    model is like, the data being the same.
    """

    weight: float = Field(
        default=1.0,
        description="Weight of the squared cosine. Below 0: gradients are pushed together. 0: only logged, which is "
        "what a dose is compared with.",
    )
    after: Literal["start", "fit", "grok"] = Field(
        default="fit",
        description="Checkpoint kind from whose evaluation on it acts (fit: the evaluation that decides it, two after "
        "the checkpoint). Until then the run is the one without it.",
    )
    of: Literal["loss", "margin"] = Field(
        default="loss",
        description="Whose gradients: those of the answers' loss, or of their margin (the answer's logit above the "
        "mean of the others). Where the answers are known, the few that are not yet decide the former.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Updates it acts for, after which the run ends; null: to the run's own end."
    )


class GrokConfig(Config):
    """Train a model until it groks; the checkpoints early, fit, grok and post are kept on the way."""

    out: str = Field(default="runs/world40", description="Folder of the run.")
    seed: int = Field(default=0, ge=0, description="Seed of initial weights and of the order of items.")
    exclude: Literal["none", "forget"] = Field(
        default="none", description="forget: leave the forget closure out, which makes the gold model."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="Questions and answers, or images.")
    scenario: Scenario = Field(
        default_factory=Scenario, description="What will be forgotten; decides what gold leaves out."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="What is trained.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer.")
    loop: LoopConfig = Field(default_factory=LoopConfig, description="Training loop.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="Evaluation, detection, end.")
    loss: Literal["ce", "mse"] = Field(
        default="ce",
        description="What is fitted. ce: cross-entropy. mse: squared distance of the logits from the one-hot answer, "
        "mean over tokens and vocabulary or classes.",
    )
    shuffle: Literal["none", "inferred"] = Field(
        default="none",
        description="inferred: train answers of inferred questions permuted among those of the same relation and "
        "wording (drawn with data.seed), so that nothing can be generalised from.",
    )
    sam: SamConfig | None = Field(default=None, description="Sharpness-aware minimisation; null: off.")
    spline: SplineConfig | None = Field(default=None, description="Penalty on local complexity; null: off.")
    distil: DistilConfig | None = Field(default=None, description="Learn from a teacher too; null: off.")
    orthogonality: OrthogonalityConfig | None = Field(
        default=None, description="Push gradients of authors apart or together; null: off."
    )
    grokfast: GrokfastConfig | None = Field(default=None, description="Amplify slow gradients; null: off.")
