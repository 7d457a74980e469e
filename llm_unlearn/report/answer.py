"""The answer of a study in plain words, by rule from what came of its primary contrasts; nothing is chosen by hand.

A contrast (a method, grokked minus another checkpoint), after Holm's correction over all that were declared:

    same         equivalence shown: the difference is surely below the bound, whether or not it is 0
    more         differs and above 0: grokked keeps more
    less         differs and below 0
    cannot tell  none of these; a contrast that could not be tested (a collapsed run, too few seeds) too

A hypothesis ("grokked keeps more than X") over the methods declared:

    holds          more than half of them say more, and none same or less
    does not hold  more than half say same or less, and none more
    cannot tell    otherwise, and where the contrasts were not judged
    not run        no run of any of them, or not declared

The answer, of H1 (more than `fit`: memorised, not generalised) and H2 (more than `easy`: generalises without delay), is
the table `ANSWERS`: grokking helps where both hold; where H1 holds and H2 does not, generalising helps, however it came
about; where neither holds, grokking does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_unlearn.eval.primary import PrimaryContrast, PrimaryResult
from llm_unlearn.report.design import digits_for
from llm_unlearn.report.text import listed

State = Literal["more", "less", "same", "cannot tell"]
Verdict = Literal["holds", "does not hold", "cannot tell", "not run"]
OTHERS = {"fit": "one that only memorised", "easy": "one that generalised without delay"}
H1, H2 = ("grok", "fit"), ("grok", "easy")

_GENERALISING = "Grokking as such does not make forgetting easier: generalising does, however it came about"
_NEITHER = "Grokking does not make forgetting easier"
_HALF = "A grokked model forgets more easily than one that only memorised; whether that is owed to grokking"
_UNCLEAR = "Whether grokking makes forgetting easier cannot be told"
ANSWERS: dict[tuple[Verdict, Verdict], tuple[Verdict, str]] = {
    ("holds", "holds"): ("holds", "Grokking makes forgetting easier"),
    ("holds", "does not hold"): ("does not hold", _GENERALISING),
    ("holds", "cannot tell"): ("cannot tell", f"{_HALF} or to generalising cannot be told"),
    ("holds", "not run"): ("cannot tell", f"{_HALF} or to generalising was not run"),
    ("does not hold", "holds"): (
        "cannot tell",
        "A grokked model forgets more easily than one that generalised without delay, and not more easily than one "
        "that only memorised",
    ),
    ("does not hold", "does not hold"): ("does not hold", _NEITHER),
    ("does not hold", "cannot tell"): (
        "cannot tell",
        "A grokked model forgets no more easily than one that only memorised; beside one that generalised without "
        "delay it cannot be told",
    ),
    ("does not hold", "not run"): (
        "cannot tell",
        "A grokked model forgets no more easily than one that only memorised; the other comparison was not run",
    ),
    ("cannot tell", "holds"): (
        "cannot tell",
        "A grokked model forgets more easily than one that generalised without delay; beside one that only memorised "
        "it cannot be told",
    ),
    ("cannot tell", "does not hold"): (
        "cannot tell",
        "A grokked model forgets no more easily than one that generalised without delay; beside one that only "
        "memorised it cannot be told",
    ),
    ("cannot tell", "cannot tell"): ("cannot tell", _UNCLEAR),
    ("cannot tell", "not run"): ("cannot tell", f"{_UNCLEAR}; one of the two comparisons was not run"),
    ("not run", "holds"): (
        "cannot tell",
        "A grokked model forgets more easily than one that generalised without delay; the other comparison was not run",
    ),
    ("not run", "does not hold"): (
        "cannot tell",
        "A grokked model forgets no more easily than one that generalised without delay; the other comparison was not "
        "run",
    ),
    ("not run", "cannot tell"): ("cannot tell", f"{_UNCLEAR}; one of the two comparisons was not run"),
    ("not run", "not run"): ("not run", "Not run"),
}


@dataclass(frozen=True)
class Hypothesis:
    """What came of "`group` keeps more than `baseline`": methods by state, in the order declared."""

    group: str
    baseline: str
    verdict: Verdict
    states: dict[str, State]
    contrasts: tuple[PrimaryContrast, ...]


@dataclass(frozen=True)
class Answer:
    """A study's answer: verdict on "grokking makes forgetting easier", the sentence, and both hypotheses."""

    verdict: Verdict
    words: str
    hypotheses: tuple[Hypothesis, ...]


def state(contrast: PrimaryContrast, alpha: float) -> State:
    """Return what a contrast says, see the rules above."""
    if contrast.mean is None or contrast.p_holm is None or contrast.p_equivalence is None:
        return "cannot tell"
    if contrast.p_equivalence <= alpha:
        return "same"
    if contrast.p_holm <= alpha:
        return "more" if contrast.mean > 0 else "less"
    return "cannot tell"


def verdict_over(states: Sequence[State]) -> Verdict:
    """Return the verdict on a hypothesis from the states of the methods declared; none at all: not run."""
    more, other = (sum(s in which for s in states) for which in (("more",), ("same", "less")))
    if not states:
        return "not run"
    if 2 * more > len(states) and not other:
        return "holds"
    return "does not hold" if 2 * other > len(states) and not more else "cannot tell"


def answer(result: PrimaryResult | None) -> Answer:
    """Return the answer of a study that was run, from its primary; None where it has no run that the primary reads."""
    if result is None:
        return Answer("cannot tell", "The study ran, and the contrasts that decide have no runs", ())
    if not {H1, H2} & set(result.declared.contrasts):
        return Answer("cannot tell", "The study's declared contrasts are others than those that decide", ())
    found = {pair: _hypothesis(result, pair) for pair in (H1, H2)}
    verdict, words = ANSWERS[found[H1].verdict, found[H2].verdict]
    return Answer(verdict, words, tuple(found.values()))


def in_words(h: Hypothesis, bound: float) -> str:
    """Return what came of a hypothesis with its numbers, in one clause."""
    other = OTHERS.get(h.baseline, h.baseline)
    head = f"keeps more than {other} (`{h.group}` minus `{h.baseline}`): {h.verdict}"
    if not h.contrasts:
        return head
    digits = digits_for(bound)
    words = {"more": "more", "less": "less", "same": f"differs by less than {bound:g}", "cannot tell": "cannot tell"}
    parts = []
    for name, said in words.items():
        mine = [c for c in h.contrasts if h.states[c.method] == name]
        if mine:
            parts.append(f"{said} with {listed([_number(c, digits) for c in mine])}")
    return f"{head}; {', '.join(parts)}"


def _hypothesis(result: PrimaryResult | None, pair: tuple[str, str]) -> Hypothesis:
    if result is not None and result.problem and pair in result.declared.contrasts:
        return Hypothesis(*pair, "cannot tell", {}, ())
    contrasts = [] if result is None else [c for c in result.contrasts if (c.group, c.baseline) == pair]
    if result is None or not any(c.of for c in contrasts):
        return Hypothesis(*pair, "not run", {}, ())
    states: dict[str, State] = {c.method: state(c, result.declared.alpha) for c in contrasts}
    return Hypothesis(*pair, verdict_over(list(states.values())), states, tuple(contrasts))


def _number(c: PrimaryContrast, digits: int) -> str:
    if c.mean is None:
        return f"{c.method} (not testable: {c.why})"
    return f"{c.method} ({c.mean:+.{digits}f} [{c.lo:+.{digits}f}, {c.hi:+.{digits}f}])"
