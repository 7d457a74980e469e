"""Running a model over a suite's splits, once: its records, what identifies them and what they cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import llm_unlearn
from llm_unlearn import __version__
from llm_unlearn.config import digest
from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.splits import Request, eval_splits
from llm_unlearn.data.tokenise import FormatName
from llm_unlearn.errors import UserError
from llm_unlearn.eval.meter import Cost, in_turn, metered, together
from llm_unlearn.eval.metrics.base import Record
from llm_unlearn.eval.records import read_records, write_records
from llm_unlearn.eval.rows import score_split
from llm_unlearn.eval.shards import Shard
from llm_unlearn.eval.suite import Suite
from llm_unlearn.files import read_json, sha256_file, write_atomic
from llm_unlearn.log import get_logger, progress
from llm_unlearn.models.adapter import base_of, is_adapter
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.pretrained import absolute_reference, check_vocabulary, load_model, load_tokenizer, locate

log = get_logger(__name__)
RECORDS, STAMP, RESULTS = "records.parquet", "identity.json", "results.json"
PAIRS, PEER_LOG, UTILITY = "pairs.json", "TOFU_EVAL.json", "lm_eval.json"
WEIGHT_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # weights, config, tokenizer, chat template
Splits = Mapping[str, tuple[Sequence[QARow], frozenset[str]]]


@dataclass(frozen=True)
class ModelScores:
    """A model's records with what identifies them and what they cost."""

    records: Mapping[str, Sequence[Record]]
    identity: dict[str, str]
    cost: Cost
    folder: Path


def score_model(
    reference: str,
    suite: Suite,
    corpus: Corpus,
    request: Request,
    fmt: FormatName,
    out: Path | None = None,
    shard: Shard | None = None,
) -> ModelScores:
    """Score a model on every split of a suite, or return the records of an earlier call with the same identity without
    running it.

    The identity covers the weights' content, tokenizer, data, forget request, suite and code version, so a checkpoint
    changed in place is scored again. Records go beside a model of ours, to `results/` for any other, unless `out` is
    given. A killed call leaves the splits it finished, and the next goes on from there. With a shard, every process
    calls this and gets all records. Raises UserError for a model that cannot be loaded or does not fit, and for an
    `out` that holds anything else than earlier records of this model on this suite and data.
    """
    shard = shard or Shard()
    folder, rows = Path(locate(reference)), eval_splits(corpus, request)
    identity = {
        "model": _weights_digest(folder),
        "data": corpus.identity,
        "rows": digest({name: [row.question for row in rows.get(name, ())] for name in suite.splits()}),
        "suite": suite.digest,
        "format": fmt,
        "code": f"{__version__}-{_code_digest()}",
    }
    home = folder.parent if (folder / "manifest.json").exists() else Path("results")
    where = out or home / f"eval-{folder.name}-{suite.config.name}-{digest(identity)[:8]}"
    known = shard.gather(_earlier(where, absolute_reference(reference), identity) if shard.main else None)[0]
    if known is not None:
        return known
    wanted = {split: (_needed(rows, split, suite), needs) for split, needs in suite.splits().items()}
    records, cost = _run(reference, suite, wanted, fmt, where / f".parts-{digest(identity)[:8]}", shard)
    if shard.main:
        _write(where, absolute_reference(reference), identity, records, cost)
    shard.gather(None)  # nobody looks for results before they are there
    return ModelScores(records, identity, cost, where)


def _run(
    reference: str, suite: Suite, wanted: Splits, fmt: FormatName, parts: Path, shard: Shard
) -> tuple[dict[str, list[Record]], Cost]:
    tokenizer, lm = load_tokenizer(reference), load_model(reference)
    check_vocabulary(lm, tokenizer, reference)
    model = answer_model(lm).eval().to(shard.device)
    # one process decides which splits are done: the others might look while it writes
    done: dict[str, tuple[list[Record], Cost]] = shard.gather(_finished_parts(parts) if shard.main else None)[0]
    with progress(sum(len(rows) for rows, _ in wanted.values()), f"evaluate {Path(reference).name}", "row") as bar:
        for split, (rows, needs) in wanted.items():
            if split not in done:
                limit, stop = suite.generation(split)
                with metered(lm) as spent:
                    mine = score_split(
                        model,
                        tokenizer,
                        shard.mine(rows),
                        fmt=fmt,
                        needs=needs,
                        max_new_tokens=limit,
                        stop=stop,
                    )
                    done[split] = shard.gather_records(mine, len(rows)), together(shard.gather(spent()))
                if shard.main:
                    _write_part(parts, split, *done[split])
            bar.update(sum(len(done[name][0]) for name in wanted if name in done), split)
    return {split: done[split][0] for split in wanted}, in_turn([done[split][1] for split in wanted])


def _earlier(where: Path, model: str, identity: Mapping[str, str]) -> ModelScores | None:
    """Return what an earlier call left in a folder, None when there is none, or none that is whole and up to date."""
    if not where.exists():
        return None
    written = (RECORDS, STAMP, RESULTS, PAIRS, PEER_LOG, UTILITY)
    if not where.is_dir() or any(e.name not in written and not e.name.startswith(".") for e in where.iterdir()):
        raise UserError(f"{where}: holds something else than results; choose another --out")
    if not (where / STAMP).exists():
        _check_own(where, model)
        return None
    try:
        known = read_json(where / STAMP)
        whose, its = known["model"], known["identity"]
        differing = [key for key in identity if key != "code" and its.get(key) != identity[key]]
        if its == identity:
            return ModelScores(read_records(where / RECORDS), its, known["cost"], where)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: not whole, scored again (%s)", where, error)
        return None
    in_place = whose == model and (differing == ["model"] or its.keys() != identity.keys())
    if differing and not in_place:
        raise UserError(f"{where}: holds results of another {' and '.join(differing)}; choose another --out")
    return None


def _check_own(where: Path, model: str) -> None:
    """Results without a stamp are what a killed call of this model left, or somebody else's."""
    try:
        theirs = read_json(where / RESULTS)["model"] if (where / RESULTS).exists() else model
    except (UserError, KeyError, TypeError):
        theirs = None
    if theirs != model:
        raise UserError(f"{where}: holds results of another model ({theirs}); choose another --out")


def _write(where: Path, model: str, identity: Mapping[str, str], records: Any, cost: Cost) -> None:
    # killed between the two, new records must not pass for those of an old stamp
    (where / STAMP).unlink(missing_ok=True)
    write_records(where / RECORDS, records)
    told = {"model": model, "identity": dict(identity), "cost": cost}
    write_atomic(where / STAMP, (json.dumps(told, indent=2) + "\n").encode())
    for parts in where.glob(".parts-*"):
        shutil.rmtree(parts, ignore_errors=True)


def _write_part(parts: Path, split: str, records: Sequence[Record], cost: Cost) -> None:
    try:
        write_atomic(parts / f"{split}.json", json.dumps(cost).encode())
        write_records(parts / f"{split}.parquet", {split: records})
    except UserError as error:  # another process scored the same model, was done first and took the parts away
        log.info("%s: not kept for a next time (%s)", split, error)


def _finished_parts(parts: Path) -> dict[str, tuple[list[Record], Cost]]:
    done = {}
    for file in sorted(parts.glob("*.parquet")):
        try:
            done[file.stem] = read_records(file)[file.stem], read_json(file.with_suffix(".json"))
        except (UserError, KeyError):
            continue  # torn, or taken away by another process that has just finished
    return done


def _needed(rows: Mapping[str, Sequence[QARow]], split: str, suite: Suite) -> Sequence[QARow]:
    if split not in rows:
        raise UserError(
            f"suite '{suite.config.name}' reads split '{split}', which this data does not have "
            f"(it has {', '.join(sorted(rows))}); choose another suite or data"
        )
    # clusters of rows without an author must not depend on which process scores them
    return [row if row.author else replace(row, author=str(i)) for i, row in enumerate(rows[split])]


@cache
def _code_digest() -> str:
    """Hash of the code that makes records: a fix must not leave old ones standing."""
    root = Path(llm_unlearn.__file__).parent
    files = [f"eval/{name}.py" for name in ("rows", "scoring", "families", "generation", "score")]
    files += ["data/tokenise.py", "data/batches.py", "models/causal.py", "models/llama.py"]
    files += ["data/images.py", "models/image_model.py", "models/image_nets.py"]
    return digest({name: sha256_file(root / name) for name in files})[:8]


def _weights_digest(folder: Path) -> str:
    if not folder.is_dir():
        return str(folder)  # a hub name: its revision is the hub's business
    names = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_FILES and p.name != "manifest.json")
    own = {p.name: sha256_file(p) for p in names}
    return digest({**own, "base": _weights_digest(Path(locate(base_of(folder))))} if is_adapter(folder) else own)
