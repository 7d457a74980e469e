"""Plots as SVG text for a page: colours are CSS variables (with a fallback), so one picture serves light and dark.

Panels are about as wide as a phone; a page puts as many side by side as fit.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from llm_unlearn.eval.compare import ORDER, Comparison
from llm_unlearn.eval.outcome import Outcome
from llm_unlearn.report.collect import GrokRun, paired
from llm_unlearn.report.grids import axes, reference, runs_of
from llm_unlearn.report.text import listed
from llm_unlearn.report.words import words_of_training

# Okabe and Ito's colours, told apart with any colour vision; each occurs once, so that it can become a variable
COLOURS = {
    "ink": "#24292f",
    "faint": "#c9ced4",
    "train": "#0072b2",
    "held": "#d55e00",
    "para": "#7d8590",
    "early": "#56b4e9",
    "fit": "#e69f00",
    "grok": "#009e73",
    "post": "#cc79a7",
    "fit_scaled": "#8c6d1f",
    "fit_normed": "#a8933c",
    "easy": "#56646e",
    "sam": "#b15928",
    "spline": "#4b5ea8",
    "twin": "#a3305e",
    "other": "#6e5494",
}
MARKERS = {
    "early": "o", "fit": "s", "fit_scaled": "P", "fit_normed": "p", "grok": "D", "post": "^",
    "easy": "v", "sam": "X", "spline": "h", "twin": "<",
}  # fmt: skip
CURVES = {"train_acc": "train", "held_out_acc": "held", "para_acc": "para"}  # its colour
WIDTH, WIDE = 4.6, 8.2  # inches at 72 units
FONT = 10.5


class Bar(NamedTuple):
    """A line of a forest plot: an estimate with its interval, or what there is to say in place of one."""

    label: str
    mean: float | None
    lo: float | None
    hi: float | None
    role: str
    said: str = ""


def forest(groups: Sequence[tuple[str, Sequence[Bar]]], bound: float, axis: str) -> str:
    """Return an SVG of differences with their intervals, a heading a group, the band of what counts as none shaded.

    Args:
        groups: heading -> its lines; a line's `role` is its colour.
        bound: half the width of the band.
        axis: what is measured.
    """
    n = sum(1 + len(bars) for _, bars in groups)
    with figure(1.0 + 0.25 * n, WIDE) as (fig, ax):
        edges = [abs(v) for _, bars in groups for b in bars for v in (b.lo, b.hi) if v is not None]
        if edges:
            ax.axvspan(-bound, bound, color=COLOURS["faint"], alpha=0.45, lw=0)
            ax.axvline(0, color=COLOURS["ink"], lw=0.9)
        else:
            ax.set_xticks([])  # nothing was measured: no number stands on the axis
        y, ticks = 0, list[tuple[int, str]]()
        for heading, bars in groups:
            ticks.append((y, heading))
            for bar in bars:
                y += 1
                ticks.append((y, "\u2003" + bar.label))
                if bar.mean is None or bar.lo is None or bar.hi is None:
                    ax.text(0, y, f" {bar.said}", va="center", fontsize=FONT - 1.5, color=COLOURS["para"])
                    continue
                ax.plot([bar.lo, bar.hi], [y, y], color=COLOURS[bar.role], lw=2.2, solid_capstyle="round")
                ax.plot(bar.mean, y, "o", color=COLOURS[bar.role], ms=6)
            y += 1
        ax.set_yticks([at for at, _ in ticks], [text for _, text in ticks], ha="left")
        ax.tick_params(axis="y", length=0, pad=150)
        ax.set_ylim(y - 0.3, -0.7)
        most = 1.08 * max([2 * bound, *edges]) or 1.0
        ax.set_xlim(-most, most)
        ax.set_xlabel(axis)
        ax.spines["left"].set_visible(False)
        return as_svg(fig, "forest", f"{axis}: {listed([heading for heading, _ in groups])}")


def standalone(svg: str) -> bytes:
    """Return a figure as a file of its own: light colours, a white page and a font, which the page gives it else."""
    for role, colour in COLOURS.items():
        svg = svg.replace(f"var(--{role}, {colour})", colour)
    box = re.search(r'viewBox="([-\d. ]+)"', svg)
    _, _, width, height = box[1].split() if box else ("0", "0", "100%", "100%")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
    page = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return (re.sub(r">", lambda m: f">{page}", svg.replace("<svg ", head, 1), count=1) + "\n").encode()


def with_ids(svg: str, prefix: str) -> str:
    """Return a figure whose ids begin with a prefix, so that several can stand on one page."""
    prefix = re.sub(r"\W", "-", prefix)
    svg = re.sub(r' id="', f' id="{prefix}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def described(svg: str) -> str:
    """Return what a figure shows, in words."""
    label = re.search(r'aria-label="([^"]*)"', svg)
    return html.unescape(label[1]) if label else ""


def training_curves(runs: Sequence[GrokRun]) -> dict[str, str]:
    """Return run name -> SVG: accuracies over steps (log axis), the checkpoints marked, gold's own curve paler."""
    shown = ((run or gold, run, gold) for run, gold in paired([run for run in runs if _series(run, "train_acc")]))
    return {named.name: _curve_panel(named, run, gold) for named, run, gold in shown if named is not None}


def frontiers(comparison: Comparison) -> dict[str, str]:
    """Return method -> SVG: forget probability against retain accuracy along unlearning, one thin line per seed."""
    methods, _ = axes(comparison)
    panels = {}
    for method in methods:
        runs = [o for o in comparison.outcomes if o.method == method and _path(o)]
        if runs:
            panels[method] = _frontier_panel(comparison, method, runs)
    return panels


def updates_to_target(comparison: Comparison) -> str | None:
    """Return an SVG with the updates to gold's forget probability, a dot per seed; runs that never got there are open
    triangles at their last update. None if no run had a target.
    """
    methods, checkpoints = axes(comparison)
    aimed = [o for o in comparison.outcomes if o.target is not None and o.trajectory]
    if not aimed:
        return None
    methods = tuple(m for m in methods if any(o.method == m for o in aimed))
    with figure(1.3 + 0.4 * len(methods)) as (fig, ax):
        step = 0.7 / max(len(checkpoints), 1)
        for row, method in enumerate(methods):
            for i, kind in enumerate(checkpoints):
                y = row + (i - (len(checkpoints) - 1) / 2) * step
                for o in (o for o in runs_of(comparison, method, kind) if o in aimed):
                    _reached(ax, o, y, colour_of(kind))
        ax.set_yticks(range(len(methods)), methods)
        ax.set_ylim(len(methods) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.margins(x=0.06)
        ax.grid(axis="x", color=COLOURS["faint"], linewidth=0.6)
        ax.set_xlabel("updates to gold's forget probability")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        handles = [key(colour_of(kind), MARKERS.get(kind, "o"), kind) for kind in checkpoints]
        handles.append(key(COLOURS["ink"], ">", "not within the budget", hollow=True))
        legend_below(fig, handles)
        return as_svg(fig, "updates", f"Updates to target of {listed(methods)}")


def _curve_panel(marked: GrokRun, run: GrokRun | None, gold: GrokRun | None) -> str:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    labels = words_of_training(marked.config).curves
    with figure(3.5) as (fig, ax):
        handles: list[Any] = []
        for source, light in ((gold, run is not None), (run, False)):
            for key, role in CURVES.items():
                line = _series(source, key) if source is not None else []
                if not line or (light and role == "para"):
                    continue
                style = {
                    "color": COLOURS[role],
                    "alpha": 0.35 if light else 1.0,
                    "lw": 1.4 if light or role == "para" else 2.0,
                }
                (drawn,) = ax.plot(*zip(*line, strict=True), ls=(0, (4, 2)) if role == "para" else "-", **style)
                if not light:
                    drawn.set_label(labels.get(key, key))
                    handles.append(drawn)
        if run is not None and gold is not None:
            handles.append(ax.plot([], [], color=COLOURS["para"], alpha=0.5, lw=1.4, label="gold (paler)")[0])
        ax.set_xscale("log")
        for i, (kind, step) in enumerate(sorted(marked.marks.items(), key=lambda item: item[1])):
            ax.axvline(step, color=COLOURS["ink"], lw=0.9, ls=(0, (1, 2)))
            # neighbours on a log axis may be a few pixels apart: names alternate between two lines
            ax.text(
                step,
                1.03 + 0.075 * (i % 2),
                kind,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=FONT - 0.5,
            )
        ax.set_ylim(-0.02, 1.04)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x / 1000:g}k"))
        ax.set_xlabel("training steps (log)")
        ax.set_ylabel("accuracy")
        ax.grid(axis="y", color=COLOURS["faint"], linewidth=0.6)
        legend_below(fig, handles)
        marks = listed([f"{kind} at {step}" for kind, step in marked.marks.items()]) or "none"
        return as_svg(fig, f"curve-{marked.name}", f"Training curve of {marked.name}; checkpoints: {marks}")


def _frontier_panel(comparison: Comparison, method: str, runs: Sequence[Outcome]) -> str:
    kinds = [k for k in axes(comparison)[1] if any(o.checkpoint == k for o in runs)]
    with figure(3.5) as (fig, ax):
        for kind in kinds:
            colour, mark = colour_of(kind), MARKERS.get(kind, "o")
            for o in (o for o in runs if o.checkpoint == kind):
                x, y = zip(*_path(o), strict=True)
                ax.plot(x, y, color=colour, lw=1.3, alpha=0.85, zorder=2)
                ax.plot(x[0], y[0], mark, mfc="none", mec=colour, ms=6, zorder=3)
                ax.plot(*_end(o), mark, color=colour, ms=6, zorder=3)
            gx = reference(comparison.outcomes, kind, "forget_Q_A_Prob", "gold").mean
            gy = reference(comparison.outcomes, kind, "retain_acc", "gold").mean
            if gx is not None and gy is not None:
                ax.plot(gx, gy, "*", color=colour, mec=COLOURS["ink"], mew=0.7, ms=13, zorder=4, clip_on=False)
        ax.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.06), xlabel="forget probability", ylabel="retain accuracy")
        ax.grid(color=COLOURS["faint"], linewidth=0.6)
        handles = [key(colour_of(kind), MARKERS.get(kind, "o"), kind) for kind in kinds]
        handles.append(key(COLOURS["ink"], "o", "do nothing", hollow=True))
        handles.append(key(COLOURS["ink"], "*", "gold", size=10))
        legend_below(fig, handles)
        return as_svg(fig, f"frontier-{method}", f"Forgetting against keeping with {method} from {listed(kinds)}")


def _reached(ax: Any, outcome: Outcome, y: float, colour: str) -> None:
    at = outcome.at_target()
    if at is not None:
        ax.plot(at["step"], y, MARKERS.get(outcome.checkpoint, "o"), color=colour, ms=6, alpha=0.9, clip_on=False)
    else:
        ax.plot(outcome.trajectory[-1]["step"], y, ">", mfc="none", mec=colour, mew=1.3, ms=7, clip_on=False)


def _series(run: GrokRun, key: str) -> list[tuple[float, float]]:
    points = ((line.get("step"), line.get(key)) for line in run.curve)
    return [(step, value) for step, value in points if step and value is not None]


def _path(outcome: Outcome) -> list[tuple[float, float]]:
    points = ((line.get("forget_prob"), line.get("retain_acc")) for line in outcome.trajectory)
    return [(x, y) for x, y in points if x is not None and y is not None]


def _end(outcome: Outcome) -> tuple[float, float]:
    """Where the model that was kept stands: it need not be the last of the trajectory."""
    x, y = (outcome.metrics.get(name, {}).get("value") for name in ("forget_Q_A_Prob", "retain_acc"))
    return _path(outcome)[-1] if x is None or y is None else (x, y)


def colour_of(kind: str) -> str:
    """Return a checkpoint's colour."""
    return COLOURS[kind if kind in ORDER else "other"]


def key(colour: str, marker: str, label: str, *, hollow: bool = False, size: float = 6) -> Any:
    """Return an entry of a legend: a marker without a line."""
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], ls="none", marker=marker, mfc=face, mec=colour, ms=size, label=label)


def legend_below(fig: Any, handles: Iterable[Any]) -> None:
    """Put a legend of two columns below a figure."""
    fig.legend(
        handles=list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=FONT - 0.5,
        handlelength=1.4, handletextpad=0.5, columnspacing=1.4, borderpad=0, borderaxespad=0.2,
        labelcolor=COLOURS["ink"],
    )  # fmt: skip


@contextmanager
def figure(height: float, width: float = WIDTH):
    """An empty panel in our style. No pyplot: nothing global is touched and no window can open."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = COLOURS["ink"]
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "llm-unlearn", "font.family": "sans-serif", "font.size": FONT,
        "text.parse_math": False, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
        "ytick.color": ink, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        "axes.axisbelow": True, "xtick.major.size": 3, "ytick.major.size": 3,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(fig)
        yield fig, fig.add_subplot(facecolor="none")


def as_svg(fig: Any, name: str, description: str) -> str:
    """Return an SVG element fit for putting into a page: no prolog, no metadata, no size, names of its own."""
    out = io.StringIO()
    fig.savefig(
        out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # safe although made by pattern: every text in a figure is escaped by the writer, so none can look like a tag
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = with_ids(text, name)
    for role, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{role}, {colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    label = html.escape(description, quote=True)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{label}" stroke-linejoin="round" class="plot">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).replace("xlink:href", "href").strip()
