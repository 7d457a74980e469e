"""Probes of the start models over seeds, each beside its null and its published values, and the published claims about
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_unlearn.eval.compare import summarise
from llm_unlearn.eval.predictors import Cell, predict
from llm_unlearn.report import published
from llm_unlearn.report.claims import BASELINES, Claim, Judged, judge
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS
from llm_unlearn.report.paper_table import in_order
from llm_unlearn.report.predictors import predictor_grid
from llm_unlearn.report.results import ProbeRow
from llm_unlearn.report.text import DASH
from llm_unlearn.stats import Interval, paired_difference

ALIGNMENT = "alignment, ce: cos(all forget, all retain)"
COMPLEXITY = "local_complexity, retain: absolute r = 0.005"
CKA = "cka_paper, layer {last}: forget, retain"
LESS_ALIGNED = "gradients of forget and retain are less aligned"
LESS_COMPLEX = "local complexity is lower"
LESS_ALIKE = "features of forget and retain are less alike (CKA)"
PREDICTORS = (
    ALIGNMENT, "alignment, ce: excess over cos(retain, retain)", "alignment, margin: excess over cos(retain, retain)",
    COMPLEXITY, "local_complexity, forget: absolute r = 0.005", CKA, "cka, layer {last}: forget~retain",
    "hessian, retain: top eigenvalue", "hessian, retain: trace", "norms, all: norm", "logits, retain: std",
    "logits, retain: margin",
)  # fmt: skip
"""What is asked for a prediction, chosen before there were results: one or two lines a probe, as every line more costs
all others power.
"""
DOSES = tuple(f"alignment, {variant}: cos(forget, retain)" for variant in ("margin", "temperature", "ce"))
"""What an intervention on gradients is to change."""
HEAVY = 100.0
"""Largest over smallest value from which a probe enters predictions by its logarithm."""


def probe_grids(rows: Sequence[ProbeRow], arch: str, late: str) -> list[Grid]:
    """Return the probes over seeds: a column a checkpoint, means with intervals, the mean null below, the published
    values beside; then the paired difference late minus fit.
    """
    if not rows:
        return []
    kinds = in_order({row.checkpoint for row in rows})
    names = list(dict.fromkeys(name for row in rows for name in row.lines))
    family, last = _family(arch), _last_layer(rows)
    beside = {key.format(last=last): text for key, text in published.PROBES.get(family, {}).items()}
    body = []
    for name in names:
        d = _difference(rows, name, late, "fit")
        told = DASH if d is None else f"{d.mean:+.3g} [{d.lo:+.3g}, {d.hi:+.3g}], n = {d.n}"
        body.append(Row((name, *(_shown(rows, name, kind) for kind in kinds), told, beside.get(name, ""))))
    notes = (
        "Means over seeds [95 % interval]; null: range (2.5 to 97.5 %) where there is nothing to be found, mean over "
        "seeds. Published: before the jump -> after it, of its own data and nets.",
        published.PROBES_NOTE,
    )
    columns = ("probe", *kinds, f"{late} minus fit", "published")
    return [Grid(f"Probes of the start models: {arch or 'language'}", columns, tuple(body), notes)]


def probe_claims(
    rows: Sequence[ProbeRow], arch: str, group: str = "grok", baselines: Sequence[str] = BASELINES
) -> list[Judged]:
    """Return the published claims about probes judged, as `claims.claims` judges those about runs: paired by seed."""
    kinds, last = {row.checkpoint for row in rows}, _last_layer(rows)
    names = (ALIGNMENT, COMPLEXITY, CKA.format(last=last))
    have = {name for row in rows for name in row.lines}
    return [
        _judged(claim, rows, name, group, baseline)
        for baseline in baselines
        if {group, baseline} <= kinds
        for name, claim in zip(names, _claims(arch, last), strict=True)
        if name in have
    ]


def moved_grid(rows: Sequence[ProbeRow], pairs: Sequence[tuple[str, str]]) -> Grid | None:
    """Return what was changed from one checkpoint of a pair to the other in what an intervention on gradients is to
    change and in the lines that predictions are made from: means, and differences paired by seed; None where none of
    the pairs was probed.
    """
    kinds = {row.checkpoint for row in rows}
    there = [pair for pair in pairs if set(pair) <= kinds]
    body = []
    for name in (name.format(last=_last_layer(rows)) for name in (*DOSES, *PREDICTORS)):
        found = [_difference(rows, name, *pair) for pair in there]
        if any(found):
            means = (" / ".join(_shown(rows, name, kind).partition(";")[0] for kind in pair) for pair in there)
            moved = (DASH if d is None else f"{d.mean:+.3g} [{d.lo:+.3g}, {d.hi:+.3g}], n = {d.n}" for d in found)
            body.append(Row((name, *(cell for both in zip(means, moved, strict=True) for cell in both))))
    if not body:
        return None
    heads = [head for a, b in there for head in (f"{a} / {b}", f"{a} minus {b}")]
    notes = ("Means over seeds [95 % interval]; differences paired by seed.",)
    return Grid("What was changed in the models", ("probe", *heads), tuple(body), notes)


def predictors(rows: Sequence[ProbeRow], outcomes: dict[Cell, float], measure: str) -> tuple[list[Grid], str]:
    """Return which probe predicts `measure` across the cells of probed models; and which could not be judged, "" if
    none. No grid where none could.
    """
    judged, left_out = {}, []
    for name in (name.format(last=_last_layer(rows)) for name in PREDICTORS):
        values = _values(rows, name)
        try:
            predict({name: values}, outcomes)
        except ValueError:
            left_out.append(name)
        else:
            judged[name] = values
    said = f"Not judged, not taken or for too few seeds or no spread: {'; '.join(left_out)}." if left_out else ""
    return ([predictor_grid(measure, predict(judged, outcomes))] if judged else []), said


def _values(rows: Sequence[ProbeRow], name: str) -> dict[tuple[int, str], float]:
    """(seed, checkpoint) -> value; by its logarithm where values above 0 span more than `HEAVY`."""
    found = {(r.seed, r.checkpoint): v for r in rows if name in r.lines and (v := r.lines[name][0]) is not None}
    heavy = bool(found) and min(found.values()) > 0 and max(found.values()) > HEAVY * min(found.values())
    return {key: math.log(v) if heavy else v for key, v in found.items()}


def _claims(arch: str, last: int) -> tuple[Claim, Claim, Claim]:
    """The claims about alignment, complexity and CKA, with what was published for such nets."""
    pairs = [published.probe_pair(_family(arch), n, last) for n in (ALIGNMENT, COMPLEXITY, CKA.format(last=last))]
    falls = [None if p is None else p[0] - p[1] for p in pairs]
    complexity = None if pairs[1] is None else math.log(pairs[1][0] / pairs[1][1])
    return (
        Claim(
            "gradients of forget and retain are less aligned", ALIGNMENT, "value", -1, falls[0], "gradient alignment"
        ),
        Claim("local complexity is lower", COMPLEXITY, "ratio", -1, complexity, "complexity"),
        Claim("features of forget and retain are less alike (CKA)", CKA, "value", -1, falls[2], "CKA"),
    )


def _judged(claim: Claim, rows: Sequence[ProbeRow], name: str, group: str, baseline: str) -> Judged:
    logs = claim.kind == "ratio"
    found = _difference(rows, name, group, baseline, logs=logs)
    if found is None:
        why = f"fewer than {MIN_SEEDS} seeds have it on both sides"
        return Judged(claim, group, baseline, None, (), (), "cannot tell", why)
    lo, hi = sorted((claim.sign * found.lo, claim.sign * found.hi))
    effect = Interval(claim.sign * found.mean, lo, hi, found.n)
    return Judged(claim, group, baseline, effect, (), (), *judge(claim, effect))


def _difference(
    rows: Sequence[ProbeRow], name: str, group: str, baseline: str, *, logs: bool = False
) -> Interval | None:
    """Paired difference of a probe over the seeds that have it at both checkpoints; None below `MIN_SEEDS`."""
    at = {(r.seed, r.checkpoint): r.lines[name][0] for r in rows if name in r.lines}
    both = [(a, b) for (seed, kind), a in sorted(at.items())
            if kind == group and a is not None and (b := at.get((seed, baseline))) is not None]  # fmt: skip
    if len(both) < MIN_SEEDS or (logs and min(map(min, both)) <= 0):
        return None
    a, b = zip(*both, strict=True)
    if logs:
        a, b = ([math.log(v) for v in side] for side in (a, b))
    return paired_difference(a, b)


def _shown(rows: Sequence[ProbeRow], name: str, kind: str) -> str:
    found = [
        row.lines[name] for row in sorted(rows, key=lambda r: r.seed) if row.checkpoint == kind and name in row.lines
    ]
    s = summarise([values[0] for values in found])
    if s.mean is None:
        return DASH
    text = f"{s.mean:.3g}" + (f" [{s.lo:.3g}, {s.hi:.3g}]" if s.lo is not None else "")
    nulls = [(lo, hi) for _, lo, hi in (v for v in found if len(v) == 3) if lo is not None and hi is not None]
    ends = [sum(null[i] for null in nulls) / len(nulls) for i in (0, 1)] if nulls else []
    return text + (f"; null {ends[0]:.3g} to {ends[1]:.3g}" if ends else "")


def _family(arch: str) -> str:
    return arch.rstrip("0123456789")


def _last_layer(rows: Sequence[ProbeRow]) -> int:
    names = {name for row in rows for name in row.lines if name.startswith("cka_paper")}
    return max((int(name.split("layer ")[1].split(":")[0]) for name in names), default=0)
