"""Training data that cannot be generalised from: the same questions and answers, wrongly paired."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from llm_unlearn.data.schema import Corpus
from llm_unlearn.errors import UserError
from llm_unlearn.seeding import rng


def shuffle_inferred(corpus: Corpus, seed: int) -> Corpus:
    """Return the corpus with the answers of its trained inferred questions (hop > 1) permuted among questions of the
    same relation and wording; everything else, held-out questions included, as it is.

    In every group each question takes the answer of the next one in a random order, so none keeps its own, though the
    next one's may be the same text. A question alone in its group keeps its answer. The draw does not depend on what a
    run leaves out, so a model and its gold are trained on the same pairs.

    Raises UserError when there is nothing to permute: no inferred questions, or none that share relation and wording.
    """
    rows = list(corpus.split("train"))
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.hop > 1:
            groups[row.relation, row.template].append(i)
    if not any(len(members) > 1 for members in groups.values()):
        raise UserError(f"shuffle=inferred: '{corpus.name}' trains no inferred questions to shuffle; set shuffle=none")
    answers = [row.answer for row in rows]
    for (relation, wording), members in groups.items():
        order = [members[i] for i in rng(seed, "shuffle", relation, wording).permutation(len(members))]
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            rows[here] = replace(rows[here], answer=answers[there])
    return replace(corpus, splits={**corpus.splits, "train": tuple(rows)})
