"""The callback that watches a run grok: evaluates on schedule, keeps the weights that may still become a kind, and
publishes the kinds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.data.tokenise import Item
from llm_unlearn.eval.scoring import padded_tokens, score_answers
from llm_unlearn.grok.config import WatchConfig
from llm_unlearn.grok.detector import (
    PRESETS,
    FactTimes,
    Point,
    Report,
    detect,
    kinds,
    needed_snapshots,
    normalise,
    per_fact,
)
from llm_unlearn.grok.facts import CLASSES
from llm_unlearn.grok.schedule import eval_steps
from llm_unlearn.log import JsonlLog, get_logger
from llm_unlearn.train.checkpoint import rotate, step_dir, verify
from llm_unlearn.train.engine import whole_weights
from llm_unlearn.train.loop import Run
from llm_unlearn.train.snapshot import copy_model, save_model

log = get_logger(__name__)
NOT_ASKED = "not asked"


@dataclass(frozen=True)
class Probe:
    """A split as the watch reads it: encoded items, the accuracy a guess would have, and by item the stored facts that
    it tests: in `train` the one it states, elsewhere all that its answer needs; () if it tests none.
    """

    items: Sequence[Item]
    chance: float
    facts: Sequence[tuple[str, ...]]


class GrokWatch:
    """Evaluates at log-spaced steps and ends the run after the kind asked for.

    `probes["train"]` and `probes["held_out"]` make the detector's curve; further probes are logged. Weights of the
    evaluations that may still become a kind lie in `snapshots/` (a handful at any time); a decided kind becomes a
    folder of that name.
    """

    def __init__(
        self,
        config: WatchConfig,
        max_steps: int,
        probes: Mapping[str, Probe],
        out: Path,
        tokenizer: Any,
        origin: Mapping[str, Any],
    ) -> None:
        self.config, self.probes, self.out, self.tokenizer, self.origin = config, probes, out, tokenizer, dict(origin)
        self.thresholds = PRESETS[config.thresholds]
        self.due = set(eval_steps(max_steps, config.ratio, config.first, config.first))
        self.curve: list[Point] = []
        self.fact_ids = sorted({fact for facts in probes["train"].facts for fact in facts})
        in_probes = {fact for facts in probes["held_out"].facts for fact in facts}
        self.asked = np.array([fact in in_probes for fact in self.fact_ids], dtype=bool)
        self.trained: list[np.ndarray] = []
        self.inferred: list[np.ndarray] = []
        self.tokens, self.seconds = 0, 0.0
        self.journal: JsonlLog | None = None

    @property
    def report(self) -> Report:
        """The detector's view of the curve so far."""
        return detect(self.curve, self.thresholds)

    def __call__(self, run: Run) -> None:
        """Evaluate if it is time; publish decided kinds; stop the run once the last kind asked for is there."""
        if run.step not in self.due or (self.curve and run.step <= self.curve[-1].step):
            return
        self._evaluate(run)
        report = self.report
        with whole_weights(run):
            if run.accelerator.is_main_process:
                save_model(step_dir(self.snapshots, run.step), run.lm, self.tokenizer, {"step": run.step})
        if run.accelerator.is_main_process:
            rotate(self.snapshots, needed_snapshots(self.curve, self.thresholds))
            self._publish(kinds(report), final=report.stable_at is not None)
        run.accelerator.wait_for_everyone()
        if self.config.until != "max_steps" and self.config.until in kinds(report):
            run.stop_reason = f"reached {self.config.until}"

    def finish(self) -> Report:
        """Publish what is decided at the end, write the per-fact answers and times, and return the report. Main process
        only.

        `facts.npz` holds, of E evaluations and F stored facts: `steps` (E,), `facts` (F,) ids, `trained` and `inferred`
        (E, F) whether a fact's own question and all its held-out ones were right, `asked` (F,) whether there are any,
        and `t_fit`, `t_gen`, `classes` (F,) of `fact_times`.
        """
        report, times = self.report, self.fact_times()
        self._publish(kinds(report), final=True)
        np.savez_compressed(
            self.out / "facts.npz",
            steps=[p.step for p in self.curve],
            facts=np.array(self.fact_ids, dtype=np.str_),
            trained=self._over_time(self.trained),
            inferred=self._over_time(self.inferred),
            asked=self.asked,
            t_fit=times.t_fit,
            t_gen=times.t_gen,
            classes=times.classes,
        )
        return report

    def fact_times(self) -> FactTimes:
        """Return when each fact was fitted and when it generalised; a fact without a held-out question is of class
        "not asked".
        """
        times = per_fact([p.step for p in self.curve], self._over_time(self.trained), self._over_time(self.inferred))
        return replace(times, classes=np.where(self.asked, times.classes, NOT_ASKED))

    def fact_counts(self) -> dict[str, int]:
        """Return how many facts are of each class."""
        classes = self.fact_times().classes
        return {name: int((classes == name).sum()) for name in (*CLASSES, NOT_ASKED)}

    @property
    def snapshots(self) -> Path:
        """Folder of the weights that may still become a kind."""
        return self.out / "snapshots"

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far and the per-fact answers."""
        return {
            "curve": [asdict(p) for p in self.curve],
            "trained": self.trained,
            "inferred": self.inferred,
            "cost": (self.tokens, self.seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`; evaluations after it will be made, and written, again."""
        self.curve = [Point(**p) for p in state["curve"]]
        self.trained, self.inferred = list(state["trained"]), list(state["inferred"])
        self.tokens, self.seconds = state["cost"]

    def _evaluate(self, run: Run) -> None:
        line: dict[str, Any] = {"step": run.step}
        right: dict[str, np.ndarray] = {}
        started = time.perf_counter()
        with run.interruptible():
            scores = {name: score_answers(run.answer_model, probe.items) for name, probe in self.probes.items()}
        for name, scored in scores.items():
            right[name] = np.array([s.hit.all() for s in scored])
            line[f"{name}_acc"] = float(right[name].mean())
            line[f"{name}_loss"] = -float(np.concatenate([s.logp for s in scored]).mean())
            self.tokens += padded_tokens(self.probes[name].items)
        self.seconds += time.perf_counter() - started
        held_out = normalise(line["held_out_acc"], self.probes["held_out"].chance)
        self.curve.append(Point(run.step, line["train_acc"], held_out, line["train_loss"], line["held_out_loss"]))
        self.trained.append(self._fact_answers("train", right["train"]))
        self.inferred.append(self._fact_answers("held_out", right["held_out"]))
        with whole_weights(run):
            norm = float(sum(p.detach().float().pow(2).sum() for p in run.lm.parameters()) ** 0.5)
        if run.accelerator.is_main_process:
            if self.journal is None:
                self.journal = JsonlLog(self.out / "curve.jsonl", keep=lambda old: old["step"] < run.step)
            self.journal.write({**line, "weight_norm": norm, "seconds": run.seconds})
            log.debug("step %d train %.3f held-out %.3f", run.step, line["train_acc"], line["held_out_acc"])

    def _fact_answers(self, probe: str, right: np.ndarray) -> np.ndarray:
        """Whether every probe item that tests a fact is right, per fact; a fact without such an item is false."""
        place = {fact: i for i, fact in enumerate(self.fact_ids)}
        wrong, tested = np.zeros(len(place), dtype=bool), np.zeros(len(place), dtype=bool)
        for facts, ok in zip(self.probes[probe].facts, right, strict=True):
            for fact in facts:
                if fact in place:
                    tested[place[fact]] = True
                    wrong[place[fact]] |= not ok
        return tested & ~wrong

    def _over_time(self, answers: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(answers, dtype=bool).reshape(len(self.curve), len(self.fact_ids))

    def _publish(self, found: Mapping[str, int], *, final: bool) -> None:
        for kind, step in found.items():
            if kind == "early" and not final:
                continue  # it may move until the jump
            folder = self.out / kind
            if folder.exists() and verify(folder)["step"] == step:
                continue
            copy_model(step_dir(self.snapshots, step), folder, {**self.origin, "kind": kind, "step": step})
            log.info("checkpoint %s: step %d", kind, step)
