"""Settings of attacks."""

from __future__ import annotations

from pydantic import Field

from llm_unlearn.config import Config


class RelearnConfig(Config):
    """Relearning: fit a few of the forgotten rows again and see whether the others come back with them."""

    facts: int = Field(default=4, ge=1, description="Forgotten facts that are told again, in all trained wordings.")
    updates: int = Field(default=40, ge=1, description="Updates on their rows, all of them in every one.")
    lr: float = Field(default=3e-4, gt=0, description="Learning rate (AdamW without weight decay), never tuned.")
    every: int = Field(default=5, ge=1, description="Updates between evaluations of the facts that are not told.")
    level: float = Field(
        default=0.5, gt=0, le=1, description="Accuracy on them that counts as relearned: relearn_updates is when."
    )
    seed: int = Field(default=0, ge=0, description="Seed of which facts are told.")
