"""A comparison as grids of text. Terminal, markdown and page show the same grids, so they cannot disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from llm_unlearn.eval.compare import Comparison, Contrast, Summary, summarise
from llm_unlearn.eval.outcome import COLLAPSED_BELOW, Outcome
from llm_unlearn.grok.detector import KINDS
from llm_unlearn.report.design import primary, starts
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.text import DASH, count, counted, mean, number, p_value
from llm_unlearn.report.words import words_of

Beside = Literal["gold", "start"]
ALPHA = 0.05
MIN_SEEDS = 3  # for a paired difference, as in llm_unlearn.stats

WORLD = (
    ("forget acc", "forget_acc"),
    ("two-hop leak", "forget_inf_acc"),
    ("trained two-hop", "forget_trained_inf_acc"),
    ("retain acc", "retain_acc"),
    ("retain two-hop", "retain_inf_acc"),
    ("test acc", "test_acc"),
    ("bystander acc", "bystander_acc"),
    ("utility", "model_utility"),
)
TOFU = (("forget prob", "forget_Q_A_Prob"), ("forget quality", "forget_quality"), ("utility", "model_utility"))
"""For suites without accuracies."""

DETAIL_ONLY = ("forget_trained_inf_acc", "retain_inf_acc", "bystander_acc", "forget_quality")

CONTRASTED = {  # {items} as report.words has it
    "forget_acc~gold": "Gap to gold on forgotten {items} (less is better)",
    "forget_inf_acc~gold": "Gap to gold on held-out questions that need a forgotten fact (less is better)",
    "forget_Q_A_Prob~gold": "Gap to gold in forget probability (less is better)",
    "retain_acc": "Retain accuracy (more is better)",
    "test_acc": "Test accuracy (more is better)",
    "unlearning_balance": "Balance of forgetting and keeping (more is better)",
    "model_utility": "Model utility (more is better)",
    "kept_at_level": "Retain accuracy less what is missing to the forget level (more is better)",
    "updates_to_target": "Updates to target (fewer is faster)",
    "retain_at_target": "Retain accuracy at the target (more is better)",
}
KIND_WORDS = {
    "early": "lowest held-out loss",
    "fit": "memorised",
    "fit_scaled": "memorised, the logits as wide as at grok",
    "fit_normed": "memorised, the weights' norms those of grok",
    "grok": "grokked",
    "post": "twice the steps to grokking",
    "easy": "control: generalises without delay",
    "sam": "control: flat minimum",
    "spline": "control: few linear regions, not grokked",
    "twin": "control: cannot generalise",
}


def grids(comparison: Comparison) -> list[Grid]:
    """Return every grid of a comparison: overview, the primary contrast if one was declared, the start models if the
    runs tell of them, one per group, how the runs ended and what they took if they say so, and the contrasts if there
    are enough seeds.
    """
    tables = [
        overview(comparison),
        *primary(comparison),
        *starts(comparison, axes(comparison)[1]),
        *(detail(comparison, group) for group in comparison.groups),
        *ends(comparison),
    ]
    return [*tables, contrasts(comparison)] if comparison.contrasts else tables


def seeds_note(comparison: Comparison) -> str:
    """Return what the number of seeds allows to say."""
    n = len(comparison.seeds)
    if n >= MIN_SEEDS and comparison.contrasts:
        methods, checkpoints = axes(comparison)
        counts = {len(runs) for m in methods for k in checkpoints if (runs := runs_of(comparison, m, k))}
        some = f"{min(counts)} to {max(counts)} seeds, not all in every cell"
        seeds = counted(n, "seed") if len(counts) == 1 else some
        return f"Means over {seeds}; ± gives half of the 95 % interval (Student t)."
    if n >= MIN_SEEDS:
        return (
            f"No group has {MIN_SEEDS} seeds in common with the baseline and no collapsed run among them, so no paired "
            "difference is shown."
        )
    have = "Means over 2 seeds; ± gives half of the 95 % interval. " if n == 2 else ""
    return (
        f"{have}Paired differences between checkpoints need at least {MIN_SEEDS} seeds with their intervals; "
        f"here {'is' if n == 1 else 'are'} {n}, so a difference may be chance."
    )


def same_model_notes(comparison: Comparison) -> list[str]:
    """Return a line for checkpoints that were the same step of training in some seeds: one model counted twice."""
    kinds: dict[tuple[int, int], set[str]] = {}
    for o in comparison.outcomes:
        if o.start_step is not None and o.checkpoint in KINDS:  # the others are weights of their own at any step
            kinds.setdefault((o.seed, o.start_step), set()).add(o.checkpoint)
    seeds: dict[str, list[int]] = {}
    for (seed, _), same in sorted(kinds.items()):
        if len(same) > 1:
            names = " and ".join(k for k in axes(comparison)[1] if k in same)
            seeds.setdefault(names, []).append(seed)
    return [
        f"{names} are the same model in seed{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}: "
        "a difference there comes from their golds, not from the model."
        for names, which in seeds.items()
    ]


def axes(comparison: Comparison) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (methods, checkpoints), whichever way the comparison is grouped."""
    if comparison.by == "checkpoint":
        return comparison.methods, comparison.groups
    return comparison.groups, comparison.methods


def cell(comparison: Comparison, method: str, checkpoint: str, measure: str) -> Summary:
    """Return the summary of a measure for a method from a checkpoint; empty for a measure nobody has."""
    row, group = (method, checkpoint) if comparison.by == "checkpoint" else (checkpoint, method)
    return comparison.cells[row][group].get(measure, Summary(None, None, None, 0, 0))


def collapsed(comparison: Comparison, method: str, checkpoint: str) -> int:
    """Return how many runs of a method from a checkpoint collapsed."""
    row, group = (method, checkpoint) if comparison.by == "checkpoint" else (checkpoint, method)
    return comparison.collapsed[row][group]


def runs_of(comparison: Comparison, method: str, checkpoint: str) -> list[Outcome]:
    """Return the runs of a method from a checkpoint, by seed."""
    found = [o for o in comparison.outcomes if o.method == method and o.checkpoint == checkpoint]
    return sorted(found, key=lambda o: o.seed)


def reference(outcomes: Sequence[Outcome], checkpoint: str, measure: str, beside: Beside) -> Summary:
    """Return what gold, or doing nothing ("start"), scores at a checkpoint; `measure~gold` is the distance to gold.

    Every method of a seed was set beside the same models, so the first run of each seed that has the number is read.
    """
    base, _, versus = measure.partition("~")
    values: dict[int, float] = {}
    for o in outcomes:
        line = o.metrics.get(base, {}) if o.checkpoint == checkpoint else {}
        value, gold = line.get(beside), line.get("gold")
        if versus:
            value = None if value is None or gold is None else abs(value - gold)
        if value is not None:
            values.setdefault(o.seed, value)
    return summarise(list(values.values()))


def shown_columns(comparison: Comparison) -> list[tuple[str, str]]:
    """Return (heading, measure) of the measures in the detail grids."""
    wanted = WORLD if "forget_acc" in comparison.measures else TOFU
    return [(head, measure) for head, measure in wanted if measure in comparison.measures]


def gap_measure(comparison: Comparison) -> str:
    """Return the measure whose distance to gold is shown first."""
    return "forget_acc~gold" if "forget_acc" in comparison.measures else "forget_Q_A_Prob~gold"


def overview(comparison: Comparison) -> Grid:
    """Return the checkpoints side by side: per method the shares that matter most, in percent."""
    methods, checkpoints = axes(comparison)
    columns = [pair for pair in shown_columns(comparison) if pair[1] not in DETAIL_ONLY]
    if "forget_acc" in comparison.measures:
        columns = [pair for pair in columns if pair[1] != "model_utility"]

    def joined(summaries: Sequence[Summary], flag: str = "") -> str:
        if all(s.mean is None for s in summaries):
            return DASH
        return " / ".join(DASH if s.mean is None else f"{100 * s.mean:.0f}" for s in summaries) + flag

    def line(label: str, beside: Beside) -> Row:
        cells = (joined([reference(comparison.outcomes, k, m, beside) for _, m in columns]) for k in checkpoints)
        return Row((label, *cells), beside)

    rows = [line("do nothing", "start"), line("gold", "gold")]
    for method in methods:
        flags = ["†" if collapsed(comparison, method, k) else "" for k in checkpoints]
        cells = [
            joined([cell(comparison, method, k, m) for _, m in columns], flag)
            for k, flag in zip(checkpoints, flags, strict=True)
        ]
        rows.append(Row((method, *cells)))
    heads = " / ".join(head for head, _ in columns)
    notes = ["The forget numbers are to come near gold's; what is kept is to stay as high as doing nothing leaves it."]
    if any("†" in text for row in rows for text in row.cells):
        notes.append(f"† COLLAPSED: less than {COLLAPSED_BELOW:.0%} of the kept answers are left; barred from ranking.")
    return Grid(
        f"Checkpoints side by side: {heads}, percent",
        ("method", *checkpoints),
        tuple(rows),
        (*notes, *same_model_notes(comparison), seeds_note(comparison)),
    )


def detail(comparison: Comparison, group: str) -> Grid:
    """Return everything about one group: a checkpoint with its methods, or a method with its checkpoints."""
    methods, checkpoints = axes(comparison)
    columns = shown_columns(comparison)
    heads = [head for head, _ in columns]
    rows: list[Row] = []
    if comparison.by == "checkpoint":
        words = KIND_WORDS.get(group)
        title = f"Unlearning from {group}" + (f" ({words})" if words else "")
        rows += _reference_rows(comparison, group, "")
        rows += [_method_row(comparison, m, group, m) for m in methods if runs_of(comparison, m, group)]
    else:
        title = f"Unlearning with {group}"
        for checkpoint in (k for k in checkpoints if runs_of(comparison, group, k)):
            rows += _reference_rows(comparison, checkpoint, f"{checkpoint}: ")
            rows.append(_method_row(comparison, group, checkpoint, checkpoint))
    first = "method" if comparison.by == "checkpoint" else "checkpoint"
    head = (first, *heads, "gap to gold", "steps", "retain then")
    return Grid(title, head, tuple(rows), (_legend(comparison),) if group == comparison.groups[-1] else ())


def contrasts(comparison: Comparison) -> Grid:
    """Return the paired differences against the baseline with 95 % interval and Holm-corrected p, by measure."""
    baseline = comparison.contrasts[0].baseline if comparison.contrasts else ""
    groups = [g for g in comparison.groups if g != baseline]
    found = {(c.measure, c.method, c.group): c for c in comparison.contrasts}
    rows: list[Row] = []
    for measure, title in CONTRASTED.items():
        if measure == "forget_Q_A_Prob~gold" and gap_measure(comparison) != measure:
            continue
        members = [m for m in comparison.methods if any((measure, m, g) in found for g in groups)]
        if members:
            rows.append(Row((title.format(items=words_of(comparison.outcomes).items),), "section"))
        for m in members:
            rows.append(Row((m, *(_contrast(comparison, found.get((measure, m, g))) for g in groups))))
    notes = (
        f"Mean of the paired differences (same method, scenario and seed) with its 95 % interval; p corrected by Holm "
        f"over the methods and groups of a measure; * marks p <= {ALPHA}.",
        f"{DASH}: fewer than {MIN_SEEDS} seeds on both sides, or in a seed a side collapsed or, for what is measured "
        "at the target, never came down to it.",
    )
    first = "method" if comparison.by == "checkpoint" else "checkpoint"
    columns = (first, *(f"{g} minus {baseline}" for g in groups))
    explored = "" if comparison.primary is None else ", exploratory"
    return Grid(f"Paired differences against {baseline}{explored}", columns, tuple(rows), notes)


def ends(comparison: Comparison) -> list[Grid]:
    """Return a grid of why the runs of each method and checkpoint ended, what is wrong with the kept steps, and mean
    costs; none if no run says why it ended.
    """
    if not any(o.stop for o in comparison.outcomes):
        return []
    columns = {"updates": 1.0, "flops": 1e-9, "share_of_gold": 100.0, "train_seconds": 1.0, "evaluation_seconds": 1.0}
    rows = []
    for method in axes(comparison)[0]:
        for checkpoint in axes(comparison)[1]:
            runs = runs_of(comparison, method, checkpoint)
            taken = [
                [scale * v for o in runs if (v := o.cost.get(name)) is not None] for name, scale in columns.items()
            ]
            cells = (number(sum(values) / len(values)) if values else DASH for values in taken)
            why, wrong = _tally(o.stop for o in runs), _tally(fault for o in runs for fault in o.kept_faults)
            if runs:
                rows.append(Row((f"{method} from {checkpoint}", why, wrong, *cells)))
    heads = ("run", "ended by", "wrong with the kept step", "updates", "GFLOPs", "% of gold", "train s", "eval s")
    note = (
        "% of gold: FLOPs of training and reference passes, as a share of what training gold took; evaluation "
        "on the way is left out of both. over forgotten: the answers are less likely than gold finds them by far."
    )
    return [Grid("How the runs ended, and what they took (means)", heads, tuple(rows), (note,))]


def _tally(words: Iterable[str | None]) -> str:
    found = Counter(word.replace("_", " ") for word in words if word)
    return ", ".join(f"{word} {n}" for word, n in sorted(found.items())) or DASH


def updates(runs: Sequence[Outcome], summary: Summary) -> str:
    """Return the updates to the target: "> 60" or "never (0/3)" if no run got there, "25 (2/3)" if not all did."""
    if all(o.target is None for o in runs):
        return DASH
    if summary.mean is None:
        last = max((int(o.trajectory[-1]["step"]) for o in runs if o.trajectory), default=0)
        return f"> {last}" if summary.of == 1 else f"never (0/{summary.of})"
    half = f" ±{summary.hi - summary.mean:.0f}" if summary.hi is not None else ""
    return f"{count(summary.mean)}{half}" + ("" if summary.n == summary.of else f" ({summary.n}/{summary.of})")


def _reference_rows(comparison: Comparison, checkpoint: str, prefix: str) -> list[Row]:
    def row(label: str, beside: Beside) -> Row:
        measures = [*(m for _, m in shown_columns(comparison)), gap_measure(comparison)]
        values = (mean(reference(comparison.outcomes, checkpoint, m, beside)) for m in measures)
        return Row((prefix + label, *values, "", ""), beside)

    return [row("do nothing", "start"), row("gold", "gold")]


def _method_row(comparison: Comparison, method: str, checkpoint: str, label: str) -> Row:
    values = [mean(cell(comparison, method, checkpoint, m)) for _, m in shown_columns(comparison)]
    gap = cell(comparison, method, checkpoint, gap_measure(comparison))
    nothing = reference(comparison.outcomes, checkpoint, gap_measure(comparison), "start")
    distance = DASH if gap.mean is None else f"{mean(gap)} ({number(nothing.mean)})"
    runs, steps = runs_of(comparison, method, checkpoint), cell(comparison, method, checkpoint, "updates_to_target")
    then = mean(cell(comparison, method, checkpoint, "retain_at_target"))
    n = collapsed(comparison, method, checkpoint)
    flag = "" if not n else " COLLAPSED" if len(runs) == 1 else f" COLLAPSED {n}/{len(runs)}"
    return Row((label + flag, *values, distance, updates(runs, steps), then), "collapsed" if n else "method")


def _contrast(comparison: Comparison, c: Contrast | None) -> str:
    if c is None:
        return DASH
    digits = 1 if c.measure == "updates_to_target" else 2
    n = "" if c.n == len(comparison.seeds) else f", n = {c.n}"
    star = " *" if c.p_holm <= ALPHA else ""
    return f"{c.mean:+.{digits}f} [{c.lo:+.{digits}f}, {c.hi:+.{digits}f}], {p_value(c.p_holm)}{n}{star}"


def _legend(comparison: Comparison) -> str:
    words = words_of(comparison.outcomes)
    measures = {m for _, m in shown_columns(comparison)}
    same = "retain acc, retain two-hop" if "retain_inf_acc" in measures else "retain acc"
    told = {
        "forget_acc": f"forget acc: forgotten {words.items} still {words.got}",
        "forget_inf_acc": "two-hop leak: held-out questions that need a forgotten fact (two hops, or asked backwards), "
        "which can only be inferred",
        "forget_trained_inf_acc": "trained two-hop: the trained ones of that sort, which may be remembered as they are",
        "forget_Q_A_Prob": "forget prob: probability of the forgotten answers",
        "retain_acc": f"{same}: the same for what is kept",
        "test_acc": "test acc, bystander acc: the same for images nothing was trained on, of what stays and of the "
        "classes that nothing was forgotten of",
    }
    said = [text for measure, text in told.items() if measure in measures]
    said.append("gap to gold: distance of the first number to gold's (doing nothing's in brackets)")
    said.append(
        "steps: updates to gold's forget probability plus the margin; retain then: retain accuracy at that point"
    )
    if any(s.mean is not None and s.n < s.of for s in _steps(comparison)):
        said.append("(2/3): mean over the 2 of 3 seeds that got there")
    return "; ".join(said) + "."


def _steps(comparison: Comparison) -> list[Summary]:
    methods, checkpoints = axes(comparison)
    return [cell(comparison, m, k, "updates_to_target") for m in methods for k in checkpoints]
