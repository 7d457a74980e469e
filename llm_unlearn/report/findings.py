"""The findings: one page about all studies, as markdown and as HTML, made from committed results and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from llm_unlearn.data.local_draws import LOCAL
from llm_unlearn.eval.breakeven import NEVER
from llm_unlearn.files import write_atomic
from llm_unlearn.report import plots
from llm_unlearn.report.answer import Hypothesis, state
from llm_unlearn.report.claims import BY_DESIGN, Judged, claims_grid, interval, shown
from llm_unlearn.report.costs import paid_back, requests_in_words, training_ratios
from llm_unlearn.report.design import primary
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.html import template
from llm_unlearn.report.interventions import interventions
from llm_unlearn.report.local_grokking import lines_grid, local_claims
from llm_unlearn.report.pretrained import pretrained
from llm_unlearn.report.probe_table import LESS_ALIGNED, LESS_ALIKE, LESS_COMPLEX
from llm_unlearn.report.results import LANGUAGE, VISION, Check, Local, Results, read_results
from llm_unlearn.report.section import Section, Studied, behind, sections, studied
from llm_unlearn.report.tables import grids_markdown
from llm_unlearn.report.text import DASH, counted, printable
from llm_unlearn.report.told import designed, told
from llm_unlearn.report.untuned import same_settings_grid

TITLE = "Does grokking make forgetting easier?"
TOPICS = {  # of the paper's -> the claims that may stand for it in the overview, the first that the study leaves open
    "efficient forgetting": ("fewer updates to the forget level",),
    "less collateral damage": ("RA falls by less, at the forget level", "RA falls by less"),
    "stability": ("UA varies less over seeds", "RA varies less over seeds"),
    "gradient alignment": (LESS_ALIGNED,),
    "complexity": (LESS_COMPLEX,),
    "CKA": (LESS_ALIKE,),
}
AGAINST = ("fit", "early", "easy")
ROLES = {"fit": "fit", "easy": "easy"}
SHADED = (
    "What a run keeps at the forget level, grokked less another checkpoint, by method: mean and 95 % interval over "
    "seeds. Shaded: differences too small to matter, as declared before the runs."
)
WAYS = {"as_published": "drawn as published", "matched": "matched pairs"}


@dataclass(frozen=True)
class Page:
    """The findings: three sentences, the picture that goes with them, and everything else."""

    answer: tuple[str, str, str]
    picture: str
    sections: tuple[Section, ...]


def findings(results: Results) -> Page:
    """Return the page about a folder of results; what has none is said to be not run, with the command that runs it."""
    studies = [studied(f) for f in results.studies]
    main = [s for s in studies if s.file.content.arm == "main"]
    parts = [_overview(main, results)]
    for s in main:
        parts += sections(s)
    parts += [_other_arm(s) for s in studies if s.file.content.arm != "main"]
    parts += [interventions(studied(f)) for f in results.interventions]
    parts += [
        *_local(results),
        *([pretrained(results.pretrained)] if results.pretrained else []),
        *_simulation(results),
        _missing(results),
    ]
    return Page(_answer(main, results), _picture(main), (*parts, _how()))


def write_findings(results: Path, out: Path, html: Path) -> list[Path]:
    """Write the page as markdown to `out` and as one HTML file, and the figures that the markdown shows beside it, in a
    folder named like it; return what was written, the markdown first.

    Raises UserError as `read_results`, before anything is written.
    """
    page = findings(read_results(results))
    figures = {"answer": page.picture, **{n: svg for part in page.sections for n, svg in (part.figures or {}).items()}}
    folder = out.with_suffix("")
    content = {
        out: markdown(page, folder.name).encode(),
        html: as_html(page).encode(),
        **{folder / f"{name}.svg": plots.standalone(svg) for name, svg in figures.items()},
    }
    for path, data in content.items():
        write_atomic(path, data)
    return list(content)


def markdown(page: Page, folder: str) -> str:
    """Return the page as markdown; `folder` holds its figures."""
    lines = [
        f"# {TITLE}",
        *page.answer,
        f"![Grokked minus other checkpoints, with intervals]({folder}/answer.svg)",
        SHADED,
    ]
    for part in page.sections:
        lines += [f"{'#' * part.level} {part.title}", *(printable(text).replace("<", "&lt;") for text in part.text)]
        lines += [f"![{plots.described(svg)}]({folder}/{name}.svg)" for name, svg in (part.figures or {}).items()]
        if part.grids:
            lines.append(grids_markdown(part.grids, part.level + 1).rstrip())
    return "\n\n".join(lines) + "\n"


def as_html(page: Page) -> str:
    """Return the page as HTML: no script, nothing fetched, every text escaped."""
    return template("findings.html").render(
        title=TITLE,
        answer=[_marked(text) for text in page.answer],
        picture=Markup(page.picture),
        shaded=SHADED,
        sections=[
            {
                "title": part.title,
                "level": part.level,
                "text": [_marked(text) for text in part.text],
                "figures": {name: Markup(plots.with_ids(svg, name)) for name, svg in (part.figures or {}).items()},
                "grids": part.grids,
            }
            for part in page.sections
        ],
        words=_word_columns,
    )


def _word_columns(grid: Grid) -> tuple[int, ...]:
    """Columns that hold sentences."""
    return tuple(i for i, head in enumerate(grid.columns) if head in ("", "verdict", "command", "what"))


def _marked(text: str) -> Markup:
    """Escape a paragraph and keep what backticks and double stars mark."""
    code = str(escape(printable(text))).split("`")
    parts = [f"<code>{part}</code>" if i % 2 and i < len(code) - 1 else part for i, part in enumerate(code)]
    bold = "".join(parts).split("**")
    return Markup("".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(bold)))


def _answer(main: Sequence[Studied], results: Results) -> tuple[str, str, str]:
    """The three sentences: language, images, claims and cost."""
    language = [s for s in main if not s.file.content.arch]
    images = [s for s in main if s.file.content.arch]
    first = (
        f"**Language:** {_said(language[:1])}." if language else f"**Language:** not run yet (`{LANGUAGE.command}`)."
    )
    alike: dict[str, list[Studied]] = {}
    for s in images:
        alike.setdefault(s.answer.words, []).append(s)
    told = "; ".join(_said(group, named=True) for group in alike.values())
    second = f"**Images:** {told}." if images else f"**Images:** not run yet (`{VISION[0].command}`)."
    return first, second, _claims_and_cost(main)


def _said(alike: Sequence[Studied], named: bool = False) -> str:
    """The answer of studies that have the same, in a clause with the numbers of each."""
    words = alike[0].answer.words[:1].lower() + alike[0].answer.words[1:]
    parts = []
    for s in alike:
        told = ", ".join(_range(h) for h in s.answer.hypotheses if any(c.mean is not None for c in h.contrasts))
        if told or named:
            parts.append(f"{s.file.name}: {told or 'nothing testable'}" if named else told)
    return f"{words} ({'; '.join(parts)})" if parts else words


def _range(h: Hypothesis) -> str:
    means = [c.mean for c in h.contrasts if c.mean is not None]
    low, high = (f"{pick(means):+.2f}".replace("-0.00", "+0.00") for pick in (min, max))
    seeds = sorted({c.n for c in h.contrasts if c.mean is not None})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    spread = low if low == high else f"{low} to {high}"
    return f"{h.group} minus {h.baseline} {spread} over {len(means)} methods, {n} seeds"


def _claims_and_cost(main: Sequence[Studied]) -> str:
    judged = [j for s in main for j in s.claims if j.baseline == "fit" and j.why != BY_DESIGN]
    if not judged:
        return "**Published claims and cost:** nothing to judge yet."
    verdicts = {v: sum(j.verdict == v for j in judged) for v in ("holds", "does not hold", "cannot tell")}
    told = f"{verdicts['holds']} hold, {verdicts['does not hold']} do not, {verdicts['cannot tell']} cannot be told"
    head = f"**Published claims and cost:** of {len(judged)} judged beside the memorised checkpoint, {told}"
    ratios = [ratio for s in main for ratio in training_ratios(s.file, "grok", "fit")]
    if not ratios:
        return f"{head}; what training took is not in the files."
    spread = " to ".join(dict.fromkeys(f"{f(ratios):.1f}" for f in (min, max)))
    return f"{head}; training until grokking took {spread} times as much as until `fit`{_paid(main)}."


def _paid(main: Sequence[Studied]) -> str:
    """In how many studies and methods of a primary the dearer training is paid back."""
    found = [
        b
        for s in main
        for m in (s.primary.declared.methods if s.primary else ())
        if (b := paid_back(s.file, m, "grok", "fit", "flops") or paid_back(s.file, m, "grok", "fit", "cpu_seconds"))
    ]
    paid = sorted((b for b in found if b.requests != NEVER), key=lambda b: b.requests)
    if not found:
        return ""
    sure = sum(b.hi is not None and b.hi != NEVER for b in paid)
    best = f" (after {requests_in_words(paid[0])} requests at best; surely in {sure})" if paid else ""
    return f" and is paid back by cheaper requests in {len(paid)} of {len(found)} studies x methods{best}"


def _overview(main: Sequence[Studied], results: Results) -> Section:
    """The published claims, one a topic, by study: published, ours, and the verdict beside every sort of checkpoint."""
    local = {
        f"TOFU, {said}": (x, local_claims(_dumped(x.lines), way))
        for x in results.local.values()
        for way, said in WAYS.items()
    }
    unasked = [("language", LANGUAGE)] if LANGUAGE in results.missing else []
    unasked += [] if any(s.file.content.arch for s in main) else [("images", VISION[0])]
    rows: list[Row] = []
    for topic, words in TOPICS.items():
        there = {name: j for name, (_, found) in local.items() for j in found if j.claim.topic == topic}
        besides = "".join(dict.fromkeys(f"; on TOFU: {j.claim.words}" for j in there.values()))
        rows.append(Row((f"{topic}: {words[0]}{besides}",), "section"))
        rows += [Row((name, *[DASH] * 2, *["not run"] * 3)) for name, _ in unasked]
        rows += [_overview_row(s.file.name, s.claims, words) for s in main]
        rows += [
            Row((name, shown(j.claim, j.claim.published), interval(j), j.verdict, DASH, DASH))
            for name, j in there.items()
        ]
    heads = ("study", "published", "ours, grok and fit", "beside fit", "beside early", "beside easy")
    made = {s.file.name: s.file.content.command for s in main} | {name: e.command for name, e in unasked}
    made |= {f"TOFU ({name})": x.command for name, x in results.local.items()}
    notes = (
        "Published: grokked beside early-stopped, the effect in the claimed direction. Ours: the same, grokked beside "
        "memorised [95 % interval]; of TOFU, questions learnt early beside those learnt late. All claims, seeds and "
        "intervals, beside every checkpoint: below, by study.",
        "Verdict: holds if the whole interval is on the claimed side of no effect; does not hold if it leaves out half "
        "of the published effect; cannot tell otherwise. Beside early is the published comparison, beside fit the fair "
        "one; beside easy tells grokking from generalising.",
        "Commands: " + "; ".join(f"{name}: {command}" for name, command in made.items()) + ".",
    )
    return Section("Published claims", grids=(Grid("One claim a topic", heads, tuple(rows), notes),))


def _overview_row(name: str, found: Sequence[Judged], words: Sequence[str]) -> Row:
    """The first of the claims that the study has not decided by its design."""
    chosen = next((w for w in words if any(j.claim.words == w and j.why != BY_DESIGN for j in found)), words[0])
    by = {j.baseline: j for j in found if j.claim.words == chosen}
    name += "" if chosen == words[0] else f" ({chosen})"
    verdicts = [by[k].verdict if k in by else "not run" for k in AGAINST]
    any_one = next(iter(by.values()), None)
    known = DASH if any_one is None else shown(any_one.claim, any_one.claim.published)
    return Row((name, known, interval(by["fit"]) if "fit" in by else DASH, *verdicts))


def _other_arm(s: Studied) -> Section:
    """Another arm of a study: what it says of the published claims, and of the primary contrast if it has that."""
    text = (*told(s.file), designed(s.file), "All its tables: vision_table1.md beside its file.")
    grids = [*primary(s.comparison), behind(s)] if s.comparison is not None and s.primary else []
    untuned = same_settings_grid(s.file.content.trials, s.file.scenario, s.pairs)
    return Section(
        s.file.title,
        text,
        grids=(*grids, *([untuned] if untuned else []), *([claims_grid(s.claims)] if s.claims else [])),
    )


def _picture(main: Sequence[Studied]) -> str:
    groups, bounds = [], []
    for s in main:
        if s.primary is None:
            continue
        bounds.append(s.primary.declared.bound)
        for h in s.answer.hypotheses:
            bars = [
                plots.Bar(f"{c.method}: {state(c, s.primary.declared.alpha)}", c.mean, c.lo, c.hi,
                          ROLES.get(h.baseline, "other"), c.why or c.verdict)
                for c in h.contrasts
            ]  # fmt: skip
            if bars:
                groups.append((f"{s.file.name}, {h.group} minus {h.baseline}: {h.verdict}", bars))
    if not groups:
        groups = [("not run yet", [plots.Bar("", None, None, None, "other", "no results")])]
    axis = "kept at one forget level: grokked minus other"
    return plots.forest(groups, max(bounds, default=0.0), axis)


def _dumped(lines: Sequence) -> list[dict]:
    return [line.model_dump() for line in lines]


def _local(results: Results) -> list[Section]:
    out = []
    for name, local in results.local.items():
        judged = [claims_grid(local_claims(_dumped(local.lines), way), said) for way, said in WAYS.items()]
        text = (f"`{local.command}` ({name}). {local.environment.machine}.", _drawn(local))
        out.append(Section("Local grokking on TOFU", text, grids=(*judged, lines_grid(_dumped(local.lines)))))
    return out


def _drawn(local: Local) -> str:
    rule, groups = local.rule, local.groups
    early, late = (groups.questions[kind] for kind in LOCAL)
    said = (
        f"{counted(local.draws, 'draw')}. Learnt early: the loss falls by less than {rule.grokked_below:g} from epoch "
        f"{groups.early_epoch:g} to {groups.late_epoch:g} ({counted(early, 'question')}); learnt late: by more than "
        f"{rule.ungrokked_above:g} ({late}); {groups.matched_pairs} pairs match."
    )
    return f"{said} Not drawn: {'; '.join(local.left_out)}." if local.left_out else said


def _simulation(results: Results) -> list[Section]:
    if (found := results.simulation) is None:
        return []
    rows = []
    for group in found.checks.values():
        for name, check in group.items():
            if isinstance(check, Check):
                low, high = (None if b is None else f"{100 * b:g} %" for b in check.bar)
                bar = f"at most {high}" if low is None else f"at least {low}" if high is None else f"{low} to {high}"
                kept = "kept" if check.kept else "missed"
                rows.append(Row((name.replace("_", " "), check.what, f"{100 * check.rate:.1f} %", bar, kept)))
    text = (f"`{found.command}`. {found.environment.machine}.",)
    grid = Grid(
        f"Rates over {found.studies:,} simulated studies", ("check", "what", "rate", "bar", "verdict"), tuple(rows)
    )
    return [Section("The statistics themselves", text, grids=(grid,))]


def _missing(results: Results) -> Section:
    rows = tuple(Row((e.what, e.name, e.command)) for e in results.missing)
    if not rows:
        return Section("Not run", ("All that was planned has results.",))
    return Section("Not run", grids=(Grid("Planned, without results", ("what", "file", "command"), rows),))


def _how() -> Section:
    return Section(
        "How this page is made",
        (
            "`llm-unlearn study report` makes it from the files in benchmarks/results, and runs nothing. No sentence "
            "about results and no number of them is written by hand.",
            "The answer, by rule: a method's contrast says more, less, same (surely below the bound) or nothing, after "
            "Holm's correction. Grokked keeps more than another checkpoint where more than half of the methods say "
            "more and none says same or less, and does not the other way round. Grokking makes forgetting easier where "
            "it keeps more than `fit` and than `easy`; it does not where neither of these holds; where it keeps more "
            "than `fit` and not than `easy`, generalising does, however it came about. All else cannot be told: what "
            "is not shown is not taken for the opposite.",
            "The rules of the answer are in `llm_unlearn/report/answer.py`, those of the published claims in "
            "`llm_unlearn/report/claims.py`: committed before the results they judge, but for one change, after "
            "language's first had been seen: runs that are each held to the level of their own gold are judged at it, "
            "as those held to one level were before. Until then their updates were counted to gold's accuracy (that "
            "table still stands beside), and the forget accuracy that their levels decide was judged.",
            "`llm-unlearn study reproduce FILE CELL` runs one cell of a study again and says whether every number is "
            "the same to the last bit.",
        ),
    )
