"""From a model to its results: score it, compute a suite's metrics, and set them beside gold and doing nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.splits import Request, eval_splits
from llm_unlearn.data.tokenise import FormatName
from llm_unlearn.errors import UserError
from llm_unlearn.eval.compute import Line, compute, values
from llm_unlearn.eval.lm_eval import Harness, measure, open_tasks
from llm_unlearn.eval.metrics.base import Record
from llm_unlearn.eval.metrics.collapse import signs_of_collapse
from llm_unlearn.eval.metrics.table import METRICS
from llm_unlearn.eval.pairs import score_pairs
from llm_unlearn.eval.peer_log import PeerLog, write_log
from llm_unlearn.eval.score import PEER_LOG, RESULTS, ModelScores, score_model
from llm_unlearn.eval.shards import join_shard
from llm_unlearn.eval.sources import RecordSource, Source, check_same_rows
from llm_unlearn.eval.suite import Suite
from llm_unlearn.files import read_json, sha256_file, write_atomic
from llm_unlearn.log import get_logger
from llm_unlearn.models.pretrained import absolute_reference, load_tokenizer, split_reference

log = get_logger(__name__)
SCHEMA_VERSION = 1
SHOWN = (3, 6)  # answers kept for showing, of forgotten and of kept items: to questions, to images


def evaluate(
    reference: str,
    suite: Suite,
    corpus: Corpus,
    request: Request,
    *,
    fmt: FormatName = "auto",
    gold: str | None = None,
    start: str | None = None,
    out: Path | None = None,
    run: Mapping[str, Any] | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
    others: Mapping[str, Line] | None = None,
) -> dict[str, Any]:
    """Evaluate a model; set each number beside gold's and beside the start model's (doing nothing), and write
    `results.json` and, but for a benchmark of given splits, OpenUnlearning's `TOFU_EVAL.json`.

    Args:
        reference: the model: folder, run@kind or hub name.
        gold: the model retrained without the forget set, or OpenUnlearning's log of one (a .json file); None takes the
            one these results were last judged by, and metrics against it are null when there was none.
        start: the model unlearning began from.
        out: folder for results and records; default beside the model.
        run: facts about the run (method, checkpoint, seed ...) that go into the results as they are.
        others: lines measured otherwise (attacks), which stand beside the suite's in these results.
        lm_eval: tasks of lm-evaluation-harness to run on every model; their versions go into the results' identity.
        lm_eval_include: folder with lm-eval task files of one's own.

    Returns the content of `results.json`; {} in all but the first of several processes. Raises UserError for what
    cannot be loaded or found.
    """
    shard = join_shard()
    if lm_eval and shard.size > 1:
        raise UserError("--lm-eval runs in one process; call it again without the launcher, scores are kept")
    suite = suite.on(eval_splits(corpus, request))
    _check_wrong_answers(suite, eval_splits(corpus, request))
    harness = open_tasks(reference, lm_eval, lm_eval_include) if lm_eval else None  # mistakes show before hours of work
    ask = partial(score_model, suite=suite, corpus=corpus, request=request, fmt=fmt, shard=shard)
    if gold is not None:
        _open_gold(gold, eval_splits(corpus, request))
    scores = {"model": ask(reference, out=out)}
    gold = gold or shard.gather(_last_gold(scores["model"]) if shard.main else None)[0]
    names = {"model": reference}
    if gold is not None and Path(gold).suffix != ".json":
        names["gold"] = gold
    if start is not None:
        names["start"] = start
    scores |= {label: ask(name) for label, name in names.items() if label != "model"}
    sources = {label: RecordSource(its.records, _label(label, names)) for label, its in scores.items()}
    if "gold" in names:
        for label, source in sources.items():
            both = (names[label], names["gold"]), (scores[label], scores["gold"])
            source.add(score_pairs(*both, suite, corpus, request, fmt, shard))
    if not shard.main:
        return {}
    metrics = _beside(suite, sources, PeerLog(Path(gold)) if gold and "gold" not in names else sources.get("gold"))
    identity = scores["model"].identity
    numbers = {name: line["value"] for name, line in metrics.items()}
    metrics |= others or {}
    if harness is not None:
        rest = {label: open_tasks(names[label], lm_eval, lm_eval_include) for label in names if label != "model"}
        metrics |= _general({"model": harness, **rest}, scores, shard.device)
        identity = {**identity, "lm_eval": harness.versions}
    told = {"after" if label == "model" else label: its.records for label, its in scores.items()}
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": absolute_reference(reference),
        "suite": suite.config.name,
        "data": corpus.kind,
        "reference": gold and absolute_reference(gold),
        "reference_identity": _identity_of(gold, scores.get("gold")),
        "run": dict(run or {}),
        "metrics": metrics,
        "identity": identity,
        "cost": scores["model"].cost,
        "collapse": signs_of_collapse(told["after"], told.get("gold") or told.get("start")),
        "answers": {label: _answers(records, SHOWN[corpus.kind == "image"]) for label, records in told.items()},
    }
    folder = scores["model"].folder
    write_atomic(folder / RESULTS, (json.dumps(result, indent=1) + "\n").encode())
    if not corpus.given and corpus.kind != "image":  # the log is of TOFU's splits
        write_log(folder / PEER_LOG, told["after"], numbers)
    return {**result, "folder": str(folder)}


def _check_wrong_answers(suite: Suite, rows: Mapping[str, Sequence[QARow]]) -> None:
    """Refuse, before a model is run, rows without the wrong answers that a metric of the suite cannot do without."""
    if {entry.split for entry in suite.config.metrics.values() if entry.split} - rows.keys():
        return  # data for another suite: scoring says so
    for name, entry in suite.config.metrics.items():
        metric = METRICS[entry.metric]
        if metric.kind != "item" or "perturbed" not in metric.needs or metric.name == "probability_paraphrase":
            continue
        for i, row in enumerate(rows.get(entry.split, ())):
            if not row.perturbed_answer:
                raise UserError(
                    f"{name}: row {i + 1} of '{entry.split}' has no perturbed answers, which {metric.name} reads; "
                    "choose another suite, or data that has them"
                )


def _label(label: str, names: Mapping[str, str]) -> str:
    return "the model" if label == "model" else names[label]


def _beside(suite: Suite, sources: Mapping[str, Source], gold: Source | None) -> dict[str, Line]:
    """Lines of the model's numbers, gold's and the start model's beside them."""
    metrics = compute(suite, sources["model"], gold)
    others = {"gold": gold, "start": sources.get("start")}
    for label, source in others.items():
        for name, value in values(suite, source, gold).items() if source is not None else ():
            metrics[name][label] = value
    return metrics


def _identity_of(gold: str | None, scores: ModelScores | None) -> str | None:
    """Hash of what judged: gold's weights, or the log."""
    if scores is not None:
        return scores.identity["model"]
    return None if gold is None else sha256_file(Path(gold))


class _Asked:
    """The rows a model is asked, before it is."""

    label = "the model"

    def __init__(self, splits: Mapping[str, Sequence[QARow]]) -> None:
        self.splits = splits

    def answers(self, split: str) -> list[str]:
        return [row.answer for row in self.splits[split]]


def _open_gold(gold: str, splits: Mapping[str, Sequence[QARow]]) -> None:
    """Find out what is wrong with gold before hours of work."""
    if Path(gold).suffix != ".json":
        load_tokenizer(gold)
        return
    peer = PeerLog(Path(gold))
    if "forget" in splits:
        check_same_rows(_Asked(splits), peer, "forget")
    log.warning("reference %s: does not say of which model it is, taken at your word", gold)


def _last_gold(scored: ModelScores) -> str | None:
    path = scored.folder / RESULTS
    last = read_json(path) if path.exists() else {}
    if not isinstance(last, dict) or not isinstance(known := last.get("identity"), dict) or not last.get("reference"):
        return None
    if {name: value for name, value in known.items() if name != "lm_eval"} != scored.identity:
        return None
    if not Path(split_reference(last["reference"])[0]).exists():
        log.warning("reference: %s of the last evaluation is gone; give another with --reference", last["reference"])
        return None
    log.info("reference: %s, as in the last evaluation", last["reference"])
    return last["reference"]


def _general(opened: Mapping[str, Harness], models: Mapping[str, ModelScores], device: str) -> dict[str, Line]:
    """Lines of lm-eval's numbers for the model, gold's and the start model's beside them."""
    measured = {label: measure(harness, models[label], device) for label, harness in opened.items()}
    metrics = measured.pop("model")
    for label, lines in measured.items():
        metrics = {name: {**line, label: lines[name]["value"]} for name, line in metrics.items()}
    return metrics


def _answers(records: Mapping[str, Sequence[Record]], n: int) -> list[dict[str, Any]]:
    """A few generated answers to forgotten and kept items, spread over the split: the screen people remember."""
    out = []
    for split in ("forget", "retain"):
        told = [r for r in records.get(split, ()) if r.generation is not None]
        for r in told[:: max(1, len(told) // n)][:n]:
            out.append(
                {
                    "split": split,
                    "question": r.question,
                    "answer": r.answer,
                    "generation": r.generation,
                    "probability": float(np.exp(r.scored.logp.mean())),
                }
            )
    return out
