"""What an unlearning run reads: its items, the answers it trains on in place of the true ones, what is watched, and
the level that counts as forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from llm_unlearn.data.schema import QARow
from llm_unlearn.data.source import refusals
from llm_unlearn.data.splits import eval_splits
from llm_unlearn.data.tokenise import Item, encode_answers, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.scoring import quick_scores
from llm_unlearn.models.causal import AnswerModel, answer_model
from llm_unlearn.models.pretrained import load_model, read_origin
from llm_unlearn.seeding import derive, rng
from llm_unlearn.train.origin import check_same_request, gold_kind, request_digest
from llm_unlearn.unlearn.alternates import Alternates, generated, group_alternates, perturbed, swapped
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.labels import random_answers
from llm_unlearn.unlearn.objective import Items, check_for_images, reads_answers
from llm_unlearn.unlearn.start import Start
from llm_unlearn.unlearn.stopping import Level

WATCHED = ("forget", "retain", "forget_inf", "retain_inf", "val", "test")
SHARE_OF_START = 0.1  # the target where nothing says what a model that never saw the forget set gives


def draw_items(config: UnlearnConfig, start: Start, model: AnswerModel | None, tokenizer: Any) -> Items:
    """Return the run's items. The same at every resumption: the model is still the start model.

    Only alternates that are generated need a model. Raises UserError for those without one.
    """
    data, seed = start.data, config.seed
    if start.corpus.kind == "image":
        check_for_images(config.method)
    idk: list[Item] = []
    alt, rl = None, None
    if reads_answers(config.method, "idk"):
        texts = refusals(start.corpus, data)
        picks = rng(seed, "refusals").integers(len(texts), size=len(start.forget))
        refused = [(row, texts[int(k)]) for row, k in zip(start.forget, picks, strict=True)]
        idk = encode_answers(tokenizer, refused, data.format, data.max_length)
    if reads_answers(config.method, "alt"):
        alt = _alternates(config, start, model, tokenizer)
    if reads_answers(config.method, "rl"):
        drawn = random_answers(start.forget, start.retain, seed)
        rl = group_alternates(tokenizer, start.forget, drawn, data.format, data.max_length)
    return Items(
        encode_rows(tokenizer, start.forget, data.format, data.max_length),
        encode_rows(tokenizer, start.retain, data.format, data.max_length),
        idk,
        alt,
        rl,
    )


def watched_items(config: UnlearnConfig, start: Start, tokenizer: Any) -> dict[str, list[Item]]:
    """Return the few items of each split that a run is evaluated on."""
    splits = eval_splits(start.corpus, start.request)
    return {name: _few_items(config, start, tokenizer, rows) for name, rows in splits.items() if name in WATCHED}


def level_of(config: UnlearnConfig, start: Start, tokenizer: Any, model: AnswerModel) -> Level:
    """Return the level given, or what a model that never saw the forget set gives: gold, else the start model on
    authors it never saw, which lies lower where the start is surer of its wrong guesses than gold is; else a share of
    the start's. Raises UserError for a gold of another request.
    """

    splits: Mapping[str, Sequence[QARow]] = eval_splits(start.corpus, start.request)
    by = config.stop.by

    def scores(judge: AnswerModel, split: str) -> tuple[float, float]:
        accuracy, loss, probability = quick_scores(judge, _few_items(config, start, tokenizer, splits[split]))
        return probability if by == "prob" else accuracy, -loss

    never = next((name for name in ("val_holdout", "holdout") if name in splits), None)
    unseen = None if never is None else scores(model, never)
    if config.gold is not None:
        gold_origin = read_origin(config.gold)
        ways = [its.get("config", {}).get("shuffle", "none") for its in (gold_origin, start.origin)]
        if ways[0] != ways[1]:
            raise UserError(
                f"gold {config.gold}: was trained with shuffle={ways[0]}, the start model with shuffle={ways[1]}; "
                "train gold the same way"
            )
        check_same_request(
            config.gold,
            gold_origin,
            start.data_digest,
            request_digest(start.corpus, start.request),
            gold_kind(start.origin),
        )
        gold = answer_model(load_model(config.gold, config.dtype)).to(next(model.parameters()).device)
        source, (found, logp) = "gold", scores(gold, "forget")
    elif unseen is not None:
        source, (found, logp) = "never seen", unseen
    else:
        source, found, logp = "start", None, None
    unseen_logp = None if unseen is None else unseen[1]
    if config.stop.target is not None:
        return Level(config.stop.target, "given", logp, unseen_logp, by)
    if found is None:
        return Level(SHARE_OF_START * scores(model, "forget")[0], source, by=by)
    return Level(found + config.stop.margin, source, logp, unseen_logp, by)


def _alternates(config: UnlearnConfig, start: Start, model: AnswerModel | None, tokenizer: Any) -> Alternates:
    method, data, rows = config.method, start.data, start.forget
    source = method.alternates or ("swapped" if all(r.relation and r.template for r in rows) else "generated")
    n, seed = method.n_alternates, derive(config.seed, "alternates")
    tokens = 0
    if source == "generated":
        if model is None:
            raise UserError(
                "method.alternates=generated: how long they get is known once the start model has written them; plan "
                "with method.alternates=perturbed or swapped"
            )
        texts, tokens = generated(model, tokenizer, rows, n, seed, data.format)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # one token drawn otherwise on another process would give it other batches
            texts = broadcast_object_list([texts])[0]
    elif source == "swapped":
        texts = swapped(rows, start.corpus.split("train"), n, seed)
    else:
        texts = perturbed(rows, n)
    return group_alternates(tokenizer, rows, texts, data.format, data.max_length, tokens)


def _few_items(config: UnlearnConfig, start: Start, tokenizer: Any, rows: Sequence[QARow]) -> list[Item]:
    return encode_rows(tokenizer, _few(rows, config.stop.items), start.data.format)


def _few(rows: Sequence[QARow], n: int) -> list[QARow]:
    if len(rows) <= n:
        return list(rows)
    return [rows[i] for i in sorted(rng(0, "watch", len(rows)).permutation(len(rows))[:n])]
