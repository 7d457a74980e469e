"""Records on disk: one parquet file holds every split of a model, so that a new metric on old records runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.eval.metrics.base import Record, Scored
from llm_unlearn.files import write_atomic

SCHEMA_VERSION = 2


def write_records(path: Path, splits: Mapping[str, Sequence[Record]]) -> None:
    """Write records of all splits (parquet, one row per item, with the schema's version in the file's metadata)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_plain(split, record) for split, records in splits.items() for record in records]
    table = pa.Table.from_pylist(rows, schema=_schema(pa)).replace_schema_metadata(
        {"llm_unlearn_records": str(SCHEMA_VERSION)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_records(path: Path) -> dict[str, list[Record]]:
    """Read `write_records`' file. Raises UserError for a file of a newer schema or of something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: no readable records ({reason}); evaluate the model again") from None
    version = (table.schema.metadata or {}).get(b"llm_unlearn_records", b"").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        raise UserError(
            f"{path}: records of schema {version or 'unknown'}, this version reads {SCHEMA_VERSION}; evaluate the "
            "model again"
        )
    # by column: made row by row, the numbers take ten times as long as the rest of an evaluation of small images
    scored = {name: _scores(table.column(name).combine_chunks()) for name in ("scored", "paraphrase")}
    wrong = table.column("perturbed").combine_chunks()
    ends, perturbed = wrong.offsets.to_pylist(), _scores(wrong.values)
    plain = table.drop_columns([*scored, "perturbed"]).to_pylist()
    splits: dict[str, list[Record]] = {}
    for i, row in enumerate(plain):
        split = row.pop("split")
        its = {name: column[i] for name, column in scored.items()}
        record = Record(**row, **its, perturbed=tuple(perturbed[ends[i] : ends[i + 1]]))
        splits.setdefault(split, []).append(record)
    return splits


def _schema(pa: Any) -> Any:
    numbers = pa.list_(pa.float64())
    scored = pa.struct(
        [
            ("logp", numbers),
            ("hit", pa.list_(pa.bool_())),
            ("has_eos", pa.bool_()),
            ("vocab_mean", numbers),
            ("vocab_var", numbers),
        ]
    )
    text, fields = pa.string(), ["split", "author", "question", "answer", "generation", "target"]
    return pa.schema(
        [
            ("index", pa.int64()),
            *((name, text) for name in fields),
            ("correct", pa.bool_()),
            ("grad_norm", pa.float64()),
            ("scored", scored),
            ("paraphrase", scored),
            ("perturbed", pa.list_(scored)),
        ]
    )


def _plain(split: str, r: Record) -> dict[str, Any]:
    return {
        "split": split,
        "index": r.index,
        "author": r.author,
        "question": r.question,
        "answer": r.answer,
        "generation": r.generation,
        "correct": r.correct,
        "target": r.target,
        "grad_norm": r.grad_norm,
        "scored": _plain_scored(r.scored),
        "paraphrase": r.paraphrase and _plain_scored(r.paraphrase),
        "perturbed": [_plain_scored(s) for s in r.perturbed],
    }


def _plain_scored(s: Scored) -> dict[str, Any]:
    return {
        "logp": s.logp.tolist(),
        "hit": s.hit.tolist(),
        "has_eos": s.has_eos,
        "vocab_mean": None if s.vocab_mean is None else s.vocab_mean.tolist(),
        "vocab_var": None if s.vocab_var is None else s.vocab_var.tolist(),
    }


def _scores(column: Any) -> list[Any]:
    """Return what a column of scores holds: Scored, None where there is none."""
    there, ends = column.is_valid().to_pylist(), column.field("has_eos").to_pylist()
    numbers = {name: _lists(column.field(name)) for name in ("logp", "hit", "vocab_mean", "vocab_var")}
    return [
        Scored(has_eos=ends[i], **{name: values[i] for name, values in numbers.items()}) if here else None
        for i, here in enumerate(there)
    ]


def _lists(column: Any) -> list[Any]:
    """Return the arrays a column of lists holds, None where there is none."""
    flat, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    there = column.is_valid().to_pylist()
    return [flat[offsets[i] : offsets[i + 1]] if here else None for i, here in enumerate(there)]
