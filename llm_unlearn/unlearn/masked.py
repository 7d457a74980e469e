"""Training some of the weights only, and leaving the others bit for bit as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import UserError
from llm_unlearn.methods.needs import check_mask_params
from llm_unlearn.methods.table import METHODS
from llm_unlearn.methods.terms import MASKS
from llm_unlearn.train.loop import Run
from llm_unlearn.unlearn.config import MethodConfig
from llm_unlearn.unlearn.importance import mean_gradient


class WeightMask:
    """A callback that takes the mask before the first step, and after each step puts frozen weights back.

    Its `edit` belongs last among the gradient edits: it clears the gradients of frozen weights, so that clipping and
    the optimizer's memory see the trained ones alone. Weight decay moves a weight without a gradient too, hence the
    putting back. Under LoRA the adapters are masked: only they are trained.
    """

    def __init__(self, name: str, params: Mapping[str, float], forget: Sequence[Item], tokens: Counter[str]) -> None:
        self.mask, self.params, self.forget, self.tokens = MASKS[name], params, forget, tokens
        self.frozen: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def __call__(self, run: Run) -> None:
        """Take the mask at step 0; at any other, put the frozen weights back."""
        if run.step == 0:
            gradients, tokens = mean_gradient(run.answer_model, self.forget, run.accelerator)
            self.tokens.update(forward=tokens, backward=tokens)
            assert self.mask.fn is not None
            try:
                trained = self.mask.fn(gradients, **self.params)
            except ValueError as error:
                raise UserError(f"method.mask: {error}") from None
            self.frozen = {name: ~chosen for name, chosen in trained.items()}
            return
        with torch.no_grad():
            for name, p in run.answer_model.named_parameters():
                if name in self.kept:
                    p.masked_scatter_(self.frozen[name], self.kept[name])

    @torch.no_grad()
    def edit(self, named_params: Sequence[tuple[str, Tensor]]) -> None:
        """Clear the gradients of frozen weights, and keep their values the first time round."""
        for name, p in named_params:
            if name not in self.kept:
                self.frozen[name] = self.frozen[name].to(p.device)
                self.kept[name] = p.detach().masked_select(self.frozen[name])
            if p.grad is not None:
                p.grad.masked_fill_(self.frozen[name], 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the mask: computed again on another machine it could differ in a weight."""
        return {"frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`; frozen weights are where they were, in the resumed model."""
        self.frozen, self.kept = dict(state["frozen"]), {}


def make_masks(config: MethodConfig, n_weights: int, forget: Sequence[Item], tokens: Counter[str]) -> list[WeightMask]:
    """Return the mask a loss is trained with, the config's or else the method's own: one, or none. `n_weights` are
    trained without it; the passes that it takes are counted in `tokens`.

    Raises UserError for knobs that the mask does not take.
    """
    name = METHODS[config.name].mask if config.mask is None else config.mask
    if config.mask_params and MASKS[name].fn is None:
        raise UserError("method.mask_params: there is no mask they could go to; set method.mask=saliency")
    try:
        params = check_mask_params(MASKS[name], config.mask_params)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "share" in params and round(params["share"] * n_weights) == 0:
        raise UserError(f"method.mask_params.share={params['share']:g} of {n_weights} weights is none; raise it")
    return [] if MASKS[name].fn is None else [WeightMask(name, params, forget, tokens)]
