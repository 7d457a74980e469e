"""What a study was made to decide, and what its checkpoints were to begin with, as grids of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.special import stdtrit

from llm_unlearn.eval.compare import Comparison, other_requests, summarise
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.primary import MIN_SEEDS, PrimaryContrast, PrimaryResult
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.text import DASH, count, listed, mean, number, p_value
from llm_unlearn.stats import paired_difference

Read = Callable[[Outcome], float | None]
VERDICTS = {
    "differs": "differs",
    "equivalent": "no difference of interest",
    "cannot tell": "cannot tell",
}


def primary(comparison: Comparison) -> list[Grid]:
    """Return the grid of the contrast that was declared beforehand; none if there is none."""
    if (result := comparison.primary) is None:
        return []
    heads = (
        "method",
        "contrast",
        "seeds",
        "difference",
        "simultaneous",
        "p (differs)",
        "p (equivalent)",
        "detectable",
        "verdict",
    )
    rows = tuple(Row(_primary_row(result, x)) for x in result.contrasts)
    return [Grid(f"Primary contrast: {result.declared.measure}", heads, rows, _primary_notes(result))]


def _primary_row(result: PrimaryResult, x: PrimaryContrast) -> tuple[str, ...]:
    seeds = f"{x.n}" if x.n == x.of else f"{x.n} of {x.of}"
    head = (x.method, f"{x.group} minus {x.baseline}", seeds)
    if x.mean is None or x.p_holm is None or x.p_equivalence is None:
        return (*head, DASH, DASH, DASH, DASH, DASH, f"not testable: {x.why}")
    digits = digits_for(result.declared.bound)
    told = f"{x.mean:+.{digits}f} [{x.lo:+.{digits}f}, {x.hi:+.{digits}f}]"
    wide = "[{:+.{d}f}, {:+.{d}f}]".format(*simultaneous(result, x), d=digits)
    return (
        *head,
        told,
        wide,
        p_value(x.p_holm),
        p_value(x.p_equivalence),
        number(x.detectable, digits),
        judged(result, x),
    )


def simultaneous(result: PrimaryResult, x: PrimaryContrast) -> tuple[float, float]:
    """Return the interval of a tested contrast that holds at once for all declared: Bonferroni's, of 1 - alpha / m,
    which Holm's tests never contradict the wrong way (what it leaves out, they reject).
    """
    if x.mean is None or x.hi is None:
        raise ValueError("simultaneous: the contrast was not tested")
    alpha = result.declared.alpha
    wide, own = (stdtrit(x.n - 1, 1 - a / 2) for a in (alpha / len(result.contrasts), alpha))
    half = float((x.hi - x.mean) * wide / own)
    return x.mean - half, x.mean + half


def judged(result: PrimaryResult, x: PrimaryContrast) -> str:
    """Return the verdict on a contrast in words."""
    if x.verdict == "not testable":
        return f"not testable: {x.why}"
    small = x.p_equivalence is not None and x.p_equivalence <= result.declared.alpha
    return VERDICTS[x.verdict] + (", by less than the bound" if x.verdict == "differs" and small else "")


def _primary_notes(result: PrimaryResult) -> tuple[str, ...]:
    d = result.declared
    if result.problem:
        return (f"Declared: {_declaration(result)}. Not judged: {result.problem}.",)
    return (
        f"Declared before the runs: {_declaration(result)}. p (differs): paired t-test of no difference; p "
        f"(equivalent): two one-sided tests of a difference of at least {d.bound:g}; each Holm-corrected over all "
        f"contrasts declared. The interval beside the difference is of {1 - d.alpha:.0%}, not corrected; simultaneous: "
        "Bonferroni's over all declared.",
        f"detectable: the smallest true difference found with 80 % power at {d.alpha:g} / contrasts, given the seeds "
        "and the spread observed. Everything else is exploratory.",
    )


def _declaration(result: PrimaryResult) -> str:
    d = result.declared
    where = f", forgetting {d.scenario}" if d.scenario else ""
    pairs = listed([f"{a} against {b}" for a, b in d.contrasts])
    return f"{d.measure}{where}, {pairs}, with {listed(d.methods)}; bound {d.bound:g}, alpha {d.alpha:g}"


def digits_for(bound: float) -> int:
    """Return decimals enough to set a number beside a bound: one more than its first digit needs, at least 2."""
    return max(2, 1 - math.floor(math.log10(bound)))


def starts(comparison: Comparison, checkpoints: Sequence[str]) -> list[Grid]:
    """Return the grid of the models that unlearning began from, a row per checkpoint; none if the runs do not tell."""
    told = {k: _models(comparison, k) for k in checkpoints}
    every = [o for models in told.values() for o in models.values()]
    # models that their training did not evaluate at the step they were taken at
    unseen = any(_held_out(o) is None and None not in (_step(o), _inferred(o)) for o in every)
    if not unseen and not any(_held_out(o) is not None for o in every):
        return []
    reads = (_step, _train, _held_out, *((_kept, _inferred) if unseen else ()))
    beside_by = (_inferred, "kept two-hop") if unseen else (_held_out, "held-out acc")
    matched = {k: next((o.match for o in models.values() if o.match), None) for k, models in told.items()}
    rows = []
    for k, models in told.items():
        values = [_mean_of(models, read) for read in reads]
        match = matched[k]
        beside = [_beside(models, told, match, beside_by[0])] if any(matched.values()) else []
        rows.append(Row((k, str(len(models)), *values, *beside)))
    heads: tuple[str, ...] = ("checkpoint", "seeds", "step", "train acc", "held-out acc")
    notes = ["Accuracies of the start models as their training saw them, means over seeds."]
    if unseen:
        heads = (*heads, "kept facts", "kept two-hop")
        notes.append(
            f"{DASH}: its training did not look at that step. Kept facts, kept two-hop: what unlearning's evaluation "
            "found, of facts asked directly and of two-hop questions that were never trained."
        )
    if any(matched.values()):
        heads = (*heads, f"{beside_by[1]} less that of its match")
        notes.append("A control is at matched accuracy where that interval is narrow and holds 0.")
    if other := other_requests(comparison.outcomes):
        notes.append(
            f"{listed(other)}: trained on data of {'their' if len(other) > 1 else 'its'} own, so other rows were to be "
            "forgotten than from the main run's checkpoints."
        )
    return [Grid("Start models", heads, tuple(rows), tuple(notes))]


def _models(comparison: Comparison, checkpoint: str) -> dict[int, Outcome]:
    """Seed -> one of the runs from its model."""
    return {o.seed: o for o in reversed(comparison.outcomes) if o.checkpoint == checkpoint}


def _mean_of(models: dict[int, Outcome], read: Read) -> str:
    summary = summarise([read(o) for _, o in sorted(models.items())])
    return count(None if summary.mean is None else round(summary.mean)) if read is _step else mean(summary, 3)


def _beside(models: dict[int, Outcome], told: dict[str, dict[int, Outcome]], match: str | None, read: Read) -> str:
    """The paired difference in an accuracy to the checkpoint a control is meant to match."""
    if match is None:
        return ""
    other = told.get(match, {})
    pairs = [(a, b) for s in sorted(models.keys() & other.keys())
             if (a := read(models[s])) is not None and (b := read(other[s])) is not None]  # fmt: skip
    if not pairs:
        return f"{DASH} ({match})"
    if len(pairs) < MIN_SEEDS:
        return f"{sum(a - b for a, b in pairs) / len(pairs):+.3f} ({match})"
    d = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    return f"{d.mean:+.3f} [{d.lo:+.3f}, {d.hi:+.3f}] ({match})"


def _step(o: Outcome) -> float | None:
    return None if o.start_step is None else float(o.start_step)


def _train(o: Outcome) -> float | None:
    return o.start_train_acc


def _held_out(o: Outcome) -> float | None:
    return o.start_held_out_acc


def _kept(o: Outcome) -> float | None:
    return o.metrics.get("retain_acc", {}).get("start")


def _inferred(o: Outcome) -> float | None:
    return o.metrics.get("retain_inf_acc", {}).get("start")
