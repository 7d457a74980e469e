"""The start model of an unlearning run, with the data and the request it is to be unlearned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import build_config
from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.shuffle import shuffle_inferred
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.data.splits import Request, Scenario, draw_request
from llm_unlearn.errors import UserError
from llm_unlearn.models.pretrained import read_origin, split_reference


@dataclass(frozen=True)
class Start:
    """A start model with the data and the forget request it is to be unlearned on."""

    reference: str
    data: DataConfig
    scenario: Scenario
    corpus: Corpus
    request: Request
    origin: Mapping[str, Any]
    data_digest: str
    trained: Sequence[QARow]
    """The `train` split with the answers that the model was trained on (see `GrokConfig.shuffle`)."""

    @property
    def forget(self) -> list[QARow]:
        """The rows to be forgotten."""
        return [self.trained[i] for i in self.request.forget]

    @property
    def retain(self) -> list[QARow]:
        """The rows to be kept."""
        return [self.trained[i] for i in self.request.retain]


def open_start(reference: str, data: DataConfig | None, scenario: Scenario | None) -> Start:
    """Return the start model's data and request: its own unless others are given.

    Raises UserError for a model that does not say what it was trained on when no data is given, and for data that is
    not what it was trained on; data of given splits is for evaluating any model.
    """
    origin = read_origin(reference)
    trained = origin.get("config", {})
    if data is None:
        if "data" not in trained:
            known = Path(split_reference(reference)[0]).exists()
            raise UserError(
                f"{reference}: {'' if known else 'no such folder here, and a model of the hub '}does not say what data "
                "it was trained on; give the data (eval: --data, --data-dir, --forget-split; recipes: data.kind, "
                "data.path)"
            )
        data = build_config(DataConfig, trained["data"])
    if scenario is None:
        scenario = build_config(Scenario, trained.get("scenario") or {})
    corpus = open_corpus(data)
    identity = corpus.identity
    if not corpus.given and origin.get("data") not in (None, identity):
        raise UserError(
            f"{reference}: was trained on other data than '{corpus.name}' holds now; give the data it was trained on"
        )
    shuffled = shuffle_inferred(corpus, data.seed) if trained.get("shuffle") == "inferred" else corpus
    rows = () if corpus.given else shuffled.split("train")
    return Start(reference, data, scenario, corpus, draw_request(corpus, scenario), origin, identity, rows)
