"""What a comparison says, in plain words, and what it cannot say."""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.eval.compare import MAIN, Comparison, Contrast
from llm_unlearn.report.answers import pick_run
from llm_unlearn.report.collect import GrokRun, ReportData, missing_kinds, paired
from llm_unlearn.report.design import digits_for, judged
from llm_unlearn.report.grids import ALPHA, MIN_SEEDS
from llm_unlearn.report.text import counted, listed, number, p_value
from llm_unlearn.report.words import words_of

JUDGED = {  # {items} as report.words has it
    "forget_acc~gold": "the gap to gold on forgotten {items}",
    "forget_Q_A_Prob~gold": "the gap to gold in forget probability",
    "forget_inf_acc~gold": "the gap to gold on held-out questions that need a forgotten fact",
    "retain_acc": "retain accuracy",
    "test_acc": "test accuracy",
    "model_utility": "model utility",
}


def verdict(data: ReportData) -> list[str]:
    """Return sentences: what was compared, over how many seeds, and what the paired differences say.

    With fewer than 3 seeds it says that nothing can be concluded; a null result is stated as one.
    """
    sentences = []
    if data.comparison is not None:
        sentences.append(_what(data.comparison))
    sentences += _grokking(data)
    if data.comparison is not None:
        sentences += _primary(data.comparison)
        sentences += _nearest(data.comparison)
        explored = "" if data.comparison.primary is None else "Exploratory: "
        sentences += [explored + text for text in _differences(data.comparison)]
        sentences += _flags(data.comparison)
    else:
        sentences.append("No unlearning run has been evaluated yet, so there are curves only.")
    if data.failed:
        sentences.append(
            f"{counted(len(data.failed), 'cell')} of the study failed and will run again: {listed(data.failed[:5])}."
        )
    return sentences


def _what(c: Comparison) -> str:
    where = "checkpoint" if len(c.groups) == 1 else "checkpoints"
    return (
        f"{counted(len(c.methods), 'method')} unlearned from {len(c.groups)} {where} ({listed(c.groups)}), "
        f"{counted(len(c.seeds), 'seed')}, {counted(len(c.outcomes), 'run')}; every number stands beside gold, a model "
        "trained the same way without what was to be forgotten, and beside doing nothing."
    )


def _grokking(data: ReportData) -> list[str]:
    models = [run for run in data.runs if not run.gold and run.control is None]
    if not models:
        return _controls(data)
    grokked = [run for run in models if run.grokked]
    ratios = [run.report["ratio"] for run in grokked if run.report["ratio"] is not None]
    spread = f" {_range(ratios)} times as many steps as it took to memorise" if ratios else ""
    if len(models) == 1:
        text = "The model grokked" if grokked else "The model did not grok"
    else:
        text = f"{len(grokked)} of {len(models)} models grokked"
    never = [run for run in models if run.report["t_gen"] is None and not run.generalised_at_once]
    sentences = [text + (f", after{spread}." if spread else ".")]
    if never:
        sentences.append(
            f"{_names(never)} never generalised within {max(r.step for r in never):,} steps (censored, not dropped)."
        )
    main = [run for run in data.runs if run.control is None]
    both = {kind for run, gold in paired(main) if run and gold for kind in run.marks.keys() & gold.marks.keys()}
    asked = frozenset().union(*(run.asked for run in models))
    missing = [kind for kind in missing_kinds(data) if kind not in both and kind in asked]
    if missing:
        sentences.append(f"Nothing was unlearned from {listed(missing)}: no model reached it together with its gold.")
    return sentences + _controls(data)


def _controls(data: ReportData) -> list[str]:
    """How the controls' models learned: whether they are what they were made to be."""
    phases: dict[str, list[str]] = {}
    for run in (run for run in data.runs if run.control is not None and not run.gold):
        phases.setdefault(str(run.control), []).append(run.report["phase"])
    told = (
        f"{name}: " + ", ".join(f"{phase} ({found.count(phase)})" for phase in dict.fromkeys(found))
        for name, found in phases.items()
    )
    return [f"Controls, by what the detector calls their training (models): {'; '.join(told)}."] if phases else []


def _primary(c: Comparison) -> list[str]:
    if (result := c.primary) is None:
        return []
    if result.problem:
        return [f"The primary contrast ({result.declared.measure}) is not judged: {result.problem}."]
    digits = digits_for(result.declared.bound)
    told = "; ".join(
        f"{x.group} against {x.baseline} with {x.method}: {judged(result, x)}"
        + ("" if x.mean is None else f" ({x.mean:+.{digits}f}; detectable {number(x.detectable, digits)})")
        for x in result.contrasts
    )
    return [f"Primary contrast, declared beforehand, {result.declared.measure}: {told}."]


def _nearest(c: Comparison) -> list[str]:
    run = pick_run(c.outcomes)
    measure = "forget_acc" if run is not None and "forget_acc" in run.metrics else "forget_Q_A_Prob"
    line = run.metrics.get(measure, {}) if run is not None else {}
    if run is None or line.get("value") is None or line.get("gold") is None:
        return []
    words, kept = words_of(c.outcomes), run.metrics.get("retain_acc", {})
    verb = f"still {words.gets}" if measure == "forget_acc" else "still gives the forgotten answers a probability of"
    tail = f" of the forgotten {words.items}" if measure == "forget_acc" else ""
    also = f" and {kept['value']:.0%} of the kept ones" if kept.get("value") is not None else ""
    start = f", doing nothing {line['start']:.0%}" if line.get("start") is not None else ""
    return [
        f"From {run.checkpoint}, {run.method} came nearest to gold: on seed {run.seed} it {verb} {line['value']:.0%}"
        f"{tail} (gold {line['gold']:.0%}{start}){also}."
    ]


def _differences(c: Comparison) -> list[str]:
    if len(c.groups) < 2:
        return ["There is one checkpoint only, so there is nothing to contrast it with."]
    if not c.contrasts:
        n = len(c.seeds)
        if n >= MIN_SEEDS:
            return [
                f"No method has {MIN_SEEDS} seeds at two checkpoints without a collapsed run among them, so their "
                "differences cannot be told from chance."
            ]
        return [
            f"{'One seed' if n == 1 else 'Two seeds'} cannot say whether checkpoints differ by more than chance: "
            f"paired differences need at least {MIN_SEEDS}."
        ]
    baseline = c.contrasts[0].baseline
    groups = [g for g in c.groups if g != baseline]
    main = [g for g in groups if g in MAIN]
    group = "grok" if "grok" in main else (main or groups)[-1]
    skip = {"forget_Q_A_Prob~gold", "model_utility"} if "forget_acc" in c.measures else set()
    found = {m: [x for x in c.contrasts if x.measure == m and x.group == group] for m in JUDGED if m not in skip}
    barred = _barred(c, group, baseline)
    out = f"; left out because a run collapsed: {listed(barred)}" if barred else ""
    if not any(found.values()):
        n = len(
            {o.seed for o in c.outcomes if o.checkpoint == group}
            & {o.seed for o in c.outcomes if o.checkpoint == baseline}
        )
        if n >= MIN_SEEDS:
            return [f"No method can be contrasted between {group} and {baseline} over {MIN_SEEDS} seeds{out}."]
        return [
            f"{counted(n, 'seed')} {'has' if n == 1 else 'have'} runs from both {group} and {baseline}, too few to say "
            f"whether they differ by more than chance: paired differences need at least {MIN_SEEDS}."
        ]
    items = words_of(c.outcomes).items
    said = [f"{JUDGED[m].format(items=items)}: {_judge(members)}." for m, members in found.items() if members]
    fewest, most = (pick(x.n for members in found.values() for x in members) for pick in (min, max))
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    how = f" (paired over {seeds}, Holm-corrected{out})"
    return [f"From {group} rather than {baseline}{how if not i else ''}, {text}" for i, text in enumerate(said)]


def _barred(c: Comparison, group: str, baseline: str) -> list[str]:
    """Methods whose runs from the two checkpoints are not contrasted because one of them collapsed."""
    broken = []
    for method in c.methods:
        a, b = ({o.seed: o for o in c.outcomes if (o.method, o.checkpoint) == (method, k)} for k in (group, baseline))
        if any(a[seed].collapsed or b[seed].collapsed for seed in a.keys() & b.keys()):
            broken.append(method)
    return broken


def _judge(found: Sequence[Contrast]) -> str:
    sure = [x for x in found if x.p_holm <= ALPHA]
    if not sure:
        widest = max(found, key=lambda x: abs(x.mean))
        whom = "the one method compared" if len(found) == 1 else f"any of the {len(found)} methods"
        return f"no detectable difference for {whom} (largest: {_estimate(widest)})"
    parts = []
    for word, side in (("smaller", [x for x in sure if x.mean < 0]), ("larger", [x for x in sure if x.mean > 0])):
        if side:
            parts.append(f"{word} with {'; '.join(_estimate(x) for x in side)}")
    rest = len(found) - len(sure)
    return "; ".join(parts) + (f"; no detectable difference for {rest} of {len(found)} methods" if rest else "")


def _estimate(x: Contrast) -> str:
    return f"{x.method} {x.mean:+.2f} [{x.lo:+.2f}, {x.hi:+.2f}], {p_value(x.p_holm)}"


def _flags(c: Comparison) -> list[str]:
    sentences = []
    broken = [o for o in c.outcomes if o.collapsed]
    if broken:
        names = sorted({f"{o.method} from {o.checkpoint}" for o in broken})
        some = listed(names[:4]) + (" and others" if len(names) > 4 else "")
        sentences.append(f"{counted(len(broken), 'run')} collapsed, barred from ranking: {some}.")
    aimed = [o for o in c.outcomes if o.target is not None]
    missed = [o for o in aimed if o.at_target() is None]
    if missed:
        aim = "gold's forget probability plus a margin"
        sentences.append(f"{len(missed)} of {counted(len(aimed), 'run')} never came down to the target, {aim}.")
    return sentences


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _names(runs: Sequence[GrokRun]) -> str:
    return listed([run.name for run in runs[:4]]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
