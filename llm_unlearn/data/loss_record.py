"""What every training question lost at chosen epochs: the file a fitting run writes, and forget draws read."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.files import read_bytes, write_atomic

FILE = "item_losses.npz"


@dataclass(frozen=True)
class LossRecord:
    """Of E epochs and the R rows of the `train` split in its order; P of them have a paraphrased question.

    Attributes:
        data: identity of the corpus.
        exclude: what the run left out: `none`, or `forget` (then it is no record of the whole split).
        epochs: (E,) passes over the data before each measurement, increasing.
        loss: (E, R) mean negative log-likelihood of a row's answer tokens, end token included, nats.
        right: (E, R) share of those tokens that greedy decoding gets right, the true ones before them given.
        length: (R,) answer tokens.
        frequency: (R,) mean natural logarithm of how often an answer's tokens stand in all R answers.
        para_rows: (P,) row numbers.
        para_loss, para_right: (E, P) of the same answers to the paraphrased questions.
    """

    data: str
    exclude: str
    epochs: np.ndarray
    loss: np.ndarray
    right: np.ndarray
    length: np.ndarray
    frequency: np.ndarray
    para_rows: np.ndarray
    para_loss: np.ndarray
    para_right: np.ndarray

    def at(self, epoch: float) -> np.ndarray:
        """Return the (R,) losses after an epoch; UserError naming those there are."""
        found = np.flatnonzero(np.isclose(self.epochs, epoch))
        if not len(found):
            have = ", ".join(f"{e:g}" for e in self.epochs) or "none"
            raise UserError(
                f"{FILE}: has no epoch {epoch:g} (it has {have}); choose scenario.early_epoch and late_epoch among "
                "them, or fit with other record_epochs"
            )
        return self.loss[found[0]]


def write_record(folder: Path, record: LossRecord) -> None:
    """Write the record into a run's folder: the whole file appears, or the old one stays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{field.name: getattr(record, field.name) for field in fields(record)})
    write_atomic(folder / FILE, buffer.getvalue())


def read_record(folder: Path) -> LossRecord:
    """Return the record in a run's folder. Raises UserError for a folder without one, and for a damaged one."""
    path = folder / FILE
    if not path.exists():
        raise UserError(
            f"{folder}: holds no {FILE}; give scenario.record the folder of a run of recipes/finetune.py with "
            "record_epochs"
        )
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as content:
            parts = {field.name: content[field.name] for field in fields(LossRecord)}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        raise UserError(f"{path}: is damaged; fit the model again, in another folder") from None
    record = LossRecord(**{**parts, "data": str(parts["data"]), "exclude": str(parts["exclude"])})
    n = (len(record.epochs), len(record.length))
    if record.loss.shape != n or record.right.shape != n or record.para_loss.shape != (n[0], len(record.para_rows)):
        raise UserError(f"{path}: is damaged; fit the model again, in another folder")
    return record
