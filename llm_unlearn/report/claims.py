"""What was published, what we measured, and whether the one follows from the other.

The rule, for an effect written so that above 0 is the claimed side, with its 95 % interval [lo, hi] over paired seeds:

    holds           lo > 0
    does not hold   hi < half of the published effect (hi < 0 where none above 0 was published)
    cannot tell     otherwise

An interval can rule out half of the published effect and still be above 0: then the claim holds, and it is said that it
is smaller. Seeds are the unit: for the verdict a seed's effect is first averaged over the methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llm_unlearn.eval.compare import paired_numbers
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.reach import horizon_of
from llm_unlearn.report import published
from llm_unlearn.report.course import MIN_SPREAD, held_to_levels, judged_by, times_by_place
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS
from llm_unlearn.report.paper_table import checkpoints
from llm_unlearn.report.text import DASH, counted, listed
from llm_unlearn.stats import Interval, paired_difference, variance_ratio

Verdict = Literal["holds", "does not hold", "cannot tell"]
SET_BY_A_LEVEL = ("forget_acc", "forget_acc~gold")
"""What a study that holds every run to a forget level, gold's plus a margin, has decided itself."""
BY_DESIGN = "the study brings every run to its forget level; see the area below the frontiers"
BASELINES = ("early", "fit", "fit_scaled", "easy")
"""The published comparison, and the three without which it says nothing about grokking."""


@dataclass(frozen=True)
class Claim:
    """A published claim about grokked against other checkpoints.

    Attributes:
        words: what is claimed.
        measure: as `Outcome.number` knows it; of a "time" one of `Outcome.time_until`.
        kind: what the effect is: a "difference" of shares, of a "value" in its own unit, or the log ratio of a "time",
            a "variance" or any number above 0 (a "ratio").
        sign: 1 where more is claimed, -1 where less is.
        published: effect in the claimed direction, in that unit; below 0 where the published table contradicts the
            claim; None where no number was given.
        topic: what of the paper's it belongs to.
    """

    words: str
    measure: str
    kind: Literal["difference", "value", "time", "variance", "ratio"]
    sign: int
    published: float | None
    topic: str = ""

    @property
    def least(self) -> float:
        """Effect an interval has to rule out before a claim is said not to hold."""
        return max(self.published or 0.0, 0.0) / 2


@dataclass(frozen=True)
class Judged:
    """A claim with our numbers: `effect` in the claimed direction, None with the reason where nothing can be said."""

    claim: Claim
    group: str
    baseline: str
    effect: Interval | None
    methods: tuple[str, ...]
    """Those averaged over, on the seeds they share; a method with fewer seeds than most have, or collapsed in one, is
    left out.
    """
    left_out: tuple[str, ...]
    verdict: Verdict
    why: str


def published_claims() -> tuple[Claim, ...]:
    """Return the claims of the paper that accuracies and trajectories can settle, with its own numbers."""
    efficient, damage = "efficient forgetting", "less collateral damage"
    shift = published.shift
    return (
        Claim("UA after unlearning is lower", "forget_acc", "difference", -1, -shift("forget_acc"), efficient),
        Claim("TA after unlearning is higher", "test_acc", "difference", 1, shift("test_acc"), damage),
        Claim("RA after unlearning is higher", "retain_acc", "difference", 1, shift("retain_acc"), damage),
        Claim("TA falls by less", "test_acc~drop", "difference", -1, -shift("test_acc~drop"), damage),
        Claim("RA falls by less", "retain_acc~drop", "difference", -1, -shift("retain_acc~drop"), damage),
        Claim("UA comes nearer to gold's", "forget_acc~gold", "difference", -1, None, efficient),
        Claim(
            "fewer updates to the forget level",
            "updates_to_gold_acc",
            "time",
            -1,
            -published.updates_log_ratio(),
            efficient,
        ),
        Claim("UA varies less over seeds", "forget_acc", "variance", -1, -published.variance_log_ratio(), "stability"),
        Claim("RA varies less over seeds", "retain_acc", "variance", -1, None, "stability"),
    )


def judge(claim: Claim, effect: Interval) -> tuple[Verdict, str]:
    """Return the verdict on a claim and what to say with it, see the rule above."""
    if effect.lo > 0:
        smaller = claim.least > 0 and effect.hi < claim.least
        return "holds", "but by less than half of what was published" if smaller else ""
    if effect.hi < 0:
        return "does not hold", "it is the other way round"
    if effect.hi < claim.least:
        return "does not hold", "an effect half as large as published is ruled out"
    return "cannot tell", "the interval holds both no effect and one that would count"


def claims(
    outcomes: Sequence[Outcome], group: str = "grok", baselines: Sequence[str] = BASELINES, at_level: bool = True
) -> list[Judged]:
    """Return every published claim judged for `group` against every baseline that has runs, of one forget request and
    architecture.

    Args:
        at_level: whether runs deliver the step at their forget level; where all are held to one, what that decides is
            then not judged, and what is kept is less what lies above the level. False: they deliver the last
            of equally many updates, as the published ones.
    """
    have, held = checkpoints(outcomes), at_level and held_to_levels(outcomes)
    known = {name for o in outcomes for name in o.metrics}
    settled = [c for c in published_claims() if c.kind == "time" or c.measure.partition("~")[0] in known]
    return [
        _set_by_design(claim, group, baseline)
        if held and claim.measure in SET_BY_A_LEVEL
        else _judged(_at_level(claim) if held else claim, outcomes, group, baseline)
        for baseline in baselines
        if {group, baseline} <= set(have)
        for claim in settled
    ]


def _at_level(claim: Claim) -> Claim:
    """Return a claim on what is kept with what was not forgotten counted against it: a run that forgets nothing keeps
    all.
    """
    if claim.kind != "difference":
        return claim
    return replace(claim, words=f"{claim.words}, at the forget level", measure=f"{claim.measure}@level")


def _set_by_design(claim: Claim, group: str, baseline: str) -> Judged:
    return Judged(claim, group, baseline, None, (), (), "cannot tell", BY_DESIGN)


def claims_grid(found: Sequence[Judged], words: str = "") -> Grid:
    """Return judged claims as a grid."""
    rows: list[Row] = []
    for baseline in dict.fromkeys(j.baseline for j in found):
        mine = [j for j in found if j.baseline == baseline]
        rows.append(Row((f"{mine[0].group} rather than {baseline}",), "section"))
        for j in mine:
            n = str(j.effect.n) if j.effect else DASH
            without = f"without {listed(j.left_out)}" if j.left_out and j.effect else ""
            why = "; ".join(filter(None, (j.why, without)))
            cells = (shown(j.claim, j.claim.published), interval(j), n, str(len(j.methods)), j.verdict, why)
            rows.append(Row((j.claim.words, *cells)))
    notes = (
        "Effects in the claimed direction: differences in percentage points (of probes in their own unit), above 0; "
        "times, variances and complexity as ratios to "
        "the other checkpoint's, below 1. Ours: mean over methods, paired by seed [95 % interval, each on its own].",
        "Rule: holds if the whole interval is on the claimed side of no effect; does not hold if it leaves out half of "
        "the published effect (or, where none or the opposite was published, lies on the other side of no effect); "
        "cannot tell otherwise. Published: means over the table's methods, against its early-stopped checkpoint.",
    )
    if any(j.claim.measure.endswith("@level") for j in found):
        notes = (*notes, "At the forget level: what a run left above it counts one for one against what it kept, since "
                 "one that forgets nothing keeps all.")  # fmt: skip
    heads = ("published claim", "published", "ours", "seeds", "methods", "verdict", "")
    return Grid("Published claims" + (f": {words}" if words else ""), heads, tuple(rows), notes)


def _judged(claim: Claim, outcomes: Sequence[Outcome], group: str, baseline: str) -> Judged:
    methods = sorted({o.method for o in outcomes if o.checkpoint == group})
    numbers = {m: _numbers(claim, outcomes, m, group, baseline) for m in methods}
    n_seeds = Counter(len(values) for values, _ in numbers.values() if values)
    usual = max(n_seeds, key=lambda n: (n_seeds[n], n), default=0)  # what most methods have; some may have more
    used = [m for m in methods if usual and len(numbers[m][0]) >= usual]
    seeds = sorted(set.intersection(*(set(numbers[m][0]) for m in used))) if used else []
    left_out = tuple(m for m in methods if m not in used)
    need = MIN_SPREAD if claim.kind == "variance" else MIN_SEEDS
    if len(seeds) < need:
        why = f"{counted(len(seeds), 'seed')} without a collapsed run on both sides, {need} are needed"
        return Judged(claim, group, baseline, None, tuple(used), left_out, "cannot tell", why)
    sides_NM2 = np.array([[numbers[m][0][s] for m in used] for s in seeds])
    try:
        effect = _effect(claim, sides_NM2, max(numbers[m][1] for m in used))
    except ValueError as error:  # a variance below the grid
        return Judged(claim, group, baseline, None, tuple(used), left_out, "cannot tell", str(error).split(": ")[-1])
    return Judged(claim, group, baseline, effect, tuple(used), left_out, *judge(claim, effect))


def _numbers(
    claim: Claim, outcomes: Sequence[Outcome], method: str, group: str, baseline: str
) -> tuple[Mapping[int, tuple[float, float]], float]:
    """Seed -> (group's, baseline's) number, and the step of the grid they lie on."""
    if claim.kind != "time":
        return paired_numbers(outcomes, method, group, baseline, claim.measure)
    mine = [o for o in outcomes if o.method == method]
    times = times_by_place(mine, judged_by(outcomes), "updates")
    a, b = times.get((method, group), {}), times.get((method, baseline), {})
    seeds = sorted(a.keys() & b.keys())
    limit = horizon_of([side[s] for side in (a, b) for s in seeds])
    if not limit:
        return {}, 0.0
    # what is there from the start took no update; the first evaluation is the finest that can be told
    first = min(o.trajectory[1]["step"] for o in outcomes if o.method == method and len(o.trajectory) > 1)
    log = {
        s: [float(np.log(max(min(side[s].at if side[s].reached else limit, limit), first))) for side in (a, b)]
        for s in seeds
    }
    return {s: (x, y) for s, (x, y) in log.items()}, 0.0


def _effect(claim: Claim, sides_NM2: np.ndarray, resolution: float) -> Interval:
    """Effect in the claimed direction over seeds; sides: (seeds, methods, group and baseline)."""
    a_NM, b_NM = sides_NM2[..., 0], sides_NM2[..., 1]
    if claim.kind == "variance":
        ratio = variance_ratio(a_NM, b_NM, resolution=resolution)
        mean, lo, hi = np.log([ratio.mean, ratio.lo, ratio.hi])
    else:
        step = resolution / np.sqrt(a_NM.shape[1])  # rounding of a mean over methods
        found = paired_difference(a_NM.mean(1), b_NM.mean(1), resolution=float(step))
        mean, lo, hi = found.mean, found.lo, found.hi
    limits = sorted((claim.sign * float(lo), claim.sign * float(hi)))
    return Interval(claim.sign * float(mean), limits[0], limits[1], len(a_NM))


def shown(claim: Claim, effect: float | None) -> str:
    """Return an effect as tables have it: percentage points, a value's own unit, or a ratio to the other side's."""
    if effect is None:
        return DASH
    if claim.kind == "value":
        return f"{effect:+.3g}"
    return f"{100 * effect:+.1f}" if claim.kind == "difference" else f"x {np.exp(claim.sign * effect):.2g}"


def interval(j: Judged) -> str:
    """Return the mean effect with its 95 % interval, as `shown`; a dash where there is none."""
    if j.effect is None:
        return DASH
    ends = [shown(j.claim, value).removeprefix("x ") for value in (j.effect.lo, j.effect.hi)]
    if j.claim.kind not in ("difference", "value") and j.claim.sign < 0:
        ends.reverse()
    return f"{shown(j.claim, j.effect.mean)} [{ends[0]}, {ends[1]}]"
