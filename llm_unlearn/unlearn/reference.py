"""The frozen models that some losses compare with: the start model, as a copy or only its log-probabilities, computed
once; and one that was never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.tokenise import Item
from llm_unlearn.eval.scoring import padded_tokens, score_answers
from llm_unlearn.models.causal import AnswerModel


class CachedLogprobs:
    """Summed answer log-probabilities of fixed items under the start model: enough for NPO and DPO, at no memory for
    weights.
    """

    def __init__(self, model: AnswerModel, items: Sequence[Item]) -> None:
        self.logp = torch.tensor([float(s.logp.sum()) for s in score_answers(model, items)], dtype=torch.float32)
        self.tokens = padded_tokens(items)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        """Return (B,) log-probabilities in nats of the items with these numbers."""
        return self.logp[torch.from_numpy(numbers)]


class FrozenModel:
    """The start model itself, for losses that compare whole distributions or hidden states.

    Under LoRA it is the trained model with its adapters switched off, so that no second copy is held.
    """

    def __init__(self, model: Any) -> None:
        self.adapted = hasattr(model.lm, "disable_adapter")
        self.model = model if self.adapted else copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, input_ids_BT: Tensor, index_N: Tensor, layer: int | None = None) -> Tensor:
        """Return what the start model computes there; see AnswerModel.forward."""
        if not self.adapted:
            self.model.to(input_ids_BT.device)
        was_training = self.model.training
        self.model.eval()  # a base model's own dropout would make the reference a random one
        with self.model.lm.disable_adapter() if self.adapted else nullcontext():
            out = self.model(input_ids_BT, index_N, layer)
        self.model.train(was_training)
        return out


class UntrainedModel(FrozenModel):
    """A model of the start model's architecture with random weights: its class built anew from its config.

    Held whole beside the model, under LoRA too: adapters say nothing about a base with other weights.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self.adapted = False
        lm = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
        like = next(lm.parameters())
        with torch.random.fork_rng(devices=[]):  # on the CPU: the same model whatever the device
            torch.default_generator.manual_seed(seed)
            fresh = type(lm)(lm.config)
        self.model = type(model)(fresh.to(like.device, like.dtype)).eval().requires_grad_(False)
