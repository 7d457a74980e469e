"""Scores that take the model and gold at once, kept beside the model's records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Request, eval_splits
from llm_unlearn.data.tokenise import FormatName, Item, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.divergence import kl_divergence
from llm_unlearn.eval.metrics.table import METRICS
from llm_unlearn.eval.score import PAIRS, ModelScores
from llm_unlearn.eval.shards import Shard
from llm_unlearn.eval.suite import Suite
from llm_unlearn.files import read_json, write_atomic
from llm_unlearn.models.causal import AnswerModel, answer_model
from llm_unlearn.models.pretrained import load_model, load_tokenizer

Scores = dict[tuple[str, str], np.ndarray]
SCORES: dict[str, Callable[[AnswerModel, AnswerModel, Sequence[Item]], np.ndarray]] = {"kl_to_gold": kl_divergence}


def score_pairs(
    models: tuple[str, str],
    scored: tuple[ModelScores, ModelScores],
    suite: Suite,
    corpus: Corpus,
    request: Request,
    fmt: FormatName,
    shard: Shard,
) -> Scores:
    """Return (metric, split) -> (n,) scores of a suite's "pair" metrics, {} where it has none.

    Written to `pairs.json` beside the model's records, and read from there while the weights of both are the same.

    Args:
        models: references of the model and of gold.
        scored: what `score_model` returned for them.

    Raises UserError for two models that cannot be compared.
    """
    wanted = sorted({(e.metric, e.split) for e in suite.config.metrics.values() if METRICS[e.metric].kind == "pair"})
    if not wanted:
        return {}
    if scored[0].identity == scored[1].identity:  # no distribution is any way from itself
        return {(metric, split): np.zeros(len(scored[0].records[split])) for metric, split in wanted}
    path, identity = scored[0].folder / PAIRS, [s.identity for s in scored]
    known = shard.gather(_known(path, identity) if shard.main else None)[0]
    if known is not None:
        return {(metric, split): np.array(known[f"{split}/{metric}"]) for metric, split in wanted}
    tokenizer = load_tokenizer(models[0])
    model, gold = (answer_model(load_model(m)).eval().to(shard.device) for m in models)
    rows = eval_splits(corpus, request)
    out: Scores = {}
    for metric, split in wanted:
        items = encode_rows(tokenizer, rows[split], fmt)
        out[metric, split] = shard.interleave(SCORES[metric](model, gold, shard.mine(items)), len(items))
    if shard.main:
        told = {"identity": identity, "scores": {f"{s}/{m}": values.tolist() for (m, s), values in out.items()}}
        write_atomic(path, (json.dumps(told) + "\n").encode())
    shard.gather(None)
    return out


def _known(path: Any, identity: Sequence[dict[str, str]]) -> dict[str, list[float]] | None:
    try:
        content = read_json(path)
        return content["scores"] if content["identity"] == list(identity) else None
    except (UserError, KeyError, TypeError):
        return None
