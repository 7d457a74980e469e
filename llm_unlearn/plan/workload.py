"""What the recipes' configs ask for: the model, the passes of a step, and how many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.config import Config, load_config
from llm_unlearn.config_yaml import Where, apply_override, read_yaml
from llm_unlearn.data.schema import Corpus
from llm_unlearn.data.source import DataConfig, make_tokenizer, open_corpus
from llm_unlearn.data.splits import draw_request, training_rows
from llm_unlearn.data.tokenise import encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.grok.config import GrokConfig
from llm_unlearn.models.checkpointing import checkpoint_activations
from llm_unlearn.models.pretrained import ModelConfig, load_tokenizer, skeleton
from llm_unlearn.plan.activations import Pass
from llm_unlearn.plan.batches import LOOKED_AT, Update, batch_sizes
from llm_unlearn.plan.forgetting import forgetting
from llm_unlearn.plan.memory import Beside
from llm_unlearn.plan.shape import Shape, read_shape
from llm_unlearn.seeding import derive
from llm_unlearn.train.config import LoopConfig
from llm_unlearn.train.finetune import FinetuneConfig
from llm_unlearn.train.optimizer import n_moments
from llm_unlearn.train.order import step_items
from llm_unlearn.train.tasks import n_micro_batches
from llm_unlearn.unlearn.config import UnlearnConfig
from llm_unlearn.unlearn.prepare import draw_items
from llm_unlearn.unlearn.start import open_start
from llm_unlearn.usage import mark_memory, peak_since

RECIPES: dict[str, type[Config]] = {"grok": GrokConfig, "finetune": FinetuneConfig, "unlearn": UnlearnConfig}


@dataclass(frozen=True)
class Workload:
    """A run in numbers. `updates` are its sorts of optimizer steps; `steps` is the most it may take; `data_bytes` is
    what reading and encoding the data added to this process' memory, measured.
    """

    recipe: str
    shape: Shape
    steps: int
    n_micro: int
    updates: Sequence[Update]
    beside: Beside
    data_bytes: int = 0

    @property
    def real_tokens(self) -> float:
        """Tokens of a step without padding, the mean over the run's steps."""
        return sum(update.share * update.real_tokens for update in self.updates)


def read_recipe(path: Path | None, overrides: Sequence[str], recipe: str | None) -> tuple[str, Any]:
    """Return (recipe, its config): the recipe named, else the only one that has all of the keys, else the one the
    config's folder is named after. Raises UserError.
    """
    if recipe is None:
        where: Where = {}
        problems: list[str] = []
        data = read_yaml(path, where, problems) if path is not None else {}
        for text in overrides:
            apply_override(data, text, where, problems)
        fits = [name for name, cls in RECIPES.items() if data.keys() <= cls.model_fields.keys()]
        folder = path.absolute().parent.name if path is not None else ""
        recipe = fits[0] if len(fits) == 1 else folder
        if recipe not in RECIPES:
            raise UserError(
                f"{path or 'no --config'}: which recipe is this for? say --recipe grok, --recipe finetune or --recipe "
                "unlearn"
            )
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: unknown; choose {', '.join(RECIPES)}")
    return recipe, load_config(RECIPES[recipe], path, overrides)


def workload(recipe: str, config: Any, world: int = 1) -> Workload:
    """Return what a config's run consists of on `world` processes. Reads data and tokenizer, loads no weights, writes
    nothing. Raises UserError for anything the run itself would refuse on the way there.
    """
    n_micro = n_micro_batches(config.loop.batch_size, config.loop.micro_batch, world)
    _import_all()
    mark = mark_memory()
    work = _forget(config, world, n_micro) if recipe == "unlearn" else _fit(recipe, config, world, n_micro)
    return replace(work, data_bytes=peak_since(mark) or 0)


def _import_all() -> None:
    """Read and encode a toy world and shape a toy model, so that libraries do not count as data."""
    corpus = open_corpus(DataConfig(preset="world12"))
    tokenizer = make_tokenizer(corpus)
    encode_rows(tokenizer, corpus.split("train")[:8])
    skeleton(ModelConfig(size="nano"), tokenizer)


def _fit(recipe: str, config: Any, world: int, n_micro: int) -> Workload:
    corpus = _texts(open_corpus(config.data))
    rows = training_rows(corpus, draw_request(corpus, config.scenario), config.exclude)
    name = config.model.name
    tokenizer = load_tokenizer(name) if name else make_tokenizer(corpus, config.data.vocab_size)
    items = encode_rows(tokenizer, rows, config.data.format, config.data.max_length)
    if not items:
        raise UserError("the training set is empty; check data and scenario")
    steps = config.loop.max_steps
    if recipe == "finetune":
        steps = min(steps, math.ceil(config.epochs * len(items) / config.loop.batch_size))
    batch, seed = config.loop.batch_size, derive(config.seed, "order")
    drawn = [step_items(len(items), batch, step, seed) for step in range(min(steps, LOOKED_AT))]
    sizes = batch_sizes(items, np.stack(drawn), batch // (world * n_micro))
    sam = getattr(config, "sam", None) is not None
    looks = 2 if sam else 1
    update = Update([Pass(sizes.largest)], [Pass(sizes.mean)] * looks, looks * sizes.real_tokens)
    beside = Beside(
        grokfast=getattr(config, "grokfast", None) is not None,
        pretrained=name is not None,
        wrapper="nearby_worst" if sam else None,
        moments=n_moments(config.optim),
    )
    return Workload(recipe, shape_of(config.model, tokenizer, config.loop), steps, n_micro, [update], beside)


def _forget(config: UnlearnConfig, world: int, n_micro: int) -> Workload:
    start, tokenizer = open_start(config.model, config.data, config.scenario), load_tokenizer(config.model)
    _texts(start.corpus)
    shape = shape_of(ModelConfig(name=config.model, dtype=config.dtype, lora=config.lora), tokenizer, config.loop)
    items = draw_items(config, start, None, tokenizer)
    updates, beside = forgetting(config, shape, items, world, n_micro)
    return Workload("unlearn", shape, config.loop.max_steps, n_micro, updates, beside)


def _texts(corpus: Corpus) -> Corpus:
    if corpus.kind == "image":
        raise UserError(
            f"'{corpus.name}' holds images, and plans are made for language models only; run the recipe with "
            "loop.max_steps=50 and another out: run.json there tells time and peak memory (cost)"
        )
    return corpus


def shape_of(model: ModelConfig, tokenizer: Any, loop: LoopConfig) -> Shape:
    """Return the shape of a model as the loop trains it. Raises UserError for what the run would refuse."""
    lm = skeleton(model, tokenizer)
    if loop.gradient_checkpointing:
        checkpoint_activations(lm)
    return read_shape(lm, loop.precision)
