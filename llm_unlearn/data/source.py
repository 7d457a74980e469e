"""Where a run's data comes from: a world made in memory, a folder written by data_prep, TOFU, a benchmark that is only
evaluated on, or any JSONL of questions and answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from llm_unlearn.config import Config
from llm_unlearn.data.benchmarks import load_muse, load_wmdp
from llm_unlearn.data.image_sets import IMAGE_KINDS, ImageConfig, ImageKind, image_corpus
from llm_unlearn.data.images import corpus_classes
from llm_unlearn.data.ledger import LedgerConfig, ledger_corpus, ledger_pieces
from llm_unlearn.data.qa import pieces, world_corpus
from llm_unlearn.data.schema import MANIFEST, Corpus, load_corpus
from llm_unlearn.data.tofu import idk_answers, load_qa, load_tofu
from llm_unlearn.data.tokenise import FormatName, bpe_tokenizer, pieces_tokenizer
from llm_unlearn.data.world import WorldConfig, preset, text
from llm_unlearn.errors import UserError

DataKind = Literal["world", "ledger", "tofu", "custom", "muse-news", "muse-books", "wmdp"] | ImageKind


class DataConfig(Config):
    """Names the questions and answers of a run, or its images and classes."""

    kind: DataKind = Field(
        default="world",
        description="Embedded worlds, TOFU, your own JSONL, a benchmark (muse-*, wmdp) to evaluate on; or images: "
        "built in (digits, colours), of a file or folder of your own (npz, image_folder), or a data set by name.",
    )
    preset: str = Field(default="world40", description="kind=world: which world is made when path is not given.")
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of a world made in memory, and of the images trained on; a folder has its own.",
    )
    path: str | None = Field(
        default=None,
        description="Folder written by data_prep, folder of a benchmark's JSONL files (null: the hub), or a JSONL "
        "file; images: file or folder that holds them (null: built in, or the hub).",
    )
    forget_split: str = Field(default="forget10", description="kind=tofu: forget01, forget05 or forget10.")
    forget_path: str | None = Field(
        default=None, description="kind=custom: JSONL of the rows, or questions, to forget."
    )
    question_key: str = Field(default="question", description="kind=custom: field of the question.")
    answer_key: str = Field(default="answer", description="kind=custom: field of the answer.")
    train_neutral: bool = Field(
        default=False,
        description="kind=tofu: train the real-world splits too, in every model. For models from scratch.",
    )
    format: FormatName = Field(
        default="auto",
        description="Prompt format; auto takes the chat template if the tokenizer has one, else Question/Answer.",
    )
    max_length: int | None = Field(default=None, ge=8, description="Refuse items longer than this many tokens.")
    vocab_size: int = Field(
        default=4096, ge=300, description="Tokens of a tokenizer trained for a model from scratch on natural text."
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="Images: how many, and in what form.")


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus a config names. Raises UserError saying what is missing or malformed, and where."""
    path = None if config.path is None else Path(config.path)
    if config.kind in IMAGE_KINDS:
        image: Any = config.image  # frozen, so it has a hash
        return _images(config.kind, image, config.path, config.seed, _state_of(path))
    neutral = config.train_neutral and config.kind == "tofu"
    if path is not None and (path / MANIFEST).exists():
        corpus = load_corpus(path)
        if config.kind == "tofu" and corpus.meta.get("forget_split") != config.forget_split:
            split = corpus.meta.get("forget_split")
            holds = f"holds TOFU for {split}" if split else f"holds a {corpus.kind} corpus, not TOFU"
            raise UserError(
                f"{path}: {holds}, asked for is {config.forget_split}; name the same split, or write one with "
                "data_prep/make_tofu.py"
            )
        return with_neutral(corpus) if neutral else corpus
    if config.kind == "tofu":
        corpus = load_tofu(path, config.forget_split)
        return with_neutral(corpus) if neutral else corpus
    if config.kind in ("muse-news", "muse-books"):
        return load_muse(path, config.kind.removeprefix("muse-"))
    if config.kind == "wmdp":
        return load_wmdp(path)
    if config.kind == "custom" or path is not None:
        return load_qa(
            path or Path("data.jsonl"),
            None if config.forget_path is None else Path(config.forget_path),
            question_key=config.question_key,
            answer_key=config.answer_key,
        )
    if config.kind == "ledger":
        return ledger_corpus(LedgerConfig(seed=config.seed), "ledger")
    return world_corpus(preset(config.preset).model_copy(update={"seed": config.seed}), config.preset)


@functools.lru_cache(maxsize=1)
def _images(kind: ImageKind, image: ImageConfig, path: str | None, seed: int, _state: Sequence[Any]) -> Corpus:
    """Return the images of a config. The last ones are kept: a study asks for the same thousands of times, and finding
    their sub-classes takes longer than most unlearning runs on small images.
    """
    return image_corpus(kind, image, path, seed)


def _state_of(path: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of every file at a path: what is kept of it holds as long as these do."""
    if path is None or not path.exists():
        return ()
    stats = {str(p): p.stat() for p in (path, *path.rglob("*"))}
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in sorted(stats.items()))


def with_neutral(corpus: Corpus) -> Corpus:
    """Return the corpus with `real_authors` and `world_facts` trained too, in every model, gold included.

    A model trained from scratch knows nothing of the real world, so six of the nine parts of model utility would
    measure noise. Worlds always train them.
    """
    neutral = [row for name in ("real_authors", "world_facts") for row in corpus.splits.get(name, ())]
    return replace(corpus, splits={**corpus.splits, "train": (*corpus.split("train"), *neutral)})


def make_tokenizer(corpus: Corpus, vocab_size: int = 4096) -> Any:
    """Return a tokenizer for a model trained from scratch on the corpus; the classes of images.

    Worlds get one token per name, relation word and phrase; natural text gets byte-level BPE trained on the training
    split. Model and gold share it, so it is always made from the whole split, forget rows included.
    """
    if corpus.kind == "image":
        return corpus_classes(corpus)
    if corpus.kind == "world":
        return pieces_tokenizer(pieces(WorldConfig(**corpus.meta["config"])))
    if corpus.kind == "ledger":
        return pieces_tokenizer(ledger_pieces(LedgerConfig(**corpus.meta["config"])))
    return bpe_tokenizer(
        (f"Question: {row.question}\nAnswer: {row.answer}" for row in corpus.split("train")), vocab_size
    )


def refusals(corpus: Corpus, config: DataConfig) -> Sequence[str]:
    """Return the refusal answers for IDK methods: a world's own (its tokenizer has no other words), TOFU's list or ours
    for natural text.
    """
    if corpus.kind in ("world", "ledger"):
        return [sentence.replace("|", "").strip() for sentence in text("wordings")["refusals"]]
    return idk_answers(Path(config.path) if corpus.kind == "tofu" and config.path else None)
