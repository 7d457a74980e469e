"""Measures that take what a model scored, what gold scored and what doing nothing scored at once: computed from the
lines of a results file, where the three stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_unlearn.eval.metrics.damage import (
    Accuracies,
    Score,
    forgotten_share,
    kept_share,
    unlearning_balance,
    unlearning_efficiency,
)

DERIVED = ("unlearning_balance", "forgotten_share", "kept_test_share", "kept_retain_share", "ues")
READ = ("test_acc", "retain_acc", "forget_acc")
Lines = Mapping[str, Mapping[str, Any]]


def derive(name: str, lines: Lines, who: str = "value") -> Score:
    """Return a measure of `DERIVED`, or None with the reason why there is none.

    Args:
        name: which.
        lines: `metrics` of a results file; `test_acc`, `retain_acc` and `forget_acc` are read, and `test_chance` and
            `retain_chance` where they are there.
        who: of whom: "value" the model, "gold", or "start" (doing nothing).
    """
    try:
        start, model = _accuracies(lines, "start"), _accuracies(lines, who)
        if name == "ues":
            return unlearning_efficiency(start, model)
        chance = tuple((lines.get(f"{split}_chance") or {}).get("value") or 0.0 for split in ("test", "retain"))
        if name == "kept_test_share":
            return kept_share(start.test, model.test, chance[0])
        if name == "kept_retain_share":
            return kept_share(start.retain, model.retain, chance[1])
        gold = _accuracies(lines, "gold")
    except ValueError as error:
        return Score(None, str(error))
    if name == "forgotten_share":
        return forgotten_share(start, model, gold)
    return unlearning_balance(start, model, gold, (chance[0], chance[1]))


def _accuracies(lines: Lines, who: str) -> Accuracies:
    found: dict[str, Any] = {name: (lines.get(name) or {}).get(who) for name in READ}
    if missing := [name for name in READ if found[name] is None]:
        words = {"value": "the model's", "gold": "gold's", "start": "the start model's"}
        raise ValueError(f"needs {words[who]} {', '.join(missing)}")
    return Accuracies(*(float(found[name]) for name in READ))
