"""The parts a page of findings is made of, and the part about one study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_unlearn.eval.compare import Comparison, compare
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.eval.predictors import Cell
from llm_unlearn.eval.primary import PrimaryResult
from llm_unlearn.report import plots
from llm_unlearn.report.answer import Answer, answer, in_words
from llm_unlearn.report.claims import BASELINES, Judged, claims, claims_grid
from llm_unlearn.report.costs import break_even_grid, training_grid
from llm_unlearn.report.course import frontier_grid, held_to_levels, one_level, spread_grid, times_grid
from llm_unlearn.report.design import primary, starts
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.leftover import left_over
from llm_unlearn.report.paper_table import PAIRS, checkpoints, present
from llm_unlearn.report.probe_table import predictors, probe_claims, probe_grids
from llm_unlearn.report.results import AT_LEVEL, StudyFile
from llm_unlearn.report.secondary import levels_grid, reached_grid, requests_grid, secondary_grid
from llm_unlearn.report.told import designed, told
from llm_unlearn.report.untuned import same_settings_grid

SHOWN = ("early", "fit", "grok", "easy")
"""Checkpoints in a study's own tables; of the others there is the primary's measure."""


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs (backticks mark code), figures (name -> SVG), tables; `level` of its heading."""

    title: str
    text: tuple[str, ...] = ()
    figures: Mapping[str, str] | None = None
    grids: tuple[Grid, ...] = ()
    level: int = 2


@dataclass(frozen=True)
class Studied:
    """A study's file with what was made of it."""

    file: StudyFile
    comparison: Comparison | None
    answer: Answer
    claims: tuple[Judged, ...]

    @property
    def primary(self) -> PrimaryResult | None:
        """What came of the contrast that was declared."""
        return None if self.comparison is None else self.comparison.primary

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of checkpoints declared."""
        return () if self.primary is None else self.primary.declared.contrasts


def studied(file: StudyFile) -> Studied:
    """Judge a study: the primary's answer, and every published claim about runs and probes."""
    runs, c = file.of(file.scenario), file.content
    comparison = compare(runs) if runs else None
    late, at_level = ("annealed" if c.arm == "published" else "grok"), c.arm in AT_LEVEL
    judged = [*claims(runs, late, BASELINES, at_level), *probe_claims(c.probes, c.arch, late)] if runs else []
    decided = answer(None if comparison is None else comparison.primary)
    return Studied(file, comparison, decided, tuple(judged))


def sections(s: Studied) -> list[Section]:
    """Return everything about one study."""
    file, runs = s.file, s.file.of(s.file.scenario)
    text = [*told(file), designed(file), *_answered(s)]
    if s.comparison is None:
        return [Section(file.title, (*text, "No run of the request it was to be decided on has ended."))]
    few = [o for o in runs if o.checkpoint in SHOWN]
    pairs = [("grok", other) for other in ("fit", "easy", "early")]
    methods = tuple(dict.fromkeys((*_methods(s), *(o.method for o in runs))))
    first = [*primary(s.comparison), behind(s), *starts(s.comparison, checkpoints(runs)), claims_grid(s.claims)]
    course = [
        times_grid(few, pairs),
        times_grid(few, pairs, unit="seconds"),
        times_grid(few, pairs, unit="flops"),
        times_grid(few, pairs, by="acc") if held_to_levels(few) and not one_level(few) else None,
        frontier_grid(few, pairs),
        spread_grid(few, pairs),
    ]
    parts = [
        Section(file.title, tuple(text), _frontiers(s), tuple(g for g in first if g.rows)),
        _part("On the way", course),
        _part("Secondary outcomes, exploratory", [
            secondary_grid(few, [k for k in SHOWN if k in checkpoints(few)], present(few, [*pairs, ("easy", "fit")])),
            *_everywhere(s),
        ], _left(s)),
        _part("Every setting tried", [same_settings_grid(file.content.trials, file.scenario, pairs)]),
        _part("Cost", [training_grid(file), break_even_grid(file, methods, s.pairs)]),
        _why(s),
    ]  # fmt: skip
    return [part for part in parts if part.text or part.grids]


def behind(s: Studied) -> Grid:
    """Return how many runs stand behind the primary: by method and checkpoint, planned, ended, collapsed, down at the
    level, and with how many seeds short.
    """
    rows = []
    for method in _methods(s):
        for kind in dict.fromkeys(kind for pair in s.pairs for kind in pair):
            mine = [o for o in s.file.of(s.file.scenario) if (o.method, o.checkpoint) == (method, kind)]
            planned = s.file.planned(s.file.scenario, kind, method)
            lost = sorted(planned - {o.seed for o in mine})
            missing = ", ".join(map(str, lost)) or "none"
            down, gone = (sum(f(o) for o in mine) for f in (_at_level, lambda o: o.collapsed))
            rows.append(Row((method, kind, str(len(planned)), str(len(mine)), missing, str(gone), str(down))))
    heads = ("method", "checkpoint", "seeds planned", "ended", "censored or failed", "collapsed", "came to the level")
    notes = ("came to the level: at some evaluation on the way; one that did not pays for it in the measure.",)
    return Grid("Runs behind it", heads, tuple(rows), notes)


def _at_level(o: Outcome) -> bool:
    return o.at_target() is not None


def _answered(s: Studied) -> list[str]:
    """The answer by rule, with what came of each hypothesis."""
    bound = s.primary.declared.bound if s.primary else 1.0
    parts = [f"A grokked model {in_words(h, bound)}." for h in s.answer.hypotheses]
    return [f"**{s.answer.words}.** Grokking makes forgetting easier: {s.answer.verdict}.", *parts]


def _methods(s: Studied) -> tuple[str, ...]:
    return () if s.primary is None else s.primary.declared.methods


def _part(title: str, grids: Sequence[Grid | None], figures: Mapping[str, str] | None = None) -> Section:
    return Section(title, figures=figures, grids=tuple(g for g in grids if g is not None), level=3)


def _left(s: Studied) -> dict[str, str]:
    """What is left of the forgotten, of the primary's runs, by method."""
    kinds = [kind for kind in SHOWN if any(kind in pair for pair in s.pairs)]
    found = left_over(s.file.of(s.file.scenario), _methods(s), kinds)
    return {f"{s.file.path.stem}-left-{method}": svg for method, svg in found.items()}


def _everywhere(s: Studied) -> list[Grid | None]:
    """The primary's measure, and of texts what can still be inferred, for every request and checkpoint."""
    measure = s.primary.declared.measure if s.primary else "kept_at_level"
    by_scenario = {name: s.file.of(name) for name in dict.fromkeys(o.scenario for o in s.file.outcomes)}
    differences = requests_grid(by_scenario, present(s.file.outcomes, PAIRS), measure)
    kinds = checkpoints(s.file.outcomes)
    return [differences, reached_grid(by_scenario, kinds), levels_grid(by_scenario, kinds)]


def _why(s: Studied) -> Section:
    """Probes beside their nulls and the published values, and which of them predicts."""
    c, title = s.file.content, "Why: probes of the start models"
    if not c.probes:
        return Section(title, ("Not run: the file holds no probes.",), level=3)
    measure = s.primary.declared.measure if s.primary else "kept_at_level"
    outcomes = {
        Cell(o.seed, o.checkpoint, o.method): value
        for o in s.file.of(s.file.scenario)
        if (value := o.number(measure)) is not None
    }
    grids, said = predictors(c.probes, outcomes, measure)
    late = "annealed" if c.arm == "published" else "grok"
    return Section(title, (said,) if said else (), grids=(*probe_grids(c.probes, c.arch, late), *grids), level=3)


def _frontiers(s: Studied) -> dict[str, str]:
    """Forgetting against keeping along the primary's runs, by method."""
    kinds = {kind for pair in s.pairs for kind in pair}
    runs = [o for o in s.file.of(s.file.scenario) if o.method in _methods(s) and o.checkpoint in kinds]
    prefix = s.file.path.stem
    return {f"{prefix}-{method}": svg for method, svg in plots.frontiers(compare(runs)).items()} if runs else {}
