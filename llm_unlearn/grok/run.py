"""One grokking run, from a config to a folder with its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.config import digest, flatten
from llm_unlearn.data.images import Classes, ImageRow
from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.shuffle import shuffle_inferred
from llm_unlearn.data.source import make_tokenizer, open_corpus
from llm_unlearn.data.splits import Request, draw_request, held_out, training_rows
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.grok.controls import LAST, publish_fit_scaled
from llm_unlearn.grok.grokfast import GrokfastEMA
from llm_unlearn.grok.normed import publish_fit_normed
from llm_unlearn.grok.orthogonality import Intervention, OrthogonalTask, unit_of
from llm_unlearn.grok.tasks import make_task
from llm_unlearn.grok.watch import GrokWatch, Probe
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.pretrained import build_model, check_vocabulary, load_model, load_tokenizer, read_origin
from llm_unlearn.seeding import rng, seed_everything
from llm_unlearn.train.cost import Meter, start_clock
from llm_unlearn.train.engine import whole_weights
from llm_unlearn.train.loop import join_world, train
from llm_unlearn.train.optimizer import check_optimizer
from llm_unlearn.train.origin import absolute_paths, run_origin
from llm_unlearn.train.snapshot import claim_output, finished, save_model, write_result
from llm_unlearn.train.whole import check_whole_gradients
from llm_unlearn.train.world import end_together

log = get_logger(__name__)


def train_grok(config: GrokConfig) -> dict[str, Any]:
    """Train until the kind `watch.until` is reached (or `loop.max_steps`); resume if the folder holds an unfinished
    run.

    The folder gets `config.yaml`, `curve.jsonl`, `train_log.jsonl`, one model folder per kind reached (`fit_scaled` and
    `fit_normed` beside `fit` and `grok`, `last` of a run until max_steps) and `run.json`, whose content is returned:
    the detector's report, how many facts grokked (see grok.facts), and cost. A finished run is not repeated. Raises
    UserError for anything the user can mend.
    """
    _check(config)
    out, config = Path(config.out), absolute_paths(config)
    if (done := finished(out, config, "grok")) is not None:
        return done
    corpus = open_corpus(config.data)
    request = draw_request(corpus, config.scenario)
    asked = [row for row in held_out(corpus) if config.exclude == "none" or not request.touches(row)]
    if not asked:
        raise UserError(
            f"'{corpus.name}' has no held-out questions or images, so nothing can grok; fit it with recipes/finetune.py"
        )
    started = start_clock()
    seed_everything(config.seed)
    tokenizer = (
        load_tokenizer(config.model.name) if config.model.name else make_tokenizer(corpus, config.data.vocab_size)
    )
    trained = corpus if config.shuffle == "none" else shuffle_inferred(corpus, config.data.seed)
    rows = training_rows(trained, request, config.exclude)
    items = encode_rows(tokenizer, rows, config.data.format, config.data.max_length)
    model = answer_model(build_model(config.model, tokenizer, config.seed))
    accelerator, place = join_world(config.loop, out)
    if config.sam is not None:
        check_whole_gradients("sam", "set sam=null", accelerator)
    if config.grokfast is not None:
        check_whole_gradients("grokfast", "set grokfast=null", accelerator)
    if config.orthogonality is not None:
        check_whole_gradients("orthogonality", "set orthogonality=null", accelerator)
    units = [unit_of(row) for row in rows]
    task = make_task(items, config, place, tokenizer.pad_token_id, model, _teacher(config, tokenizer), units)
    origin = run_origin(config, corpus, request)
    watch = GrokWatch(
        config.watch,
        config.loop.max_steps,
        _probes(config, corpus, request, rows, asked, tokenizer),
        out,
        tokenizer,
        origin,
    )
    claim_output(out, config, "grok")
    edits = [GrokfastEMA(config.grokfast.alpha, config.grokfast.lamb)] if config.grokfast else []
    meter = Meter(task.tokens, started)
    acts = [Intervention(task, watch)] if isinstance(task, OrthogonalTask) else []
    run = train(
        model,
        task,
        config.optim,
        config.loop,
        accelerator=accelerator,
        out=out,
        callbacks=[watch, meter, *acts],
        gradient_edits=edits,
        identity=digest({"config": config.model_dump(exclude={"out"}), "data": origin["data"]}),
        settings=flatten(config.model_dump()),
        label=f"train {out.name}",
    )
    report = watch.report
    with whole_weights(run):
        result = {
            "kind": "grok",
            "stop": run.stop_reason or "max_steps",
            "step": run.step,
            "report": asdict(report),
            "facts": watch.fact_counts(),
            **({"orthogonality_from": acts[0].begun} if acts else {}),
            "origin": origin,
            "train_items": len(items),
            "parameters": sum(p.numel() for p in run.lm.parameters()),
            "cost": meter.cost(run, watch),
        }
        if accelerator.is_main_process:
            watch.finish()
            publish_fit_scaled(out, run.answer_model, watch.probes["train"].items, tokenizer, origin)
            publish_fit_normed(out, run.answer_model, watch.probes["train"].items, tokenizer, origin)
            if config.watch.until == "max_steps" and all(act.begun is not None for act in acts):
                save_model(out / LAST, run.lm, tokenizer, {**origin, "kind": LAST, "step": run.step})
            write_result(out, result)
    log.info("%s: %s after %d steps (t_fit %s, t_gen %s)", out, report.phase, run.step, report.t_fit, report.t_gen)
    end_together(accelerator)
    return result


def _check(config: GrokConfig) -> None:
    check_optimizer(config)
    if config.model.lora is not None:
        raise UserError("model.lora: grokking trains all weights; leave it out, or fit with recipes/finetune.py")
    if config.distil is not None and config.spline is not None:
        raise UserError("distil and spline: a run has one of them; set one to null")
    if config.grokfast is not None and config.loop.precision == "fp16":
        raise UserError(
            "grokfast with loop.precision=fp16: fp16's gradients are scaled when grokfast reads them; choose bf16 or no"
        )


def _teacher(config: GrokConfig, tokenizer: Any) -> Any:
    """Return the model to learn from. Raises UserError for one of another vocabulary, and for one that has seen what
    this run is to leave out.
    """
    if config.distil is None:
        return None
    name = config.distil.teacher
    if config.exclude == "forget" and read_origin(name).get("exclude") != "forget":
        raise UserError(f"distil.teacher={name}: has seen the forget set, gold must not; give a gold model as teacher")
    teacher = answer_model(load_model(name, config.model.dtype))
    check_vocabulary(teacher.lm, tokenizer, name)
    if not isinstance(tokenizer, Classes) and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distil.teacher={name}: has another vocabulary; give a teacher trained with this run's tokenizer"
        )
    return teacher


def _probes(
    config: GrokConfig,
    corpus: Corpus,
    request: Request,
    rows: Sequence[QARow],
    asked: Sequence[QARow],
    tokenizer: Any,
) -> dict[str, Probe]:
    """Return the fixed items of every evaluation: one wording of each stored fact and a draw of the rows that ask for
    something else (two hops, inverses, neutral facts), and held-out rows.
    """
    direct = list({row.facts: row for row in rows if _is_stored_fact(row)}.values())
    others = [row for row in rows if not _is_stored_fact(row)]
    train = [*_draw(direct, config.watch.items // 2, config.seed), *_draw(others, config.watch.items // 2, config.seed)]
    chosen = {"train": train, "held_out": _draw(asked, config.watch.items, config.seed)}
    for name in ("para", "inf_ood", "inverse"):
        kept = [row for row in corpus.splits.get(name, ()) if config.exclude == "none" or not request.touches(row)]
        if kept:
            chosen[name] = _draw(kept, config.watch.items // 5, config.seed)
    return {
        name: Probe(
            encode_rows(tokenizer, part, config.data.format),
            chance(part, rows),
            [_tested(row, name) for row in part],
        )
        for name, part in chosen.items()
    }


def _tested(row: QARow, probe: str) -> tuple[str, ...]:
    """Return the stored facts that a row of a probe tests; of an image, itself."""
    if isinstance(row, ImageRow):
        return (row.fact_id,)
    return row.facts if probe != "train" or _is_stored_fact(row) else ()


def _is_stored_fact(row: QARow) -> bool:
    neutral = row.relation in ("real_authors", "world_facts")
    return row.hop == 1 and bool(row.facts) and not neutral and not row.relation.endswith("^-1")


def chance(part: Sequence[QARow], rows: Sequence[QARow]) -> float:
    """Return the accuracy of guessing among the answers of a question's last relation, averaged over the part."""
    answers: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        answers.setdefault((row.relation.rsplit(".", 1)[-1], row.template), set()).add(row.answer)
    sizes = [len(answers.get((row.relation.rsplit(".", 1)[-1], row.template), ())) for row in part]
    return float(np.mean([1 / n if n > 1 else 0.0 for n in sizes]))


def _draw(rows: Sequence[QARow], n: int, seed: int) -> list[QARow]:
    if len(rows) <= n:
        return list(rows)
    return [rows[i] for i in sorted(rng(seed, "evaluate").permutation(len(rows))[:n])]
