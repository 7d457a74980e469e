"""Generic targets: what a model might answer that never saw the forget set, told from a reinforced copy."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import collate, length_sorted
from llm_unlearn.data.tokenise import Item
from llm_unlearn.eval.scoring import MAX_TOKENS
from llm_unlearn.log import get_logger
from llm_unlearn.methods.distill import generic_targets
from llm_unlearn.methods.losses import nll, token_logprobs
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.cost import count_pass
from llm_unlearn.train.order import step_items

log = get_logger(__name__)


class GenericTargets:
    """Target tokens of every forget item, in place of its answer's.

    Every process makes them for itself from the same batches. While they are made, a second copy of the model is held,
    with AdamW's state for the weights that the run trains (all, or the adapters); then only the tokens are.

    Attributes:
        changed: share of answer tokens whose target is another token.
        tokens: what it cost: `forward` and `backward` by the reinforced copy, `reference` in forward passes only.
    """

    def __init__(
        self, model: AnswerModel, items: Sequence[Item], params: Mapping[str, float], batch_size: int, seed: int
    ) -> None:
        self.tokens = Counter[str]()
        reinforced = self._reinforce(copy.deepcopy(model), items, params, min(batch_size, len(items)), seed)
        self.labels = self._targets(model, reinforced, items, params["strength"])
        answers = torch.cat([torch.tensor(item.answer) for item in items])
        self.changed = float((torch.cat(self.labels) != answers).float().mean())
        log.info("generic targets: %.0f %% of the answer tokens have another target", 100 * self.changed)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        """Return (N,) target tokens of the items with these numbers, item after item."""
        return torch.cat([self.labels[int(i)] for i in numbers])

    def _reinforce(
        self, model: AnswerModel, items: Sequence[Item], params: Mapping[str, float], batch_size: int, seed: int
    ) -> AnswerModel:
        device = next(model.parameters()).device
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=params["reinforce_lr"], weight_decay=0.0)
        model.train()
        for step in range(int(params["reinforce_updates"])):
            batch = collate([items[i] for i in step_items(len(items), batch_size, step, seed)]).to(device)
            logits_NV = model(batch.inputs, batch.index_N)
            nll(token_logprobs(logits_NV, batch.labels_N)[0]).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            count_pass(self.tokens, batch)
        return model

    @torch.no_grad()
    def _targets(
        self, model: AnswerModel, reinforced: AnswerModel, items: Sequence[Item], strength: float
    ) -> list[Tensor]:
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        reinforced.eval()
        out: dict[int, Tensor] = {}
        for group in length_sorted(items, MAX_TOKENS):
            batch = collate([items[i] for i in group]).to(device)
            where = (batch.inputs, batch.index_N)
            target_N = generic_targets(model(*where), reinforced(*where), strength=strength).cpu()
            out |= dict(zip(group, target_N.split([items[i].n_answer for i in group]), strict=True))
            self.tokens["reference"] += 2 * batch.n_inputs
        model.train(was_training)
        return [out[i] for i in range(len(items))]
