"""Watching an unlearning run: a small fixed evaluation every few updates, the rules that stop it, and the rule for the
step that is kept. The rules are functions of the trajectory alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_unlearn.data.tokenise import Item
from llm_unlearn.errors import Diverged
from llm_unlearn.eval.scoring import padded_tokens, quick_scores
from llm_unlearn.log import JsonlLog, get_logger
from llm_unlearn.train.engine import put_weights, trained_weights
from llm_unlearn.train.loop import Run
from llm_unlearn.unlearn.config import StopConfig

log = get_logger(__name__)
Line = Mapping[str, float]
WORD_FOR_WORD = 0.5  # share of retain answers the start has right from which accuracy is what is kept


@dataclass(frozen=True)
class Level:
    """What counts as forgotten.

    Attributes:
        target: level to come down to: forget probability (mean length-normalised probability of the forget answers),
            or with `by` = "acc" forget accuracy.
        source: where it is from: "given", "gold", "never seen" or "start".
        logp: mean log-probability of an answer token, in nats, of a model that does not know them; None if unknown.
        unseen_logp: that of the start model on items like the forgotten ones that it was never trained on (split
            holdout, of images with a validation split val_holdout); None where there are none.
    """

    target: float
    source: str
    logp: float | None = None
    unseen_logp: float | None = None
    by: Literal["prob", "acc"] = "prob"

    def of(self, line: Line) -> float:
        """Return what an evaluation says of the forgotten, to be held against the target."""
        return line[f"forget_{self.by}"]


def kept(line: Line, start: Line) -> float:
    """Return what a step kept, from 0 to 1: retain accuracy, or retain probability where the start answers less than
    half of the items word for word; 1 without a retain set.
    """
    return line.get("retain_acc" if start.get("retain_acc", 0) >= WORD_FOR_WORD else "retain_prob", 1.0)


def left(line: Line, start: Line) -> float:
    """Return the share of what the start had that a step kept."""
    return kept(line, start) / kept(start, start) if kept(start, start) > 0 else 1.0


def over_forgotten(line: Line, start: Line, level: Level, nats: float | None) -> bool:
    """Return whether the forgotten stands out by how unlikely it is: its answers' mean log-probability per token lies
    below gold's by more than `nats`, and further than doing nothing lies above it.

    The second bound: such a step is further from gold than doing nothing. The first keeps a start that hardly differs
    from gold from raising alarms over nothing. Log-probabilities, since probabilities end at 0 and gold's may be close
    to it. Never true without a level to compare with.
    """
    if nats is None or level.logp is None:
        return False
    return level.logp + line["forget_loss"] > max(nats, -start["forget_loss"] - level.logp)


def keep_rank(line: Line, start: Line, level: Level, stop: StopConfig) -> tuple[bool, bool, bool, float]:
    """Return what the kept step has most of, in this order: above the floor, at the target, not over-forgotten, and
    what was kept less what the forget probability lies above the target.
    """
    enough = left(line, start) >= max(stop.floor or 0.0, stop.collapse or 0.0)
    score = kept(line, start) - max(0.0, level.of(line) - level.target)
    forgotten = level.of(line) <= level.target
    return enough, forgotten, not over_forgotten(line, start, level, stop.over_forget), score


def stop_reason(line: Line, start: Line, level: Level, stop: StopConfig) -> str | None:
    """Return why to stop after a step, None to go on.

    "collapse" comes before "floor", which comes before "target". Teacher-forced scores are enough to see a collapse: a
    model that says nothing, or the same to everything, has next to none of the kept answers' tokens right.
    """
    share = left(line, start)
    if stop.collapse is not None and share < stop.collapse:
        return "collapse"
    if stop.floor is not None and share < stop.floor:
        return "floor"
    if stop.until == "target" and level.of(line) <= level.target:
        return "target"
    return None


class UnlearnWatch:
    """Evaluates `splits` every `stop.every` updates (and before the first), writes `trajectory.jsonl`, stops the run,
    keeps the best step.

    `alarms` names what was found, each with the step it was first found at; `tokens` (padding included) and `seconds`
    are what evaluating took.
    """

    def __init__(self, stop: StopConfig, splits: Mapping[str, Sequence[Item]], level: Level, out: Path | None) -> None:
        self.stop, self.splits, self.level, self.out = stop, splits, level, out
        self.lines: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.best_step = 0
        self.alarms: dict[str, int] = {}
        self.tokens, self.seconds = 0, 0.0
        self.journal: JsonlLog | None = None

    def __call__(self, run: Run) -> None:
        """Evaluate if it is time, remember the weights if they are the best so far, and stop the run if a rule says so.

        Scores that are not finite stop it ("diverged") where an earlier step can be kept; else Diverged is raised.
        """
        due = run.step % self.stop.every == 0 or run.step == run.max_steps
        if not due or (self.lines and run.step <= self.lines[-1]["step"]):
            return
        try:
            line = self._evaluate(run)
        except Diverged as error:
            if not self.has_result():
                raise
            log.warning("step %d: %s", run.step, error)
            run.stop_reason = "diverged"
            return
        self.lines.append(line)
        if run.accelerator.is_main_process and self.out is not None:
            if self.journal is None:
                self.journal = JsonlLog(self.out / "trajectory.jsonl", keep=lambda old: old["step"] < run.step)
            self.journal.write(line)
        if run.step == 0:
            return  # the start model: keeping it would call doing nothing unlearning
        self._raise_alarms(line)
        if self.stop.keep == "best" and self._improves(line):
            self.best_step = run.step
            self.best = {name: value.detach().cpu().clone() for name, value in trained_weights(run).items()}
        run.stop_reason = stop_reason(line, self.lines[0], self.level, self.stop) or run.stop_reason

    def has_result(self) -> bool:
        """Return whether a run that ends now has a step to keep that was evaluated."""
        return self.best is not None

    def keep_best(self, run: Run) -> int:
        """Put the kept step's weights into the model and return that step."""
        if self.best is None:
            return run.step
        put_weights(run, self.best)
        return self.best_step

    def line(self, step: int) -> Line | None:
        """Return the evaluation of a step, None if there was none."""
        return next((line for line in self.lines if line["step"] == step), None)

    def told(self, step: int) -> str:
        """Return what became of the forgotten and the kept, in words."""
        start, line = self.line(0), self.line(step)
        if start is None or line is None:
            return "not evaluated"
        what = "probability" if self.level.by == "prob" else "accuracy"
        parts = [f"forget {what} {self.level.of(start):.2f} -> {self.level.of(line):.2f} (target "]
        parts.append(f"{self.level.target:.2f}), retain accuracy ")
        if "retain_acc" not in line:
            return "".join(parts[:1]) + f"{self.level.target:.2f})"
        return "".join(parts) + f"{start['retain_acc']:.2f} -> {line['retain_acc']:.2f}"

    def faults(self, step: int) -> list[str]:
        """Return what is wrong with an evaluated step, in the words of `alarms`."""
        line = self.line(step)
        if line is None or step == 0:
            return []
        enough, _, near, _ = keep_rank(line, self.lines[0], self.level, self.stop)
        collapsed = self.stop.collapse is not None and left(line, self.lines[0]) < self.stop.collapse
        found = {"collapsed": collapsed, "below_floor": not enough, "over_forgotten": not near}
        return [fault for fault, here in found.items() if here]

    def state_dict(self) -> dict[str, Any]:
        """Return the trajectory, the best weights so far, and what evaluating took."""
        names = ("lines", "best", "best_step", "alarms", "tokens", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        self.lines, self.alarms = list(state["lines"]), dict(state["alarms"])
        self.best, self.best_step = state["best"], state["best_step"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def _evaluate(self, run: Run) -> dict[str, float]:
        line: dict[str, float] = {"step": run.step}
        started = time.perf_counter()
        with run.interruptible():
            for name, items in self.splits.items():
                line[f"{name}_acc"], line[f"{name}_loss"], line[f"{name}_prob"] = quick_scores(run.answer_model, items)
        self.tokens += sum(map(padded_tokens, self.splits.values()))
        self.seconds += time.perf_counter() - started
        if run.accelerator.num_processes > 1:
            # scores differ in the last bits from process to process, and all of them decide what is kept together
            from accelerate.utils import broadcast_object_list

            line = broadcast_object_list([line])[0]
        return line

    def _raise_alarms(self, line: dict[str, float]) -> None:
        for fault in self.faults(int(line["step"])):
            if fault not in self.alarms:
                self.alarms[fault] = int(line["step"])
                log.warning("step %d: %s", line["step"], WARNINGS[fault])

    def _improves(self, line: Line) -> bool:
        if self.best is None:
            return True
        start, best = self.lines[0], next(old for old in self.lines if old["step"] == self.best_step)
        return keep_rank(line, start, self.level, self.stop) > keep_rank(best, start, self.level, self.stop)


WARNINGS = {
    "collapsed": "the model has collapsed: next to nothing is left of what was to be kept",
    "below_floor": "less is left of what was to be kept than stop.floor; smaller steps keep more",
    "over_forgotten": "the forgotten answers are less likely than gold finds them by far, which gives them away too",
}
