"""Checkpoints (or methods) side by side: means over seeds, paired differences, and updates to a target with the damage
done by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.config import build_config, digest
from llm_unlearn.errors import UserError
from llm_unlearn.eval.derived import DERIVED, derive
from llm_unlearn.eval.outcome import AT_TARGET, DISTANCES, KEPT_AT_LEVEL, LEAST_EXCESS, UNTIL, Outcome
from llm_unlearn.eval.primary import Paired, Primary, PrimaryResult, judge
from llm_unlearn.stats import holm, mean_interval, paired_difference

MAIN = ("early", "fit", "fit_scaled", "fit_normed", "grok", "post")
"""Checkpoints of a run that is meant to grok. Every other name is a control: a training of its own."""
ORDER = (*MAIN, "easy", "sam", "spline", "twin")
"""Checkpoints as they are shown; any other name comes after these."""
SHOWN = (
    "forget_acc",
    "forget_Q_A_Prob",
    "forget_inf_acc",
    "forget_trained_inf_acc",
    "retain_acc",
    "retain_inf_acc",
    "test_acc",
    "bystander_acc",
    "holdout_acc",
    "average_gap",
    "model_utility",
)


@dataclass(frozen=True)
class Summary:
    """A number over seeds: mean with a 95 % t interval (None below 2 seeds), and how many seeds have it at all."""

    mean: float | None
    lo: float | None
    hi: float | None
    n: int
    of: int


@dataclass(frozen=True)
class Contrast:
    """Paired difference of two groups (`group` minus `baseline`) over the seeds both have; `p_holm` over all contrasts
    of a measure.
    """

    method: str
    measure: str
    group: str
    baseline: str
    mean: float
    lo: float
    hi: float
    p: float
    p_holm: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `cells[method][group][measure]` is a Summary; `primary` is None where none was declared."""

    by: str
    methods: tuple[str, ...]
    groups: tuple[str, ...]
    measures: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[str, Mapping[str, Summary]]]
    collapsed: Mapping[str, Mapping[str, int]]
    contrasts: tuple[Contrast, ...]
    outcomes: tuple[Outcome, ...]
    primary: PrimaryResult | None = None


def compare(outcomes: Sequence[Outcome], by: str = "checkpoint", baseline: str | None = None) -> Comparison:
    """Group outcomes by checkpoint (methods side by side within each) or by method, and contrast every group with the
    baseline.

    Pairs share method, scenario and the seed the start model was trained with; with at least 3 seeds each contrast has
    a 95 % interval (Student t on the differences) and a p-value, Holm-corrected over the methods and groups of a
    measure. Where a side collapsed in some seed there is no contrast, nor one of updates to target where a side never
    got there in some seed (censored): such runs are counted, not averaged in.
    """
    if by not in ("checkpoint", "method"):
        raise UserError(f"unknown --by '{by}'; choose checkpoint or method")
    _check_same_request(outcomes)
    table = _table(outcomes, by)
    methods, groups = (_ordered({key[i] for key in table}) for i in (0, 1))
    measures = _measures(outcomes)
    cells = {
        m: {g: {name: _summary(table.get((m, g), {}), name) for name in measures} for g in groups} for m in methods
    }
    collapsed = {m: {g: sum(o.collapsed for o in table.get((m, g), {}).values()) for g in groups} for m in methods}
    reference = baseline or ("fit" if "fit" in groups else groups[0])
    if reference not in groups:
        raise UserError(f"baseline '{reference}' is not among {', '.join(groups)}")
    pairs = [(group, reference) for group in groups if group != reference]
    contrasts = [c for name in measures for c in _contrasts(table, methods, pairs, name)]
    return Comparison(
        by,
        methods,
        groups,
        measures,
        tuple(sorted({o.seed for o in outcomes})),
        cells,
        collapsed,
        tuple(contrasts),
        tuple(outcomes),
        primary_of(outcomes),
    )


def contrasts_between(
    outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]], measures: Sequence[str]
) -> tuple[Contrast, ...]:
    """Return the contrasts of given pairs of checkpoints, (group, baseline), as `compare` makes them: Holm-corrected
    over the methods and pairs of a measure.
    """
    _check_same_request(outcomes)
    table = _table(outcomes, "checkpoint")
    methods = _ordered({method for method, _ in table})
    return tuple(c for name in measures for c in _contrasts(table, methods, pairs, name))


def paired_numbers(
    outcomes: Sequence[Outcome], method: str, group: str, baseline: str, name: str
) -> tuple[dict[int, tuple[float, float]], float]:
    """Return seed -> values of a measure at two checkpoints under a method, and the step of the grid they lie on; empty
    where `compare` would make no contrast.
    """
    table = _table([o for o in outcomes if o.method == method and o.checkpoint in (group, baseline)], "checkpoint")
    a, b = table.get((method, group), {}), table.get((method, baseline), {})
    both = {seed: (a[seed].number(name), b[seed].number(name)) for seed in sorted(a.keys() & b.keys())}
    seeds = [seed for seed, values in both.items() if None not in values]
    return dict(zip(seeds, _pairs(a, b, name), strict=False)), _resolution(a, name)


def _table(outcomes: Sequence[Outcome], by: str) -> dict[tuple[str, str], dict[int, Outcome]]:
    """(method, checkpoint), or the other way round, -> seed -> run."""
    table: dict[tuple[str, str], dict[int, Outcome]] = {}
    for o in outcomes:
        row, group = (o.method, o.checkpoint) if by == "checkpoint" else (o.checkpoint, o.method)
        if (known := table.setdefault((row, group), {}).get(o.seed)) is not None:
            raise UserError(
                f"two runs of {row} from {group} with seed {o.seed}: {o.folder} and {known.folder}; compare one at a "
                "time, or name the results.json files"
            )
        table[row, group][o.seed] = o
    return table


def primary_of(outcomes: Sequence[Outcome]) -> PrimaryResult | None:
    """Return what came of the primary contrast that the runs were made for; None if none of the runs it is judged on is
    here. Runs made before it was declared, or for another one, are a problem: then nothing is tested.
    """
    declared = {digest(o.primary): build_config(Primary, o.primary, "primary") for o in outcomes if o.primary}
    read = {key: [o for o in outcomes if _is_read(o, primary)] for key, primary in declared.items()}
    found = [(key, primary) for key, primary in declared.items() if read[key]]
    if not found:
        return None
    key, primary = found[-1]
    other = [o for o in read[key] if o.primary is None or digest(o.primary) != key]
    if other or len(found) > 1:
        n = len(other) or len(read[found[0][0]])
        return PrimaryResult(primary, (), f"{n} of its runs were made before it was declared, or for another one")
    places: dict[tuple[str, str], dict[int, Outcome]] = {}
    for o in read[key]:
        places.setdefault((o.method, o.checkpoint), {})[o.seed] = o

    def paired(method: str, group: str, baseline: str) -> Paired:
        a, b = places.get((method, group), {}), places.get((method, baseline), {})
        pairs = _pairs(a, b, primary.measure)
        why = "" if pairs else _obstacle(a, b, primary.measure)
        resolution = _resolution(a, primary.measure)
        return Paired([x for x, _ in pairs], [y for _, y in pairs], resolution, len(a.keys() | b.keys()), why)

    return judge(primary, paired)


def _is_read(o: Outcome, primary: Primary) -> bool:
    checkpoints = {name for pair in primary.contrasts for name in pair}
    return o.scenario == primary.scenario and o.method in primary.methods and o.checkpoint in checkpoints


def _check_same_request(outcomes: Sequence[Outcome]) -> None:
    """Seeds may have worlds, and so requests, of their own; within a seed another request is another question. A
    control may have data, and so rows to forget, of its own (`other_requests` names them).
    """
    first: dict[tuple[int, str], Outcome] = {}
    for o in outcomes:
        known = first.setdefault((o.seed, _arm(o)), o)
        if o.request != known.request or o.scenario != known.scenario:
            raise UserError(
                f"{known.folder} and {o.folder} (seed {o.seed}) forgot different things; compare one forget request at "
                "a time" + (" (--scenario NAME)" if known.scenario else "")
            )


def _arm(o: Outcome) -> str:
    return o.checkpoint if o.control else ""


def other_requests(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the controls that forgot other rows than the main run in some seed, because their data are others."""
    main = {o.seed: o.request for o in outcomes if not o.control}
    return _ordered({o.checkpoint for o in outcomes if o.control and main.get(o.seed, o.request) != o.request})


def _measures(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    have = [name for name in SHOWN if any(name in o.metrics for o in outcomes)]
    distances = [f"{name}~{versus}" for name in DISTANCES if name in have for versus in ("gold", "start")]
    quality = [
        name
        for name in ("forget_quality", "forget_ks", "forget_effect_size")
        if any(name in o.metrics for o in outcomes)
    ]
    computed = [name for name in DERIVED if any(derive(name, o.metrics).value is not None for o in outcomes)]
    times = [name for name, asked in UNTIL.items() if any(o.time_until(*asked) is not None for o in outcomes)]
    level = [KEPT_AT_LEVEL] if any(o.number(KEPT_AT_LEVEL) is not None for o in outcomes) else []
    return (*have, *distances, *computed, *quality, *level, *AT_TARGET, *times)


def summarise(numbers: Sequence[float | None]) -> Summary:
    """Return the summary of one number per seed, None where a seed has none."""
    values = [v for v in numbers if v is not None]
    if len(values) < 2:
        return Summary(values[0] if values else None, None, None, len(values), len(numbers))
    interval = mean_interval(values)
    return Summary(interval.mean, interval.lo, interval.hi, len(values), len(numbers))


def _summary(runs: Mapping[int, Outcome], name: str) -> Summary:
    return summarise([o.number(name) for o in runs.values()])


def _contrasts(
    table: Mapping[tuple[str, str], Mapping[int, Outcome]],
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    name: str,
) -> list[Contrast]:
    found = []
    for method in methods:
        for group, baseline in pairs:
            both = _pairs(table.get((method, group), {}), table.get((method, baseline), {}), name)
            if len(both) >= 3:
                a, b = np.array(both).T
                step = _resolution(table[method, group], name)
                found.append((method, group, baseline, paired_difference(a, b, resolution=step)))
    corrected = holm([d.p for *_, d in found]) if found else []
    return [
        Contrast(m, name, g, b, d.mean, d.lo, d.hi, d.p, float(p), d.n)
        for (m, g, b, d), p in zip(found, corrected, strict=True)
    ]


def _pairs(a: Mapping[int, Outcome], b: Mapping[int, Outcome], name: str) -> list[tuple[float, float]]:
    """Values of the seeds both sides have; none at all where a side collapsed, or never got to the target, in a seed.

    Leaving out just those seeds would compare the lucky ones: a side that fails would win.
    """
    seeds = sorted(a.keys() & b.keys())
    if any(a[s].collapsed or b[s].collapsed for s in seeds):
        return []
    both = [(a[s].number(name), b[s].number(name)) for s in seeds]
    if name in (*AT_TARGET, *UNTIL) and any(x is None or y is None for x, y in both):
        return []
    return [(x, y) for x, y in both if x is not None and y is not None]


def _obstacle(a: Mapping[int, Outcome], b: Mapping[int, Outcome], name: str) -> str:
    """Why `_pairs` has none."""
    seeds = sorted(a.keys() & b.keys())
    collapsed = [s for s in seeds if a[s].collapsed or b[s].collapsed]
    if collapsed:
        return f"collapsed in seed {', '.join(map(str, collapsed))}"
    missed = [s for s in seeds if a[s].number(name) is None or b[s].number(name) is None]
    if missed:
        what = "never came down to the level" if name in (*AT_TARGET, *UNTIL) else f"no {name}"
        return f"{what} in seed {', '.join(map(str, missed))}"
    return "no seed in common"


def _resolution(runs: Mapping[int, Outcome], name: str) -> float:
    """Step of the grid a measure lies on: 1 / rows for an accuracy, the evaluation interval for updates, else 0.

    Seeds may differ in it (each has its own world): the coarsest counts. Of `name~left` it is the metric's by the least
    excess over gold.
    """
    if name.endswith("~left"):
        spans = [excess for o in runs.values() if (excess := o.excess(name[:-5])) and excess >= LEAST_EXCESS]
        return _resolution(runs, name[:-5]) / min(spans) if spans else 0.0
    base = "retain_acc" if name == KEPT_AT_LEVEL else name.partition("~")[0].partition("@")[0]
    steps: list[float] = []
    if base in ("updates_to_target", "updates_to_gold_acc"):
        paths = [o.trajectory[:2] for o in runs.values()]
        steps = [path[1]["step"] - path[0]["step"] for path in paths if len(path) == 2]
    elif base.endswith("_acc"):
        steps = [1.0 / max(o.metrics[base]["n"], 1) for o in runs.values() if base in o.metrics]
    return max(steps, default=0.0)


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)))
