"""Settings of the training loop, shared by every recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_unlearn.config import Config


class OptimConfig(Config):
    """The optimizer and its schedule. The defaults are those the embedded world was seen to grok with."""

    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw",
        description="adamw: decay decoupled from the gradient. sgd: with momentum, decay added to the gradient (L2).",
    )
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.9),
        description="AdamW moment decay rates. 0.9 for the second: 0.98 groks a third later, 0.999 later still.",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="optimizer=sgd: momentum, as torch defines it.")
    weight_decay: float = Field(
        default=1.0,
        ge=0,
        description="adamw: decoupled, multiplied by lr; grokking needs it large. sgd: times the weights, added to the "
        "gradient after clipping; 5e-4 is usual.",
    )
    decay: Literal["matrices", "all"] = Field(
        default="matrices", description="Which weights decay: those of two dimensions and more, or every one."
    )
    clip: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    warmup: int = Field(default=50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Learning rate after warm-up."
    )


class LoopConfig(Config):
    """How long, how much at once, and how often the state is saved."""

    max_steps: int = Field(default=12_000, ge=1, description="Optimizer steps, unless a callback stops earlier.")
    batch_size: int = Field(
        default=256,
        ge=1,
        description="Items per optimizer step, over all processes: changing the number of processes changes nothing.",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Items per forward pass; smaller than the share of a process means gradient accumulation.",
    )
    save_every: int = Field(default=500, ge=1, description="Steps between checkpoints a killed run resumes from.")
    log_every: int = Field(default=50, ge=1, description="Steps between lines of train_log.jsonl.")
    precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="Mixed precision of the forward pass; losses are fp32 always."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Keep each layer's input only and compute its activations again in the backward pass: a third to "
        "a half more time for a fraction of the memory. Weights come out the same.",
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none", description="Where Accelerate sends the log as well."
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds that a process waits for the others before it gives them up and ends.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of a process; 0 leaves torch's choice. Bit-identical reruns need it fixed.",
    )
