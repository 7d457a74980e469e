"""From item scores to a suite's numbers, each with its author-clustered interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.base import mean_of_items
from llm_unlearn.eval.metrics.mia import auc, blind_scores
from llm_unlearn.eval.metrics.table import METRICS, Metric, direction_on
from llm_unlearn.eval.sources import Source, check_same_rows
from llm_unlearn.eval.suite import Entry, Suite
from llm_unlearn.log import get_logger
from llm_unlearn.resampling import auc_draws, cluster_bootstrap, combined_bootstrap

log = get_logger(__name__)
N_BOOT = 1000
MIN_CLUSTERS = 5
Line = dict[str, Any]


def compute(suite: Suite, source: Source, reference: Source | None = None) -> dict[str, Line]:
    """Compute a suite's metrics: name -> value, interval, n, unit, direction, metric, split.

    Item scores, the effect size against gold, AUCs, also set against gold's, and model utility get a 95 % bootstrap
    interval over authors; a p-value and a distance have none, the effect size beside them has. What needs gold is null
    without it. Beside an AUC stands
    `blind`, what the words of the answers give away without a model (null without words, or with few authors).
    Raises UserError when gold was asked other rows, or the source lacks what a metric reads.
    """
    lines = {name: _line(name, entry, source, reference) for name, entry in suite.config.metrics.items()}
    blind: dict[tuple[str, str], float | None] = {}
    for name, entry in suite.config.metrics.items():
        if METRICS[entry.metric].kind == "attack":
            splits = (entry.split, entry.against)
            if splits not in blind:
                blind[splits] = _blind(source, splits)
            lines[name]["blind"] = blind[splits]
    return lines


def values(suite: Suite, source: Source, reference: Source | None = None) -> dict[str, float | None]:
    """Return a suite's numbers alone, null for what the source does not hold: another evaluator's log has fewer."""
    out: dict[str, float | None] = {}
    for name, entry in suite.config.metrics.items():
        try:
            out[name] = _line(name, entry, source, reference, n_boot=0)["value"]
        except UserError:
            out[name] = None
    return out


def logged_attack(name: str, of: str, log: Source) -> Line:
    """Return the line of an attack on TOFU's forget and holdout splits whose item scores `of` somebody else logged."""
    entry = Entry(metric=name, split="forget", against="holdout")
    splits = (entry.split, entry.against)
    scores, authors = ([f(split) for split in splits] for f in (lambda s: log.items(of, s), log.authors))
    return _head(entry) | _auc(METRICS[name], scores, authors, N_BOOT)


def _head(entry: Entry) -> Line:
    metric = METRICS[entry.metric]
    return {
        "metric": entry.metric,
        "split": entry.split,
        "unit": metric.unit,
        "direction": direction_on(entry.metric, entry.split),
        "ci": None,
    }


def _line(name: str, entry: Entry, source: Source, reference: Source | None, n_boot: int = N_BOOT) -> Line:
    metric, line = METRICS[entry.metric], _head(entry)
    if "reference" in metric.needs:
        if reference is None:
            return line | {"value": None, "n": 0}
        for split in _splits(metric, entry):
            check_same_rows(source, reference, split)
    try:
        line |= BY_KIND[metric.kind](metric, entry, source, reference, n_boot)
    except ValueError as error:
        raise UserError(f"{name}: {error}; choose another suite, or data that has it") from None
    line["value"] = None if line["value"] is None or math.isnan(line["value"]) else float(line["value"])
    return line


def _item(metric: Metric, entry: Entry, source: Source, _: Source | None, n_boot: int) -> Line:
    items = source.items(metric.name, entry.split)
    known = ~np.isnan(items)
    authors = source.authors(entry.split)[known]
    out: Line = {"value": mean_of_items(items), "n": int(known.sum())}
    if n_boot and len(set(authors)) > 1:
        interval = cluster_bootstrap(items[known], authors, n_boot=n_boot)
        out["ci"] = [interval.lo, interval.hi]
    return out


def _pair(metric: Metric, entry: Entry, source: Source, reference: Source | None, n_boot: int) -> Line:
    try:
        return _item(metric, entry, source, reference, n_boot)
    except UserError:  # gold's log holds no weights
        return {"value": None, "n": 0}


def _versus(metric: Metric, entry: Entry, source: Source, reference: Source | None, n_boot: int) -> Line:
    assert reference is not None
    mine, theirs = (s.items(metric.of[0], entry.split) for s in (source, reference))
    out: Line = {"value": metric.fn(mine, theirs), "n": len(mine)}
    authors = source.authors(entry.split)
    # resampling biases a largest or mean gap upwards: such an interval misses the truth half of the time
    if n_boot and metric.direction == "gold" and len(set(authors)) > 1:
        rows = np.arange(len(mine), dtype=np.float64)
        interval = cluster_bootstrap(
            rows, authors, lambda drawn: metric.fn(mine[drawn.astype(int)], theirs[drawn.astype(int)]), n_boot=n_boot
        )
        out["ci"] = [interval.lo, interval.hi] if math.isfinite(interval.lo + interval.hi) else None
    return out


def _unknown(metric: Metric, error: UserError) -> Line:
    """Logs hold what their evaluator was asked for; a log without an attack is still a log."""
    log.warning("%s: null, the reference lacks it (%s)", metric.name, error)
    return {"value": None, "n": 0}


def _attack(metric: Metric, entry: Entry, source: Source, reference: Source | None, n_boot: int) -> Line:
    splits = (entry.split, entry.against)
    scores = [source.items(metric.of[0], split) for split in splits]
    if metric.with_gold is not None:
        assert reference is not None
        try:
            theirs = [reference.items(metric.of[0], split) for split in splits]
        except UserError as error:
            return _unknown(metric, error)
        for split, a, b in zip(splits, scores, theirs, strict=True):
            if len(a) != len(b):
                raise ValueError(f"{reference.label} has {len(b)} rows on '{split}', {source.label} {len(a)}")
        scores = metric.with_gold(*zip(scores, theirs, strict=True))
    return _auc(metric, scores, [source.authors(split) for split in splits], n_boot)


def _auc(metric: Metric, scores: Sequence[np.ndarray], authors: Sequence[np.ndarray], n_boot: int) -> Line:
    out: Line = {"value": metric.fn(*scores), "n": sum(map(len, scores))}
    if n_boot and (drawn := auc_draws(*scores, *authors, n_boot=n_boot)) is not None:
        out["ci"] = _percentiles(drawn)
    return out


def _percentiles(drawn: Sequence[float] | np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(drawn, [0.025, 0.975])]


def _relative(metric: Metric, entry: Entry, source: Source, reference: Source | None, n_boot: int) -> Line:
    assert reference is not None
    attack, splits = METRICS[metric.of[0]], (entry.split, entry.against)
    mine = [source.items(attack.of[0], split) for split in splits]
    try:
        theirs = [reference.items(attack.of[0], split) for split in splits]
    except UserError as error:
        return _unknown(metric, error)
    out: Line = {"value": metric.fn(attack.fn(*mine), attack.fn(*theirs)), "n": sum(map(len, mine))}
    if n_boot and _asked_alike(source, reference, splits):
        authors = [source.authors(split) for split in splits]
        drawn, of_gold = (auc_draws(*scores, *authors, n_boot=n_boot) for scores in (mine, theirs))
        # where gold's AUC is 0 or 1 in a draw the share of it has no bounds, and an interval would say nothing
        if drawn is not None and of_gold is not None and ((of_gold > 0) & (of_gold < 1)).all():
            out["ci"] = _percentiles([metric.fn(a, b) for a, b in zip(drawn, of_gold, strict=True)])
    return out


def _asked_alike(source: Source, reference: Source, splits: Sequence[str]) -> bool:
    try:
        for split in splits:
            check_same_rows(source, reference, split)
    except UserError:
        return False
    return True


def _combine(metric: Metric, _entry: Entry, source: Source, reference: Source | None, n_boot: int) -> Line:
    parts = {part: _part(part, source, reference) for part in metric.of}
    out: Line = {"value": metric.fn(parts), "n": len(parts)}
    # gaps to gold have none: resampling biases them upwards, see `_versus`
    if n_boot and all(METRICS[part.partition("/")[2]].kind == "item" for part in metric.of):
        by_split: dict[str, list[str]] = {}
        for part in metric.of:
            by_split.setdefault(part.partition("/")[0], []).append(part)
        names = [part for of in by_split.values() for part in of]
        strata = [
            (np.stack([source.items(part.partition("/")[2], split) for part in of], axis=1), source.authors(split))
            for split, of in by_split.items()
        ]
        interval = combined_bootstrap(strata, lambda means: metric.fn(dict(zip(names, means, strict=True))), n_boot)
        out["ci"] = None if interval is None else [interval.lo, interval.hi]
    return out


def _part(part: str, source: Source, reference: Source | None) -> float:
    split, _, name = part.partition("/")
    metric = METRICS[name]
    if metric.kind != "versus":
        return mean_of_items(source.items(name, split))
    assert reference is not None
    return metric.fn(*(side.items(metric.of[0], split) for side in (source, reference)))


def _splits(metric: Metric, entry: Entry) -> list[str]:
    """Splits on which a metric is read against gold."""
    return [part.split("/")[0] for part in metric.of] if metric.kind == "combine" else [entry.split]


def _corpus(metric: Metric, entry: Entry, source: Source, _: Source | None, _n_boot: int) -> Line:
    return {"value": source.whole(metric.name, entry.split), "n": len(source.answers(entry.split))}


def _blind(source: Source, splits: tuple[str, str]) -> float | None:
    try:
        texts, clusters = [source.answers(s) for s in splits], [source.authors(s) for s in splits]
    except UserError:
        return None
    if min(len(set(labels)) for labels in clusters) < MIN_CLUSTERS:  # with few, guessing comes out below one half
        return None
    return auc(*blind_scores(texts[0], texts[1], (clusters[0], clusters[1])))


BY_KIND = {
    "item": _item, "pair": _pair, "versus": _versus, "attack": _attack, "relative": _relative, "corpus": _corpus,
    "combine": _combine,
}  # fmt: skip
