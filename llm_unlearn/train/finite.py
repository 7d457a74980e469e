"""Numbers that are no longer finite end a training before they reach the weights, and the items that made them are
named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.data.batches import collate
from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import Diverged

SHOWN = 8  # items named of a sort


def refuse_non_finite(run: Any, task: Any, total: Tensor, norm: Any) -> None:
    """Raise Diverged, in every process, if a step's loss or gradient norm is not finite in one of them."""
    accelerator = run.accelerator
    if norm is None or accelerator.scaler is not None:  # fp16's scaler skips steps that overflow
        norm = torch.zeros(())
    elif hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    finite = math.isfinite(float(total)) and math.isfinite(float(norm))
    if accelerator.num_processes > 1:
        finite = not accelerator.reduce(torch.tensor(float(not finite), device=accelerator.device), "sum")
    if not finite:
        raise Diverged(
            f"step {run.step + 1}: the loss is {float(total):g} and the gradient norm {float(norm):g}: training "
            f"stopped, nothing was saved after it; lower optim.lr, or set optim.clip; {_at_fault(run, task)}"
        )


@torch.no_grad()
def _at_fault(run: Any, task: Any) -> str:
    """Return the end of the message: the items of the step whose outputs are not finite at the weights it began with.
    Every process looks at all processes' items, as an engine that divides the weights wants it.
    """
    drawn = task.drawn(run.step)
    run.model.eval()  # a batch's statistics would spread one item's numbers to all
    bad = {name: _spoilt(run, numbers, items, task.pad_id) for name, (numbers, items) in drawn.items()}
    n, n_bad = (sum(len(numbers) for numbers in found.values()) for found in (_numbers(drawn), bad))
    if n_bad == n:
        return f"outputs are not finite on any of the step's {n} items: the weights are at fault"
    if n_bad:
        return f"outputs are not finite on items {_list(bad)}"
    return f"outputs are finite on each item of the step: {_list(_numbers(drawn))}"


def _numbers(drawn: Mapping[str, tuple[np.ndarray, Sequence[Item]]]) -> dict[str, np.ndarray]:
    return {name: numbers for name, (numbers, _) in drawn.items()}


def _spoilt(run: Any, numbers: np.ndarray, items: Sequence[Item], pad_id: int) -> np.ndarray:
    """Return those of the numbered items whose logits are not finite."""
    bad = np.zeros(len(numbers), dtype=bool)
    for i in range(0, len(numbers), SHOWN):
        batch = collate([items[j] for j in numbers[i : i + SHOWN]], pad_id).to(run.accelerator.device)
        logits_NV = run.answer_model(batch.inputs, batch.index_N)
        rows = batch.row_N[~logits_NV.isfinite().all(-1)].unique()
        bad[i + rows.cpu().numpy()] = True
    return numbers[bad]


def _list(found: Mapping[str, np.ndarray]) -> str:
    sorts = []
    for name, numbers in found.items():
        if len(once := np.unique(numbers)):
            more = f" and {len(once) - SHOWN} more" if len(once) > SHOWN else ""
            sorts.append(", ".join(map(str, once[:SHOWN])) + f"{more} of {name}")
    return "; ".join(sorts) + " (counted from 0)"
