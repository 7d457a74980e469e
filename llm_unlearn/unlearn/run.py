"""One unlearning run, from a start model to a folder with the model that has forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import digest, flatten
from llm_unlearn.errors import UserError
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import AnswerModel, answer_model
from llm_unlearn.models.lora import add_lora, check_adapters_moved
from llm_unlearn.models.pretrained import (
    check_vocabulary,
    fingerprint,
    load_model,
    load_tokenizer,
    split_reference,
)
from llm_unlearn.seeding import derive, seed_everything
from llm_unlearn.train.cost import Meter, start_clock
from llm_unlearn.train.engine import whole_weights
from llm_unlearn.train.loop import Callback, Run, join_world, train
from llm_unlearn.train.optimizer import check_optimizer
from llm_unlearn.train.origin import absolute_paths, gold_kind, run_origin
from llm_unlearn.train.snapshot import claim_output, finished, save_outcome, write_result
from llm_unlearn.train.tasks import Place
from llm_unlearn.train.world import end_together
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.dual import DualAscent
from llm_unlearn.unlearn.edit import is_edit, make_edit, run_edit
from llm_unlearn.unlearn.masked import make_masks
from llm_unlearn.unlearn.objective import Items, UnlearnTask, make_objective, reads_logits
from llm_unlearn.unlearn.prepare import draw_items, level_of, watched_items
from llm_unlearn.unlearn.start import Start, open_start
from llm_unlearn.unlearn.stopping import UnlearnWatch
from llm_unlearn.unlearn.wrapped import WrappedTask, check_divided, check_engine, choose_wrapper

log = get_logger(__name__)


def default_out(reference: str, method: str) -> Path:
    """Return `<run>/unlearn/<kind>/<method>` for a model of a run; anything else needs an out of its own."""
    run, kind = split_reference(reference)
    if kind is None:
        raise UserError(f"out is not given, and '{reference}' is no run@kind it could be derived from; give out=...")
    return Path(run) / "unlearn" / kind / method


def run_unlearn(config: UnlearnConfig, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Unlearn, evaluating on the way; resume if the folder holds an unfinished run.

    The folder gets `config.yaml`, `trajectory.jsonl`, `train_log.jsonl`, the model in `final/` and `run.json`, whose
    content is returned: method, `stop` (why it ended: "max_steps", "edit", "target", "floor", "collapse" or
    "diverged"), the step kept, target, `alarms` (what was found -> first step), `kept_faults` of the kept
    step, origin, and cost (see `Meter.cost`; loading and gold's level are not in it). Under LoRA the adapter is saved
    too, in `adapter/`.
    `callbacks` look on as the loop's do.
    Raises UserError for anything the user can mend, and Diverged where nothing was evaluated before numbers ceased to
    be finite, or the last step is to be kept.
    """
    check_optimizer(config)
    wrapper, editing = choose_wrapper(config.method), is_edit(config)
    out = Path(config.out) if config.out else default_out(config.model, config.method.label)
    config = absolute_paths(config)
    used = (config.model, config.gold, config.method.reinforced)
    made_from = {ref: fingerprint(ref) for ref in used if ref is not None}
    if (done := finished(out, config, "unlearn", made_from)) is not None:
        return done
    start = open_start(config.model, config.data, config.scenario)
    tokenizer = load_tokenizer(config.model)
    seed_everything(config.seed)
    lm = load_model(config.model, config.dtype, to_train=True)
    check_vocabulary(lm, tokenizer, config.model)
    accelerator, place = join_world(config.loop, out, unused_parameters=not reads_logits(config.method))
    if wrapper is not None:
        check_engine(wrapper, accelerator)
    check_divided(config, accelerator)
    # on the device at once: the reference's log-probabilities are computed before the loop starts
    model = answer_model(add_lora(lm, config.lora) if config.lora else lm).to(accelerator.device)
    level = level_of(config, start, tokenizer, model)
    watch = UnlearnWatch(config.stop, watched_items(config, start, tokenizer), level, out)
    shared = {
        "accelerator": accelerator,
        "out": out,
        "identity": digest(
            {"config": config.model_dump(exclude={"out"}), "data": start.data_digest, "made_from": made_from}
        ),
        "made_from": made_from,
        "settings": flatten(config.model_dump()),
        "label": f"unlearn {config.method.label}",
    }
    clock = start_clock()
    items = draw_items(config, start, model, tokenizer)
    job = _Job(config, model, items, watch, place, tokenizer.pad_token_id, clock, callbacks, shared)
    run, meter, told = (_edit if editing else _train)(job)
    with whole_weights(run):
        cost = meter.cost(run, watch, config.gold)
    kept = watch.keep_best(run)
    origin = _origin(config, start, kept)
    result = {
        "kind": "unlearn",
        "method": config.method.label,
        "stop": run.stop_reason or "max_steps",
        "steps": run.step,
        "kept_step": kept,
        "start": watch.line(0),
        "kept": watch.line(kept),
        "target": level.target,
        "target_by": level.by,
        "target_from": level.source,
        "alarms": watch.alarms,
        "kept_faults": watch.faults(kept),
        **told,
        "made_from": made_from,
        "origin": origin,
        "cost": cost,
    }
    with whole_weights(run):
        check_adapters_moved(run.lm)
        if accelerator.is_main_process:
            save_outcome(out, run.lm, tokenizer, origin)
            write_result(out, result)
    log.info("%s: kept step %d of %d (%s): %s", out, kept, run.step, result["stop"], watch.told(kept))
    end_together(accelerator)
    return result


@dataclass(frozen=True)
class _Job:
    """A run made ready: what a training and an edit read. `shared` is what `train` takes besides."""

    config: UnlearnConfig
    model: AnswerModel
    items: Items
    watch: UnlearnWatch
    place: Place
    pad_id: int
    clock: tuple[float, float]
    callbacks: Sequence[Callback]
    shared: dict[str, Any]


def _train(job: _Job) -> tuple[Run, Meter, dict[str, Any]]:
    """Minimise the method's loss."""
    config, model, items, level = job.config, job.model, job.items, job.watch.level
    wrapper, batch_size = choose_wrapper(config.method), config.loop.batch_size
    objective = make_objective(
        config.method,
        model,
        items,
        derive(config.seed, "control"),
        batch_size,
        updates=config.loop.max_steps,
        unseen_logp=level.logp if level.unseen_logp is None else level.unseen_logp,
    )
    draws = (items, batch_size, derive(config.seed, "order"), job.place, job.pad_id)
    task = UnlearnTask(objective, *draws) if wrapper is None else WrappedTask(objective, wrapper, *draws)
    meter = Meter(task.tokens, job.clock)
    dual = [DualAscent(task)] if objective.method.rule == "dual" else []
    n_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    masks = make_masks(config.method, n_weights, items.forget, task.tokens)
    claim_output(Path(job.shared["out"]), config, "unlearn")
    run = train(
        model,
        task,
        config.optim,
        config.loop,
        callbacks=[*masks, *dual, job.watch, meter, *job.callbacks],
        gradient_edits=[mask.edit for mask in masks],
        has_result=job.watch.has_result,
        **job.shared,
    )
    told: dict[str, Any] = {"dual": dual[0].state_dict()} if dual else {}
    if objective.generic is not None:
        told["generic_changed"] = objective.generic.changed
    if "target" in objective.params:
        told["target_loss"] = objective.params["target"]
    return run, meter, told


def _edit(job: _Job) -> tuple[Run, Meter, dict[str, Any]]:
    """Change the weights once."""
    edit = make_edit(job.config, job.model, job.items)
    claim_output(Path(job.shared["out"]), job.config, "unlearn")
    edited = run_edit(
        edit,
        job.config,
        job.model,
        job.items,
        job.watch,
        job.place,
        job.pad_id,
        clock=job.clock,
        callbacks=job.callbacks,
        **job.shared,
    )
    return edited.run, edited.meter, {"changed": edited.changed}


def _origin(config: UnlearnConfig, start: Start, kept: int) -> dict[str, Any]:
    resolved = config.model_copy(update={"data": start.data, "scenario": start.scenario})
    return {
        **run_origin(resolved, start.corpus, start.request),
        "kind": "unlearned",
        "step": kept,
        "start": config.model,
        "start_kind": start.origin.get("kind"),
        "gold_kind": gold_kind(start.origin),
    }
