"""Local grokking beside its published numbers: the two groups of questions, and what unlearning left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.config import build_config
from llm_unlearn.data.local_draws import LOCAL, Questions, pairs, questions
from llm_unlearn.data.loss_record import LossRecord, read_record
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.splits import Scenario, stored_questions
from llm_unlearn.grok.facts import times_of_record
from llm_unlearn.report.claims import Claim, Judged, judge
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.text import DASH, counted
from llm_unlearn.stats import Interval, holm, paired_difference

METHODS = {"ga": "GA", "graddiff": "GD", "kl": "KL", "idk": "PO", "npo": "NPO", "rmu": "RMU"}
"""Methods of the published table 2, by our name."""
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "forget": {
        "ga": (0.344, 0.518),
        "graddiff": (0.348, 0.523),
        "kl": (0.353, 0.519),
        "idk": (0.511, 0.577),
        "npo": (0.360, 0.554),
        "rmu": (0.560, 0.586),
    },
    "retain": {"ga": (0.605, 0.556), "npo": (0.619, 0.591)},
}
"""Extraction strength of forgotten and kept answers in "Grokked Models are Better Unlearners" (arXiv:2512.03437, table
2; Phi-1.5 on TOFU, 50 examples): learnt early, learnt late.
"""
MIN_DRAWS = 3
WAYS = {"as_published": False, "matched": True}


def groups(
    folder: Path,
    corpus: Corpus,
    match: Sequence[str],
    early: float | None = None,
    falls: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what the two groups of a run's record are: `early_epoch`, `late_epoch` (the last one recorded), questions
    of each, by every recorded epoch too, pairs that match, how far the groups are apart in what makes questions easy,
    in standard deviations, before and after matching, the share of answer tokens each gets right at the late epoch (the
    rule takes what is never learnt for learnt early), and how many of their facts generalised when.

    Args:
        folder: of the run that recorded item losses.
        match: what pairs are alike in, see `Scenario.match`.
        early: the early epoch; None takes the recorded one at which the smaller of both groups is largest.
        falls: `grokked_below` and `ungrokked_above` of the scenario, where they are not those published.

    Raises UserError as `draw_local`.
    """
    record, facts = read_record(folder), stored_questions(corpus)
    late = float(record.epochs[-1])

    def seen(epoch: float) -> Questions:
        values = {
            "kind": "local_grok",
            "record": str(folder),
            "early_epoch": epoch,
            "late_epoch": late,
            **(falls or {}),
        }
        scenario = build_config(Scenario, values)
        return questions(corpus, scenario, facts)

    sizes = {e: [len(seen(e).group(kind)) for kind in LOCAL] for e in record.epochs[:-1].tolist()}
    chosen = seen(early or max(sizes, key=lambda e: min(sizes[e])))
    both, sides = [chosen.group(kind) for kind in LOCAL], pairs(chosen, tuple(match))
    return {
        "early_epoch": early or max(sizes, key=lambda e: min(sizes[e])),
        "late_epoch": late,
        "by_early_epoch": {f"{e:g}": n for e, n in sizes.items()},
        "questions": {kind: len(group) for kind, group in zip(LOCAL, both, strict=True)},
        "matched_pairs": len(sides[0]),
        "standardised_difference": {
            name: {
                "as_published": _apart(chosen.traits[name], both, both),
                "matched": _apart(chosen.traits[name], both, sides),
            }
            for name in chosen.traits
        },
        "right_at_late_epoch": {
            kind: float(record.right[-1][[facts.index(chosen.facts[q]) for q in group]].mean()) if len(group) else None
            for kind, group in zip(LOCAL, both, strict=True)
        },
        "facts_by_class": {
            kind: _classes(record, facts, [chosen.facts[q] for q in group])
            for kind, group in zip(LOCAL, both, strict=True)
        },
    }


def _apart(values: np.ndarray, both: Sequence[np.ndarray], sides: Sequence[np.ndarray]) -> float | None:
    if min(map(len, (*both, *sides))) < 2:
        return None
    spread = np.sqrt((values[both[0]].var(ddof=1) + values[both[1]].var(ddof=1)) / 2)
    return float((values[sides[0]].mean() - values[sides[1]].mean()) / spread) if spread > 0 else None


def _classes(record: LossRecord, facts: Sequence[str], group: Sequence[str]) -> dict[str, int]:
    """Count the classes of `grok.facts` among the facts of a group that have a paraphrased question."""
    classes, wanted = times_of_record(record).classes, set(group)
    its = [str(c) for row, c in zip(record.para_rows, classes, strict=True) if facts[row] in wanted]
    return {name: its.count(name) for name in sorted(set(its))}


def nearest_half(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, by method, the learning rate `lr` at which the mean `forget` of its rows is nearest to a half, and those
    means; rates at which a run has an `error` do not count, nor do methods without others.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["lr"], []).append(row.get("forget", np.nan))
    means = {m: {lr: float(np.mean(v)) for lr, v in its.items() if np.isfinite(v).all()} for m, its in found.items()}
    return {m: {"lr": min(v, key=lambda lr: abs(v[lr] - 0.5)), "forget": v} for m, v in means.items() if v}


def compare(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Return a line per measure and method: published and ours, learnt early less learnt late, over draws.

    A measure is `forget` or `retain`, extraction strength; `above_unseen`, that of the forgotten less that of the model
    that never saw them. Draws of one seed are paired; Holm's correction is over the methods of a measure and way.

    Args:
        rows: with `kind`, `matched`, `size`, `seed`, `method`, `forget`, `retain`, and `unseen` (a number or None);
            those with an `error` do not count.
        methods: which of them.
        size: of the forget set.
    """
    lines = []
    for measure in ("forget", "above_unseen", "retain"):
        part = [_line(rows, measure, method, size) for method in methods]
        for way in WAYS:
            told = [line[way]["difference"] for line in part if "difference" in line[way]]
            for difference, p in zip(told, holm([d["p"] for d in told]) if told else (), strict=True):
                difference["p_holm"] = float(p)
        lines += part
    return lines


def _line(rows: Sequence[Mapping[str, Any]], measure: str, method: str, size: int) -> dict[str, Any]:
    line: dict[str, Any] = {"measure": measure, "method": method, "size": size}
    line["published"] = PUBLISHED.get(measure, {}).get(method) if size == 50 else None
    for way, matched in WAYS.items():
        by = {
            (row["kind"], row["seed"]): row["forget"] - row["unseen"] if measure == "above_unseen" else row[measure]
            for row in rows
            if "error" not in row
            and (row["method"], row["matched"], row["size"]) == (method, matched, size)
            and (measure != "above_unseen" or row["unseen"] is not None)
        }
        seeds = sorted(seed for kind, seed in by if kind == LOCAL[0] and (LOCAL[1], seed) in by)
        values = [[by[kind, seed] for seed in seeds] for kind in LOCAL]
        line[way] = {"seeds": seeds, "values": values}
        if len(seeds) > 2:
            found = paired_difference(values[0], values[1])
            line[way]["difference"] = {key: getattr(found, key) for key in ("mean", "lo", "hi", "n", "p")}
    return line


def lines_grid(lines: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the lines as a table `published | ours | difference with interval`."""
    rows = []
    for line in lines:
        p = line["published"]
        known = [f"{p[0]:.3f} / {p[1]:.3f}", f"{p[0] - p[1]:+.3f}"] if p else [DASH, DASH]
        ours = [text for way in WAYS for text in _told(line[way])]
        name = METHODS.get(line["method"]) or line["method"]
        rows.append(Row((f"{line['measure']}, {line['size']} examples", name, *known, *ours)))
    head = ("extraction strength", "method", "published: early / late", "difference", "ours", "difference [95 %]",
            "matched pairs", "difference [95 %]")  # fmt: skip
    notes = ("The unit is the draw of questions; one start model, so nothing is said of other models.",)
    return Grid("Learnt early and learnt late", head, tuple(rows), notes)


def local_claims(lines: Sequence[Mapping[str, Any]], way: str, size: int = 50) -> list[Judged]:
    """Return the published claims about local grokking judged on draws made in one way (`WAYS`), a draw's effect first
    averaged over the methods.
    """
    mean = {m: float(np.mean([early - late for early, late in PUBLISHED[m].values()])) for m in PUBLISHED}
    claims = (
        Claim("ES of the forgotten is lower", "forget", "value", -1, -mean["forget"], "efficient forgetting"),
        Claim("ES of the kept is higher", "retain", "value", 1, mean["retain"], "less collateral damage"),
    )
    return [_judged(claim, [x for x in lines if x["measure"] == claim.measure and x["size"] == size], way)
            for claim in claims]  # fmt: skip


def _judged(claim: Claim, lines: Sequence[Mapping[str, Any]], way: str) -> Judged:
    parts = {x["method"]: x[way] for x in lines if len(x[way]["seeds"]) >= MIN_DRAWS}
    draws = sorted(set.intersection(*(set(part["seeds"]) for part in parts.values()))) if parts else []
    if len(draws) < MIN_DRAWS:
        why = f"{counted(len(draws), 'draw')}, {MIN_DRAWS} are needed"
        return Judged(claim, *LOCAL, None, (), (), "cannot tell", why)
    sides = [
        np.mean([[part["values"][i][part["seeds"].index(d)] for d in draws] for part in parts.values()], 0)
        for i in (0, 1)
    ]
    found = paired_difference(*sides)
    lo, hi = sorted((claim.sign * found.lo, claim.sign * found.hi))
    effect = Interval(claim.sign * found.mean, lo, hi, found.n)
    return Judged(claim, *LOCAL, effect, tuple(parts), (), *judge(claim, effect))


def _told(way: Mapping[str, Any]) -> list[str]:
    means = [f"{np.mean(values):.3f}" for values in way["values"] if values]
    d = way.get("difference")
    return [" / ".join(means) or DASH, f"{d['mean']:+.3f} [{d['lo']:+.3f}, {d['hi']:+.3f}]" if d else DASH]
