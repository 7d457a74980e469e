"""What a pretrained start and cheaper ways to what grokking brings cost, and what they bring."""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.grok.phases import GROKKED
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.grids import MIN_SEEDS
from llm_unlearn.report.probe_table import ALIGNMENT, COMPLEXITY
from llm_unlearn.report.results import Brought, Pretrained, Ratio
from llm_unlearn.report.section import Section
from llm_unlearn.report.text import DASH, count
from llm_unlearn.stats import paired_difference

Model = tuple[str, str]
FROM = ("scratch", "grok")
NONE = (None, 0.0)
BRINGS = {
    "retain_inf_acc": "held-out two-hop, kept",
    "forget_inf_acc": "two-hop about the forgotten, before",
    "gold, forget_inf_acc": "the same, gold",
    ALIGNMENT: "gradient cosine, forget and retain",
    COMPLEXITY: "local complexity",
    "graddiff, kept_at_level": "GradDiff: kept",
    "graddiff, came to the level": "GradDiff: share of runs that came to the level",
    "graddiff, updates": "GradDiff: updates",
    "graddiff, forget_inf_acc": "GradDiff: still inferred",
    "npo, kept_at_level": "NPO: kept",
    "npo, came to the level": "NPO: share of runs that came to the level",
    "npo, updates": "NPO: updates",
    "npo, forget_inf_acc": "NPO: still inferred",
}
ALIKE = ("gold, forget_inf_acc", "graddiff, came to the level", "npo, came to the level")
"""What is not set beside the model grokked from scratch: of gold, or counted."""


def pretrained(found: Pretrained) -> Section:
    """Return the section about arms that start from a pretrained model, or are helped to generalise."""
    text = (f"`{found.command}`. {found.environment.machine}.",)
    grids = (_cost_grid(found), _phase_grid(found), *_brings_grids(found))
    return Section("Grokking from a pretrained start", text, grids=tuple(grid for grid in grids if grid.rows))


def _cost_grid(found: Pretrained) -> Grid:
    rows = []
    for x in found.lines:
        ratios = map(_ratio, (x.updates_ratio, x.flops_ratio, x.flops_ratio_with_before, x.cpu_seconds_ratio))
        rows.append(Row((x.arm, x.to, f"{x.reached} of {x.of}", count(x.updates and round(x.updates)), *ratios)))
    heads = ("arm", "to", "seeds", "updates", "updates, x scratch", "FLOPs, x scratch",
             "FLOPs with what was trained before", "CPU seconds, x scratch")  # fmt: skip
    notes = ("Means over the seeds that got there; ratios to from-scratch by seed, geometric means [95 % interval].",)
    return Grid("Steps and cost to memorise (t_fit) and to generalise (t_gen)", heads, tuple(rows), notes)


def _phase_grid(found: Pretrained) -> Grid:
    rows = []
    for arm in dict.fromkeys(row.arm for row in found.rows):
        its = [row for row in found.rows if row.arm == arm]
        ran = [row for row in its if not row.error]
        jumped = sum(row.phase in GROKKED for row in ran)
        means = (_mean([getattr(row, name) for row in ran]) for name in ("held_out_at_fit", "held_out_best"))
        why = "; ".join(dict.fromkeys(row.error for row in its if row.error))
        rows.append(Row((arm, f"{jumped} of {len(its)}", *means, why)))
    heads = ("arm", "grokked", "held out when memorised", "held out, best", "could not run")
    notes = (
        "Grokked: memorised first, generalised later, by the detector; the others generalised as they memorised, "
        "or never did. Means over seeds.",
    )
    return Grid("Does it grok", heads, tuple(rows), notes)


def _brings_grids(found: Pretrained) -> list[Grid]:
    """Return what every model brings, means over seeds, and paired by seed beside the one grokked from scratch."""
    models: dict[Model, dict[int, Brought]] = {}
    for row in found.brought:
        if not row.error:
            models.setdefault((row.arm, row.checkpoint), {})[row.seed] = row
    if not models:
        return []
    asked = found.forgetting
    names = [f"{arm}, {kind}" for arm, kind in models]
    means, beside = [], []
    for key, words in BRINGS.items():
        means.append(
            Row((words, *(_mean([row.values.get(key, NONE)[0] for row in of.values()]) for of in models.values())))
        )
        if key in ALIKE:
            continue
        others = [of for model, of in models.items() if model != FROM]
        beside.append(Row((words, *(_paired(of, models.get(FROM, {}), key) for of in others))))
    runs = Row(("seeds", *(str(len(of)) for of in models.values())))
    notes = (
        f"All forget {asked.authors} authors at one setting (learning rate {asked.lr:g}, at most {asked.updates} "
        "updates) until the forget probability of one gold a seed, from scratch, + .05; each on its own training data, "
        "so with hop augmentation fewer of the rows that are kept while forgetting are stored facts. Kept: accuracy on "
        "kept stored facts, less what was missed of that level. Updates: a run that never came to the level counts to "
        "the end of the budget. Still inferred: two-hop questions about the forgotten. An arm stands with its "
        "memorised model in seeds where it did not grok.",
    )
    told = f"Mean [95 % interval, each on its own], paired by seed; {DASH}: fewer than {MIN_SEEDS} seeds have both."
    apart = tuple(name for name, model in zip(names, models, strict=True) if model != FROM)
    return [
        Grid("What it brings", ("means over seeds", *names), (runs, *means), notes),
        Grid("What it brings, beside grokked from scratch", ("minus scratch, grok", *apart), tuple(beside), (told,)),
    ]


def _paired(of: dict[int, Brought], base: dict[int, Brought], key: str) -> str:
    both = [(of[seed].values.get(key, NONE), base[seed].values.get(key, NONE)) for seed in of.keys() & base.keys()]
    pairs = [(a, b) for (a, _), (b, _) in both if a is not None and b is not None]
    if len(pairs) < MIN_SEEDS:
        return DASH
    own, its = zip(*pairs, strict=True)
    d = paired_difference(own, its, resolution=max(step for _, (_, step) in both))
    return f"{d.mean:+.2g} [{d.lo:+.2g}, {d.hi:+.2g}]"


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    short = "" if len(there) == len(values) else f" (n = {len(there)})"
    return f"{sum(there) / len(there):.3g}{short}" if there else DASH


def _ratio(r: Ratio | None) -> str:
    return DASH if r is None else f"{r.mean:.2g}" + (f" [{r.ci[0]:.2g}, {r.ci[1]:.2g}]" if r.ci else "")
