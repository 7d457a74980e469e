"""From a split's rows to its records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from llm_unlearn.data.images import Classes
from llm_unlearn.data.schema import QARow
from llm_unlearn.data.tokenise import FormatName, Item, encode_answers, only_texts, resolve_format
from llm_unlearn.errors import UserError
from llm_unlearn.eval.families import score_families
from llm_unlearn.eval.generation import classify, generate
from llm_unlearn.eval.metrics.accuracy import same_answer
from llm_unlearn.eval.metrics.base import Record, Scored
from llm_unlearn.eval.scoring import gradient_norms
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import AnswerModel, position_limit

log = get_logger(__name__)


def score_split(
    model: AnswerModel,
    tokenizer: Any,
    rows: Sequence[QARow],
    *,
    fmt: FormatName = "auto",
    needs: Collection[str] = (),
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
) -> list[Record]:
    """Return one Record per row: the answer, and by `needs` also the paraphrased and wrong answers ("perturbed"),
    greedy text cut before the first of `stop` ("generation"), mean and variance over the vocabulary ("vocabulary"), the
    gradient's norm ("gradient"). For an image the generation is the most likely class, asked for or not.

    An item counts as correct when the generation equals its answer; without generation, when every answer token and the
    end token are the most likely ones, which is when greedy decoding would produce it.
    """
    texts = [[row.answer, *(_other_answers(row) if "perturbed" in needs else ())] for row in rows]
    encoded = iter(
        encode_answers(tokenizer, [(row, t) for row, told in zip(rows, texts, strict=True) for t in told], fmt)
    )
    families: list[list[Any]] = [[next(encoded) for _ in told] for told in texts]  # texts or images
    own = [family[0] for family in families]
    _check_length(model, families)
    scored = score_families(model, families, vocabulary="vocabulary" in needs)
    records = [_record(i, row, first, rest) for i, (row, (first, *rest)) in enumerate(zip(rows, scored, strict=True))]
    if "gradient" in needs:
        norms = gradient_norms(model, own)
        records = [replace(r, grad_norm=norm) for r, norm in zip(records, norms, strict=True)]
    if resolve_format(tokenizer, fmt) == "openunlearning":  # it scores less than the answer
        targets = [tokenizer.decode(item.ids[item.start :], skip_special_tokens=True) for item in only_texts(own)]
        records = [replace(r, target=target) for r, target in zip(records, targets, strict=True)]
    if isinstance(tokenizer, Classes):
        named = classify(model, own, tokenizer.names, [r.scored for r in records])
        return [replace(r, generation=name) for r, name in zip(records, named, strict=True)]
    if "generation" in needs:
        generated = generate(model, tokenizer, only_texts(own), max_new_tokens, [r.scored for r in records], stop)
        records = [
            replace(r, generation=text, correct=same_answer(text, r.answer))
            for r, text in zip(records, generated, strict=True)
        ]
    return records


def _check_length(model: AnswerModel, families: Sequence[Sequence[Item]]) -> None:
    limit, ends = position_limit(model.lm.config)
    lengths = [max(item.n_inputs + 1 for item in family) for family in families]
    if limit is None or max(lengths, default=0) <= limit:
        return
    row = lengths.index(max(lengths))
    what = f"row {row + 1} has {lengths[row]:,} tokens, the model takes {limit:,}"
    if ends:
        raise UserError(f"{what}; shorten the row, or evaluate a model that takes more")
    log.warning("%s: scored beyond the length it was made for", what)


def _other_answers(row: QARow) -> list[str]:
    return ([] if row.paraphrased_answer is None else [row.paraphrased_answer]) + list(row.perturbed_answer)


def _record(i: int, row: QARow, own: Scored, others: Sequence[Scored]) -> Record:
    n = int(bool(others) and row.paraphrased_answer is not None)
    paraphrase, perturbed = others[0] if n else None, tuple(others[n:])
    right = bool(own.hit.all())
    return Record(i, row.author or str(i), row.question, row.answer, own, paraphrase, perturbed, correct=right)
