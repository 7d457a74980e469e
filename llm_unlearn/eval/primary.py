"""The contrast a study stands or falls by: named before the runs, tested alone, with what it could have detected.

Everything else a study shows is exploratory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.stats import detectable_effect, equivalence, holm, paired_difference, paired_spread

POWER = 0.8
MIN_SEEDS = 3
Verdict = Literal["differs", "equivalent", "cannot tell", "not testable"]


class Primary(Config):
    """What a study is to decide, stated before it runs; it goes into every result."""

    measure: str = Field(
        description="Metric of the suite, `METRIC~gold` for its distance to gold, `METRIC~drop` for its fall from "
        "doing nothing's, or a number of the run (kept_at_level, updates_to_target, retain_at_target ...)."
    )
    methods: tuple[str, ...] = Field(min_length=1, description="Methods it is judged on.")
    contrasts: tuple[tuple[str, str], ...] = Field(
        min_length=1, description="Pairs of checkpoints, for example [[grok, fit], [grok, easy]]: first minus second."
    )
    scenario: str = Field("", description="Which of `scenarios`; empty in a study of one.")
    bound: float = Field(
        gt=0,
        description="Smallest difference of interest, in the measure's unit: one surely smaller counts as equivalence.",
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="Family-wise error of the tests of difference, and of those of equivalence."
    )


@dataclass(frozen=True)
class Paired:
    """The numbers of two checkpoints under a method, in the order of the seeds both have; `why` there are none that
    can be compared. `resolution` is the step of the grid they lie on, `of` counts the seeds either has.
    """

    a: Sequence[float]
    b: Sequence[float]
    resolution: float
    of: int
    why: str = ""


@dataclass(frozen=True)
class PrimaryContrast:
    """One contrast of the primary: difference `group` minus `baseline` over `n` of the `of` seeds that have a run, with
    its 1 - alpha interval.

    `p_holm` tests "no difference", `p_equivalence` "at least the bound apart"; each is Holm-corrected over all
    contrasts declared, those that could not be tested included. `detectable` is the smallest true difference found with
    80 % power at alpha / (contrasts declared), given the seeds and the spread observed. None throughout where not
    testable: `why` says it.
    """

    method: str
    group: str
    baseline: str
    n: int
    of: int
    mean: float | None = None
    lo: float | None = None
    hi: float | None = None
    p_holm: float | None = None
    p_equivalence: float | None = None
    detectable: float | None = None
    verdict: Verdict = "not testable"
    why: str = ""


@dataclass(frozen=True)
class PrimaryResult:
    """A declared primary and what came of it; with a `problem` nothing was tested."""

    declared: Primary
    contrasts: tuple[PrimaryContrast, ...]
    problem: str = ""


def judge(primary: Primary, paired: Callable[[str, str, str], Paired]) -> PrimaryResult:
    """Test every contrast that a primary declares.

    Args:
        primary: what was declared.
        paired: (method, checkpoint, checkpoint) -> their numbers.
    """
    family = [(method, group, baseline) for group, baseline in primary.contrasts for method in primary.methods]
    data = [_enough(paired(*member)) for member in family]
    tested = [None if d.why else paired_difference(d.a, d.b, 1 - primary.alpha, d.resolution) for d in data]
    equal = [None if d.why else equivalence(d.a, d.b, primary.bound, primary.alpha, d.resolution) for d in data]
    # what could not be tested keeps its place in the family, or a failure would make the other tests easier
    p_holm, p_equal = (holm([1.0 if t is None else t.p for t in tests]) for tests in (tested, equal))
    out = []
    for i, (member, d, t) in enumerate(zip(family, data, tested, strict=True)):
        if t is None:
            out.append(PrimaryContrast(*member, len(d.a), d.of, why=d.why))
            continue
        found = detectable_effect(paired_spread(d.a, d.b, d.resolution), t.n, primary.alpha / len(family), POWER)
        p, q = float(p_holm[i]), float(p_equal[i])
        verdict = "differs" if p <= primary.alpha else "equivalent" if q <= primary.alpha else "cannot tell"
        out.append(PrimaryContrast(*member, t.n, d.of, t.mean, t.lo, t.hi, p, q, found, verdict))
    return PrimaryResult(primary, tuple(out))


def _enough(d: Paired) -> Paired:
    if d.why or len(d.a) >= MIN_SEEDS:
        return d
    return replace(d, why=f"{len(d.a)} seed{'' if len(d.a) == 1 else 's'} in common, {MIN_SEEDS} needed")
