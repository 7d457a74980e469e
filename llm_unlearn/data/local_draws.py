"""Forget requests of questions that a model learnt early ("locally grokked") or late, and draws matched on ease.

The rule is that of "Grokked Models are Better Unlearners" (arXiv:2512.03437): a question is locally grokked if its loss
falls by less than .01 between an early epoch and the last one (20 and 100 there), locally ungrokked if by more than .5
(`Scenario.grokked_below`, `ungrokked_above`: a model that learns everything at about the same time has hardly any).
What it selects are the questions learnt early, and those not learnt at all; nothing in it asks for generalisation (see
`grok.facts` for that). Questions learnt early are short, made of frequent words and better known, so that what is seen
of them may be due to any of these: `Scenario.match` draws pairs of one question of each group that are alike in them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_unlearn.data.loss_record import FILE, read_record
from llm_unlearn.data.schema import Corpus
from llm_unlearn.errors import UserError
from llm_unlearn.seeding import rng

if TYPE_CHECKING:
    from llm_unlearn.data.splits import Scenario

LOCAL = ("local_grok", "local_ungrok")
CALIPER = 0.25
"""Most that the two of a pair may differ in any trait, in standard deviations of both groups: means of groups further
apart than that are commonly held to be out of balance (Rubin 2001, doi:10.1023/A:1020363010465).
"""


@dataclass(frozen=True)
class Questions:
    """The Q stored questions of a corpus as a record saw them; a question's wordings count as one.

    Attributes:
        facts: (Q,) ids of the stored facts they ask for.
        fall: (Q,) loss at the early epoch less that at the late one, nats per answer token.
        traits: name -> (Q,), what a draw can be matched on: `frequency`, `length` (see LossRecord), and `loss`, at the
            late epoch.
        below: fall under which a question is locally grokked.
        above: fall over which it is locally ungrokked.
    """

    facts: tuple[str, ...]
    fall: np.ndarray
    traits: dict[str, np.ndarray]
    below: float
    above: float

    def group(self, kind: str) -> np.ndarray:
        """Return the numbers of the questions that are `local_grok` or `local_ungrok`."""
        return np.flatnonzero(self.fall < self.below if kind == "local_grok" else self.fall > self.above)


def draw_local(corpus: Corpus, scenario: Scenario, facts: tuple[str, ...]) -> frozenset[str]:
    """Return the facts a scenario of kind `local_grok` or `local_ungrok` asks to be forgotten.

    With `match`, both kinds draw from the same pairs: draws of one seed and size hold the two sides of the same pairs.

    Args:
        facts: by row of `train`, the stored fact it states; "" if it states none.

    Raises UserError for a record that is missing, damaged, of other data or of a gold model, an epoch it does not hold,
    and fewer questions that satisfy the rule (or pairs) than asked for.
    """
    seen = questions(corpus, scenario, facts)
    if scenario.match:
        pool = pairs(seen, scenario.match)[LOCAL.index(scenario.kind)]
        what, hint = "pairs of questions alike in " + ", ".join(scenario.match), "match on fewer traits"
        draw = rng(scenario.seed, "forget", "local pairs")
    else:
        pool = seen.group(scenario.kind)
        rule = f"< {seen.below:g}" if scenario.kind == "local_grok" else f"> {seen.above:g}"
        what = f"questions whose loss falls by {rule} from epoch {scenario.early_epoch:g} to {scenario.late_epoch:g}"
        hint = "choose other epochs, or another scenario.grokked_below and ungrokked_above"
        draw = rng(scenario.seed, "forget", scenario.kind)
    if len(pool) < scenario.size:
        raise UserError(
            f"scenario kind={scenario.kind}: size={scenario.size}, but {len(pool) or 'no'} {what}; lower "
            f"scenario.size, or {hint}"
        )
    return frozenset(seen.facts[pool[i]] for i in draw.permutation(len(pool))[: scenario.size])


def questions(corpus: Corpus, scenario: Scenario, facts: tuple[str, ...]) -> Questions:
    """Return the corpus' stored questions as the scenario's record saw them; UserError as `draw_local`."""
    if scenario.record is None:
        raise UserError(
            f"scenario.kind={scenario.kind}: needs scenario.record, the folder of a run of recipes/finetune.py with "
            "record_epochs"
        )
    folder = Path(scenario.record)
    record = read_record(folder)
    if record.exclude != "none":
        raise UserError(f"{folder / FILE}: is of a model trained without forget rows; give the run that saw all")
    if record.data != corpus.identity:
        raise UserError(f"{folder / FILE}: is of other data than '{corpus.name}'; give a run on the same data")
    fall = record.at(scenario.early_epoch) - record.at(scenario.late_epoch)
    traits = {"frequency": record.frequency, "length": record.length, "loss": record.at(scenario.late_epoch)}
    rows: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        if fact:
            rows.setdefault(fact, []).append(i)

    def by_question(values: np.ndarray) -> np.ndarray:
        return np.array([values[its].mean() for its in rows.values()], dtype=np.float64)

    by_name = {name: by_question(values) for name, values in traits.items()}
    return Questions(tuple(rows), by_question(fall), by_name, scenario.grokked_below, scenario.ungrokked_above)


def pairs(seen: Questions, match: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of n grokked and n ungrokked questions, pair by pair: as many pairs as the caliper allows, of
    those the ones with the smallest sum of squared distances.
    """
    groups = [seen.group(kind) for kind in LOCAL]
    if not all(len(group) > 1 for group in groups):
        return groups[0][:0], groups[1][:0]
    values = [np.stack([seen.traits[name][group] for name in match], axis=1) for group in groups]
    spread = np.sqrt((values[0].var(0, ddof=1) + values[1].var(0, ddof=1)) / 2)
    scaled = [np.where(spread > 0, v / np.where(spread > 0, spread, 1), 0.0) for v in values]
    a, b = _assign(*(tuple(map(tuple, v.tolist())) for v in scaled))
    return groups[0][list(a)], groups[1][list(b)]


@functools.lru_cache(maxsize=4)
def _assign(a: tuple[tuple[float, ...], ...], b: tuple[tuple[float, ...], ...]) -> tuple[list[int], list[int]]:
    """Pair rows of two tables; every run of a draw asks for the same, and thousands by thousands take seconds."""
    from scipy.optimize import linear_sum_assignment

    apart = np.abs(np.array(a)[:, None, :] - np.array(b)[None, :, :])
    allowed = apart.max(-1) <= CALIPER
    # one pair more always outweighs what distances can add up to
    never = 1.0 + len(a) * len(a[0]) * CALIPER**2
    first, second = linear_sum_assignment(np.where(allowed, np.square(apart).sum(-1), never))
    kept = allowed[first, second]
    return first[kept].tolist(), second[kept].tolist()
