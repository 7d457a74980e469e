"""Fitting any causal LM to any question-answer set: the model an engineer has, and its gold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llm_unlearn.config import Config, digest, flatten
from llm_unlearn.data.source import DataConfig, make_tokenizer, open_corpus
from llm_unlearn.data.splits import Scenario, draw_request, training_rows
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.log import get_logger
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.lora import check_adapters_moved
from llm_unlearn.models.pretrained import ModelConfig, build_model, load_tokenizer
from llm_unlearn.seeding import derive, seed_everything
from llm_unlearn.train.config import LoopConfig, OptimConfig
from llm_unlearn.train.cost import Meter, start_clock
from llm_unlearn.train.engine import whole_weights
from llm_unlearn.train.item_losses import ItemLosses, epoch_steps
from llm_unlearn.train.loop import Callback, join_world, train
from llm_unlearn.train.optimizer import check_optimizer
from llm_unlearn.train.origin import absolute_paths, run_origin
from llm_unlearn.train.snapshot import claim_output, finished, save_outcome, write_result
from llm_unlearn.train.tasks import FitTask
from llm_unlearn.train.world import end_together

log = get_logger(__name__)


class FinetuneConfig(Config):
    """Fit a model to the answers of a data set. Defaults are TOFU's fine-tuning settings (lr aside, which depends on
    the model).
    """

    out: str = Field("runs/finetune", description="Folder of the run.")
    seed: int = Field(0, ge=0, description="Seed of initial weights and of the order of items.")
    exclude: Literal["none", "forget"] = Field(
        "none", description="forget: leave the forget closure out, which makes the gold model."
    )
    epochs: float = Field(
        5.0,
        gt=0,
        description="Passes over the data of the model that sees all of it; gold makes as many passes over its own.",
    )
    record_epochs: tuple[float, ...] = Field(
        (),
        description="Epochs after which the loss of every training row is written to item_losses.npz, from which "
        "scenario.kind=local_grok and local_ungrok are drawn.",
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig(kind="tofu"), description="Questions and answers.")
    scenario: Scenario = Field(
        default_factory=Scenario, description="What will be forgotten; decides what gold leaves out."
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(size="1m"), description="What is fitted.")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(weight_decay=0.01, betas=(0.9, 0.999), schedule="linear"),
        description="Optimizer.",
    )
    loop: LoopConfig = Field(
        default_factory=lambda: LoopConfig(batch_size=32),
        description="Training loop; max_steps is a limit on top of epochs.",
    )


def finetune(config: FinetuneConfig, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Fit, resuming an unfinished run. The folder gets `config.yaml`, `train_log.jsonl`, the model in `final/` (under
    LoRA also the adapter in `adapter/`), with `record_epochs` `item_losses.npz`, and `run.json`, which is returned.

    `callbacks` look on as the loop's do; one may end the fit by setting `run.stop_reason`.

    Raises UserError for anything the user can mend.
    """
    check_optimizer(config)
    out, config = Path(config.out), absolute_paths(config)
    if (done := finished(out, config, "finetune")) is not None:
        return done
    corpus = open_corpus(config.data)
    request = draw_request(corpus, config.scenario)
    started = start_clock()
    seed_everything(config.seed)
    tokenizer = (
        load_tokenizer(config.model.name) if config.model.name else make_tokenizer(corpus, config.data.vocab_size)
    )
    rows = training_rows(corpus, request, config.exclude)
    items = encode_rows(tokenizer, rows, config.data.format, config.data.max_length)
    steps = min(config.loop.max_steps, math.ceil(config.epochs * len(items) / config.loop.batch_size))
    loop = config.loop.model_copy(update={"max_steps": steps})
    due = epoch_steps(config.record_epochs, len(items), config.loop.batch_size, steps)
    model = answer_model(build_model(config.model, tokenizer, config.seed))
    accelerator, place = join_world(loop, out)
    task = FitTask(items, loop.batch_size, derive(config.seed, "order"), place, tokenizer.pad_token_id)
    claim_output(out, config, "finetune")
    meter = Meter(task.tokens, started)
    origin = run_origin(config, corpus, request)
    head = {"data": origin["data"], "exclude": config.exclude}
    losses = (
        ItemLosses(config.record_epochs, due, rows, items, tokenizer, config.data.format, out, head) if due else None
    )
    run = train(
        model,
        task,
        config.optim,
        loop,
        accelerator=accelerator,
        out=out,
        callbacks=[meter, *([losses] if losses else []), *callbacks],
        identity=digest({"config": config.model_dump(exclude={"out"}), "data": origin["data"]}),
        settings=flatten(config.model_dump()),
        label=f"fit {out.name}",
    )
    with whole_weights(run):
        check_adapters_moved(run.lm)
        result = {
            "kind": "finetune",
            "stop": run.stop_reason or "epochs",
            "steps": run.step,
            "loss": run.loss,
            "train_items": len(items),
            "origin": origin,
            "parameters": sum(p.numel() for p in run.lm.parameters()),
            "cost": meter.cost(run, losses),
        }
        if accelerator.is_main_process:
            save_outcome(out, run.lm, tokenizer, {**origin, "kind": "fitted", "step": run.step})
            write_result(out, result)
    log.info("%s: loss %.4f after %d steps", out, run.loss, run.step)
    end_together(accelerator)
    return result
