"""The rules of the answer: every state of a contrast, every verdict over methods, every pair of hypotheses, by hand."""

from __future__ import annotations

import itertools

import pytest

from llm_unlearn.eval.primary import Primary, PrimaryContrast, PrimaryResult
from llm_unlearn.report.answer import ANSWERS, answer, in_words, state, verdict_over

METHODS = ("ga", "npo", "rmu")
NUMBERS = {  # state -> mean, p of no difference, p of at least the bound
    "more": (0.1, 0.01, 0.9),
    "less": (-0.1, 0.01, 0.9),
    "same": (0.01, 0.4, 0.01),
    "cannot tell": (0.04, 0.2, 0.3),
}
VERDICTS = ("holds", "does not hold", "cannot tell", "not run")
STATES = {"holds": "more", "does not hold": "same", "cannot tell": "cannot tell"}


def contrast(kind: str, method: str = "ga", baseline: str = "fit", of: int = 10, **changes) -> PrimaryContrast:
    mean, p, q = NUMBERS[kind]
    plain = {"mean": mean, "lo": mean - 0.02, "hi": mean + 0.02, "p_holm": p, "p_equivalence": q, "detectable": 0.03}
    return PrimaryContrast(method, "grok", baseline, of, of, **{**plain, **changes})


def result(**states: str) -> PrimaryResult:
    """baseline -> the state of all its methods, "not run" for none."""
    declared = Primary(
        measure="kept_at_level", methods=METHODS, contrasts=(("grok", "fit"), ("grok", "easy")), bound=0.05
    )
    none = dict.fromkeys(("mean", "lo", "hi", "p_holm", "p_equivalence", "detectable"))
    found = [
        contrast("more", m, b, 0, **none) if kind == "not run" else contrast(kind, m, b)
        for b, kind in states.items()
        for m in METHODS
    ]
    return PrimaryResult(declared, tuple(found))


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_state(kind):
    assert state(contrast(kind), 0.05) == kind


def test_a_difference_surely_below_the_bound_is_none_that_matters():
    assert state(contrast("more", mean=0.02, p_equivalence=0.001), 0.05) == "same"
    assert state(contrast("less", mean=-0.02, p_equivalence=0.05), 0.05) == "same", "at the level still shown"
    assert state(contrast("more", p_holm=0.05), 0.05) == "more"
    assert state(contrast("more", p_holm=0.051), 0.05) == "cannot tell"


def test_what_could_not_be_tested_cannot_be_told():
    assert state(PrimaryContrast("ga", "grok", "fit", 2, 10, why="collapsed in seed 3"), 0.05) == "cannot tell"


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ((), "not run"),
        (("more", "more", "more"), "holds"),
        (("more", "more", "cannot tell"), "holds"),
        (("more", "cannot tell", "cannot tell"), "cannot tell"),
        (("more", "more", "same"), "cannot tell"),
        (("more", "more", "less"), "cannot tell"),
        (("more", "same", "less"), "cannot tell"),
        (("same", "same", "same"), "does not hold"),
        (("same", "less", "cannot tell"), "does not hold"),
        (("less", "less", "less"), "does not hold"),
        (("same", "cannot tell", "cannot tell"), "cannot tell"),
        (("same", "same", "more"), "cannot tell"),
        (("cannot tell", "cannot tell", "cannot tell"), "cannot tell"),
        (("more", "cannot tell"), "cannot tell"),
        (("more",), "holds"),
        (("less",), "does not hold"),
    ],
)
def test_every_verdict_over_methods(states, verdict):
    assert {verdict_over(order) for order in itertools.permutations(states)} == {verdict}


EXPECTED = {  # H1 (beside fit), H2 (beside easy) -> verdict on "grokking makes forgetting easier", words it has to say
    ("holds", "holds"): ("holds", "Grokking makes forgetting easier"),
    ("holds", "does not hold"): ("does not hold", "generalising does, however it came about"),
    ("holds", "cannot tell"): ("cannot tell", "more easily than one that only memorised; whether"),
    ("holds", "not run"): ("cannot tell", "was not run"),
    ("does not hold", "holds"): ("cannot tell", "not more easily than one that only memorised"),
    ("does not hold", "does not hold"): ("does not hold", "Grokking does not make forgetting easier"),
    ("does not hold", "cannot tell"): ("cannot tell", "no more easily than one that only memorised; beside"),
    ("does not hold", "not run"): ("cannot tell", "was not run"),
    ("cannot tell", "holds"): ("cannot tell", "beside one that only memorised it cannot be told"),
    ("cannot tell", "does not hold"): ("cannot tell", "beside one that only memorised it cannot be told"),
    ("cannot tell", "cannot tell"): ("cannot tell", "Whether grokking makes forgetting easier cannot be told"),
    ("cannot tell", "not run"): ("cannot tell", "one of the two comparisons was not run"),
    ("not run", "holds"): ("cannot tell", "was not run"),
    ("not run", "does not hold"): ("cannot tell", "was not run"),
    ("not run", "cannot tell"): ("cannot tell", "one of the two comparisons was not run"),
    ("not run", "not run"): ("not run", "Not run"),
}


def test_the_table_is_whole():
    assert set(EXPECTED) == set(ANSWERS) == set(itertools.product(VERDICTS, VERDICTS))


@pytest.mark.parametrize("pair", EXPECTED)
def test_every_pair_of_hypotheses(pair):
    states = {b: STATES.get(v, v) for b, v in zip(("fit", "easy"), pair, strict=True)}
    found = answer(result(**states))
    assert tuple(h.verdict for h in found.hypotheses) == pair
    assert found.verdict == EXPECTED[pair][0]
    assert EXPECTED[pair][1] in found.words


def test_nothing_run_and_nothing_judged():
    assert answer(None).verdict == "cannot tell", "a study that ran without the runs that decide"
    declared = result(fit="more").declared
    other = declared.model_copy(update={"contrasts": (("easy", "twin"),)})
    assert answer(PrimaryResult(other, (contrast("more", baseline="twin"),))).words.startswith("The study's declared")
    broken = answer(PrimaryResult(declared, (), "3 of its runs were made before it was declared"))
    assert [h.verdict for h in broken.hypotheses] == ["cannot tell", "cannot tell"]


def test_a_pair_that_was_not_declared_is_not_run():
    assert [h.verdict for h in answer(result(fit="more")).hypotheses] == ["holds", "not run"]


def test_the_clause_names_every_method_with_its_number():
    found = result(fit="more")
    mixed = (
        found.contrasts[0],
        contrast("cannot tell", "npo"),
        PrimaryContrast("rmu", "grok", "fit", 2, 10, why="x y"),
    )
    (h1, _) = answer(PrimaryResult(found.declared, mixed)).hypotheses
    text = in_words(h1, 0.05)
    assert text.startswith("keeps more than one that only memorised (`grok` minus `fit`): cannot tell; ")
    assert "more with ga (+0.100 [+0.080, +0.120])" in text
    assert "cannot tell with npo (+0.040 [+0.020, +0.060]) and rmu (not testable: x y)" in text
