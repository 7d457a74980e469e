"""Which probe predicts the outcome, as a grid."""

from __future__ import annotations

from collections.abc import Sequence

from llm_unlearn.eval.predictors import Predicted
from llm_unlearn.report.grid import Grid, Row
from llm_unlearn.report.text import DASH, counted, p_value
from llm_unlearn.stats import Interval

NOTES = (
    "rank: Spearman's correlation over checkpoints within a seed, mean over seeds. R2 left out: squared error that the "
    "probe takes off a prediction that does not know the checkpoint, in seeds it was not fitted on; below 0 it is "
    "worse than none.",
    "beyond the checkpoint: the same off a prediction that knows which checkpoint it is. Only this says that a probe "
    "is more than another name for how long was trained. 95 % intervals over seeds; p by flipping signs of seeds.",
)


def predictor_grid(outcome: str, lines: Sequence[Predicted], alpha: float = 0.05) -> Grid:
    """Return the table of what predicts `outcome` (its name as shown)."""
    rows = [
        Row(
            (
                line.probe,
                _interval(line.rank),
                p_value(line.p_holm),
                _interval(line.r2),
                _interval(line.beyond_kind),
                p_value(line.p_beyond_holm),
                f"{line.seeds} / {line.cells}",
            )
        )
        for line in lines
    ]
    sure = [line.probe for line in lines if line.p_beyond_holm <= alpha and line.beyond_kind.lo > 0]
    least = min((2 ** (1 - line.seeds) for line in lines if line.seeds), default=0.0)
    best = min(1.0, len(lines) * least)
    floor = () if best <= alpha else (
        f"Flipping the signs of so few seeds gives p = {least:.3g} at the least, {best:.3g} after Holm: none of so "
        "many lines can be told from chance here.",
    )  # fmt: skip
    said = f"More than the checkpoint's name: {', '.join(sure)}." if sure else (
        f"None of {counted(len(lines), 'probe')} is shown to be more than the checkpoint's name."
    )  # fmt: skip
    columns = ("probe", "rank", "p (Holm)", "R2 left out", "beyond the checkpoint", "p beyond (Holm)", "seeds / cells")
    return Grid(
        f"What predicts: {outcome}",
        columns,
        tuple(rows),
        (said, *floor, *NOTES),
    )


def _interval(x: Interval) -> str:
    return DASH if x.mean != x.mean else f"{x.mean:+.2f} [{x.lo:+.2f}, {x.hi:+.2f}]"
