"""The callback that writes down what every training row loses at chosen epochs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_unlearn.data.batches import collate, length_sorted
from llm_unlearn.data.loss_record import LossRecord, write_record
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.tokenise import FormatName, Item, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.models.causal import AnswerModel
from llm_unlearn.train.loop import Run

MAX_TOKENS = 2_048  # of a padded batch
COLUMNS = ("loss", "right", "para_loss", "para_right")


class ItemLosses:
    """Measures all training rows, and their paraphrased questions where they have one, after chosen epochs.

    `out/item_losses.npz` (see LossRecord) holds the epochs measured so far; a resumed run measures none twice. Every
    process makes the pass, the main one writes. `tokens` and `seconds` are what it took, for `Meter.cost`.

    Args:
        epochs: passes over the data, after which it measures.
        steps: step -> by epoch: see `epoch_steps`.
        rows, items: what is trained on, as rows and encoded.
        head: `data` and `exclude` of the record.
    """

    def __init__(
        self,
        epochs: Sequence[float],
        steps: Sequence[int],
        rows: Sequence[QARow],
        items: Sequence[Item],
        tokenizer: Any,
        fmt: FormatName,
        out: Path,
        head: dict[str, str],
    ) -> None:
        self.epochs, self.steps, self.items, self.out, self.head = list(epochs), list(steps), items, out, head
        self.para_rows = [i for i, row in enumerate(rows) if row.paraphrased_question]
        asked = [dataclasses.replace(rows[i], question=rows[i].paraphrased_question or "") for i in self.para_rows]
        self.para_items = encode_rows(tokenizer, asked, fmt)
        self.length, self.frequency = answer_traits(items)
        self.measured: list[dict[str, np.ndarray]] = []
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, run: Run) -> None:
        """Measure if it is time, and write the record."""
        n = len(self.measured)
        if n == len(self.steps) or run.step != self.steps[n]:
            return
        started = time.perf_counter()
        with run.interruptible():
            own, para = (row_losses(run.answer_model, its) for its in (self.items, self.para_items))
        self.measured.append(dict(zip(COLUMNS, (*own, *para), strict=True)))
        self.tokens += sum(item.n_inputs for item in (*self.items, *self.para_items))
        self.seconds += time.perf_counter() - started
        if run.accelerator.is_main_process:
            write_record(self.out, self.record())

    def record(self) -> LossRecord:
        """Return what has been measured so far."""
        columns = {name: np.stack([line[name] for line in self.measured]) for name in COLUMNS}
        return LossRecord(
            data=self.head["data"],
            exclude=self.head["exclude"],
            epochs=np.array(self.epochs[: len(self.measured)], dtype=np.float64),
            length=self.length,
            frequency=self.frequency,
            para_rows=np.array(self.para_rows, dtype=np.int64),
            loss=columns["loss"],
            right=columns["right"],
            para_loss=columns["para_loss"],
            para_right=columns["para_right"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured so far."""
        return {"measured": self.measured, "cost": (self.tokens, self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        self.measured = list(state["measured"])
        self.tokens, self.seconds = state["cost"]


def epoch_steps(epochs: Sequence[float], n_items: int, batch_size: int, last: int) -> list[int]:
    """Return the steps at which so many passes over the data are made. Raises UserError for epochs that do not grow,
    and for one past the run's last step.
    """
    steps = [math.ceil(epoch * n_items / batch_size) for epoch in epochs]
    if steps != sorted(set(steps)) or (steps and steps[0] < 1):
        raise UserError(f"record_epochs={list(epochs)}: must grow, by a step at least; leave some out")
    if steps and steps[-1] > last:
        raise UserError(
            f"record_epochs: epoch {epochs[-1]:g} is step {steps[-1]}, the run ends at step {last}; lower it, or raise "
            "epochs and loop.max_steps"
        )
    return steps


def answer_traits(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens of each answer (R,), mean log count of its tokens among all answers (R,)), end tokens included."""
    ids, counts = np.unique(np.concatenate([item.answer for item in items]), return_counts=True)
    log_count = np.log(counts)
    frequency = [log_count[np.searchsorted(ids, item.answer)].mean() for item in items]
    return np.array([item.n_answer for item in items], dtype=np.int64), np.array(frequency, dtype=np.float64)


@torch.no_grad()
def row_losses(model: AnswerModel, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean loss per answer token (R,) float32 in nats, share of tokens greedy decoding gets right (R,)).

    Log-probabilities are fp32 whatever the model's dtype. The model is in eval mode meanwhile.
    """
    loss, right = np.zeros(len(items), dtype=np.float32), np.zeros(len(items), dtype=np.float32)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    for group in length_sorted(items, MAX_TOKENS):
        batch = collate([items[i] for i in group]).to(device)
        logits_NV = model(batch.inputs, batch.index_N).float()
        label_N = logits_NV.gather(-1, batch.labels_N[:, None])[:, 0]
        count_B = torch.bincount(batch.row_N, minlength=len(group))
        for out, value_N in (
            (loss, logits_NV.logsumexp(-1) - label_N),
            (right, (logits_NV.argmax(-1) == batch.labels_N).float()),
        ):
            out[group] = (torch.zeros(len(group), device=device).index_add_(0, batch.row_N, value_N) / count_B).cpu()
    model.train(was_training)
    return loss, right
