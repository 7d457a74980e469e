"""What a model folder says of its own making, so that it is never judged by another data set's or another request's
gold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm_unlearn.config import Config, digest
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Request
from llm_unlearn.errors import UserError
from llm_unlearn.models.pretrained import ModelConfig, absolute_reference, split_reference

C = TypeVar("C", bound=Config)


def absolute_paths(config: C) -> C:
    """Return a run's config with every path and every reference to a local model absolute, so that what the run says of
    its making holds in any folder. Hub names stay as they are.
    """
    changes: dict[str, Any] = {}
    for key in ("model", "gold"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            changes[key] = absolute_reference(value)
        elif isinstance(value, ModelConfig) and value.name is not None:
            changes[key] = value.model_copy(update={"name": absolute_reference(value.name)})
    method = getattr(config, "method", None)
    if (reinforced := getattr(method, "reinforced", None)) is not None and isinstance(method, Config):
        changes["method"] = method.model_copy(update={"reinforced": absolute_reference(reinforced)})
    distil = getattr(config, "distil", None)
    if (teacher := getattr(distil, "teacher", None)) is not None and isinstance(distil, Config):
        changes["distil"] = distil.model_copy(update={"teacher": absolute_reference(teacher)})
    if (data := getattr(config, "data", None)) is not None:
        paths = {key: getattr(data, key) for key in ("path", "forget_path")}
        absolute = {key: os.path.abspath(path) for key, path in paths.items() if path is not None}
        changes["data"] = data.model_copy(update=absolute)
    scenario = getattr(config, "scenario", None)
    if (record := getattr(scenario, "record", None)) is not None and isinstance(scenario, Config):
        changes["scenario"] = scenario.model_copy(update={"record": os.path.abspath(record)})
    return config.model_copy(update=changes)


def run_origin(config: Config, corpus: Corpus, request: Request) -> dict[str, Any]:
    """Return a run's config (paths absolute), its data's identity and its forget request's identity."""
    return {
        "job": type(config).__name__,
        "config": absolute_paths(config).model_dump(mode="json"),
        "exclude": getattr(config, "exclude", "none"),
        "data": corpus.identity,
        "request": request_digest(corpus, request),
    }


def request_digest(corpus: Corpus, request: Request) -> str:
    """Return the identity of a forget request: the facts and the rows it names."""
    return digest(
        {"facts": sorted(request.facts), "forget": [corpus.split("train")[i].question for i in request.forget]}
    )


def check_made_from(out: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose start model, or gold, has changed in place since.

    Both map a reference to its fingerprint; a reference that `before` does not know is not judged.
    """
    for reference, fingerprint in now.items():
        if before.get(reference, fingerprint) != fingerprint:
            raise UserError(
                f"{out}: was made from another model than {reference} is now; choose another out, or remove the folder"
            )


def gold_kind(origin: Mapping[str, Any]) -> str | None:
    """Return the kind of checkpoint a model's gold is taken at: its own, or the one its unlearning began from."""
    return origin.get("gold_kind") or origin.get("kind")


def check_same_request(name: str, origin: Mapping[str, Any], data: str, request: str, kind: str | None = None) -> None:
    """Refuse a reference model that was not trained without exactly this forget set and, with `kind`, stopped there.

    Raises UserError for a model that says nothing of its making, one of other data or another request, one that has
    seen the forget set, and one of another checkpoint kind.
    """
    if not origin:
        raise UserError(
            f"reference {name}: does not say what it was trained on; train it with recipes/train_grok.py or "
            "finetune.py exclude=forget"
        )
    if origin.get("data") != data:
        raise UserError(
            f"reference {name}: was trained on other data than the model it is to judge; train gold on the same data"
        )
    if origin.get("request") != request:
        scenario = origin.get("config", {}).get("scenario")
        raise UserError(
            f"reference {name}: is gold for another forget set ({scenario}); train gold with this run's scenario"
        )
    if origin.get("exclude") != "forget":
        raise UserError(f"reference {name}: has been trained on the forget set; train gold with exclude=forget")
    if kind is not None and origin.get("kind") != kind:
        run, its = split_reference(name)
        raise UserError(
            f"reference {name}: is gold at '{origin.get('kind')}', the model started from '{kind}'; take "
            f"{run if its else Path(name).parent}@{kind}"
        )
