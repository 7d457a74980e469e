"""The file formats of question-answer data: rows (JSONL), corpora (a folder with a manifest), and their checks."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.config import digest
from llm_unlearn.data.jsonl import read_objects
from llm_unlearn.errors import UserError, suggest
from llm_unlearn.files import read_bytes, sha256_file, write_atomic

__all__ = [
    "SCHEMA_VERSION",
    "Corpus",
    "QARow",
    "check_disjoint",
    "check_unique",
    "load_corpus",
    "normalised",
    "read_manifest",
    "read_rows",
    "save_corpus",
    "sha256_file",
    "write_manifest",
    "write_rows",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("world", "ledger", "tofu", "custom", "muse", "wmdp")  # of those that can be written to a folder

# line breaks and tabs are ordinary text; the other control characters never survive a tokenizer
_BAD_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_TUPLES = ("perturbed_answer", "facts")


@dataclass(frozen=True, slots=True)
class QARow:
    """One question and its answer; the columns of TOFU plus where the row comes from."""

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answer: tuple[str, ...] = ()
    author: str = ""  # cluster for statistics
    relation: str = ""  # "birthplace", or "mentor.birthplace" for 2 hops
    hop: int = 1
    fact_id: str = ""  # unique question identity, wording apart, e.g. "a012.birthplace"
    template: str = ""  # wording id, e.g. "w2"
    facts: tuple[str, ...] = ()  # ids of the stored facts the answer needs
    continues: bool = False  # the answer goes on from the question's text, which may be empty; no prompt format, no end

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values, without the fields that hold their default."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.compare and value != field.default:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "row") -> QARow:
        """Build a row from plain values; columns that are no field are ignored.

        Raises UserError starting with `where` for a missing, empty, mistyped or unprintable value.
        """
        values: dict[str, Any] = {"continues": data.get("continues") is True}
        for name in ("question", "answer"):
            empty_ok = name == "question" and values["continues"]
            values[name] = _text(required(data, name, name, where), name, where, empty_ok=empty_ok)
        for name in ("paraphrased_question", "paraphrased_answer"):
            if data.get(name) is not None:
                values[name] = _text(data[name], name, where, empty_ok=False)
        for name in ("author", "relation", "fact_id", "template"):
            if data.get(name) is not None:
                values[name] = _text(data[name], name, where, empty_ok=True)
        for name in _TUPLES:
            if data.get(name) is not None:
                values[name] = _texts(data[name], name, where)
        if data.get("hop") is not None:
            if type(data["hop"]) is not int or data["hop"] < 1:
                raise UserError(f"{where}: 'hop' must be a whole number >= 1, got {_shown(data['hop'])}")
            values["hop"] = data["hop"]
        return cls(**values)


def required(data: Mapping[str, Any], key: str, field: str, where: str) -> Any:
    """Return `data[key]`, the column that holds `field`; UserError listing the columns when it is missing."""
    if key not in data:
        has = ", ".join(name if name.isprintable() else ascii(name) for name in list(data)[:12]) or "nothing"
        raise UserError(f"{where}: missing field '{key}' (has: {has}); name it: data.{field}_key")
    return data[key]


def _text(value: Any, name: str, where: str, empty_ok: bool) -> str:
    if value is None or (isinstance(value, str) and not empty_ok and not value.strip()):
        raise UserError(f"{where}: empty {name}; fill it in or drop the row")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be text, got {_shown(value)}")
    if bad := _BAD_CHARACTER.search(value):
        raise UserError(f"{where}: invalid character U+{ord(bad[0]):04X} in '{name}'; remove it")
    return value


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: '{name}' must be a list of texts, got {_shown(value)}")
    return tuple(_text(item, f"{name}[{i}]", where, empty_ok=False) for i, item in enumerate(value))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def read_rows(path: Path, question_key: str = "question", answer_key: str = "answer") -> list[QARow]:
    """Read a JSONL file of rows. A UTF-8 byte order mark, blank lines and unknown columns are accepted.

    Raises UserError `file:line: what; how to fix` for the first thing wrong.
    """
    rows: list[QARow] = []
    for line, data in read_objects(path):
        where = f"{path}:{line}"
        columns = {"question": question_key, "answer": answer_key}
        found = {field: required(data, key, field, where) for field, key in columns.items() if key != field}
        rows.append(QARow.from_json({**data, **found}, where))
    return rows


def write_rows(path: Path, rows: Iterable[QARow]) -> None:
    """Write rows as JSONL, one object a line, atomically; UserError when the disk refuses."""
    lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines).encode("utf-8"))


def write_manifest(folder: Path, meta: Mapping[str, Any], files: Iterable[str] | None = None) -> None:
    """Write `manifest.json`: schema_version, `meta` (kind, seed, counts, ...) and the sha256 of each file.

    Args:
        folder: where the files are; the manifest goes beside them and is written last.
        meta: plain JSON values without NaN.
        files: names relative to `folder`; by default every file in it that is not hidden.
    """
    if files is None:
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        files = [p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)]
    hashes = {name: sha256_file(folder / name) for name in sorted(files) if name != MANIFEST}
    content = {"schema_version": SCHEMA_VERSION, **meta, "files": hashes}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / MANIFEST, (text + "\n").encode("utf-8"))


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Return the manifest of a folder, after comparing every file with its sha256 unless `verify` is off.

    Raises UserError when it is missing, unreadable, of a newer version, or a file is gone or changed.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: no {MANIFEST}; give a folder written by data_prep, or make it again")
    try:
        manifest = json.loads(read_bytes(path, limit=100_000_000))
        version, files = manifest["schema_version"], dict(manifest["files"])
        newer = version > SCHEMA_VERSION
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path}: not a manifest of ours or damaged; make the data again") from None
    if newer:
        raise UserError(f"{path}: schema version {version}, this program knows {SCHEMA_VERSION}; update llm-unlearn")
    for name, expected in files.items() if verify else ():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path}: file name {name!r} leaves the folder; make the data again")
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: is in {MANIFEST} but missing; make the data again")
        if sha256_file(folder / name) != expected:
            raise UserError(f"{folder / name}: changed since {MANIFEST} was written (sha256); make the data again")
    return manifest


@dataclass(frozen=True)
class Corpus:
    """A named set of splits. `meta` holds plain JSON values: seed, forget rows, what made it."""

    name: str
    kind: str  # one of KINDS, or "image"
    splits: Mapping[str, tuple[QARow, ...]]
    meta: Mapping[str, Any]

    @property
    def given(self) -> bool:
        """Whether its splits are evaluated as they are: a benchmark without a `train` split to draw a request from."""
        return "train" not in self.splits

    @functools.cached_property
    def identity(self) -> str:
        """Hash of every row it holds, of images with their pixels, and of what it names as forget rows."""
        rows = {name: [row.to_json() for row in split] for name, split in self.splits.items()}
        pixels = {"pixels": self.meta["pixels"]} if self.kind == "image" else {}
        return digest({"rows": rows, "forget": list(self.meta.get("forget_rows", [])), **pixels})

    def split(self, name: str) -> tuple[QARow, ...]:
        """Return the rows of a split; UserError with the nearest name when there is none."""
        if name not in self.splits:
            raise UserError(f"data '{self.name}' has no split '{name}'{suggest(name, self.splits)}")
        return self.splits[name]


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """Write `<split>.jsonl` for every split and the manifest; the folder appears complete or not at all.

    Saving the same corpus again changes nothing. Raises UserError when the folder holds something else, a row occurs
    twice in a split, or the disk refuses.
    """
    if corpus.kind not in KINDS:
        raise ValueError(f"Corpus.kind must be one of {KINDS}, got {corpus.kind!r}")
    for name, rows in corpus.splits.items():
        if not _SPLIT_NAME.fullmatch(name):
            raise ValueError(f"split name {name!r} must be letters, digits, _ and -")
        check_unique(rows, f"split '{name}'")
    staging = folder.parent / f".staging-{uuid.uuid4().hex[:12]}"
    try:
        for name, rows in corpus.splits.items():
            write_rows(staging / f"{name}.jsonl", rows)
        counts = {name: len(rows) for name, rows in corpus.splits.items()}
        head = {"name": corpus.name, "kind": corpus.kind, "seed": corpus.meta.get("seed"), "counts": counts}
        write_manifest(staging, {**head, "meta": dict(corpus.meta)})
        if folder.exists() and (folder / MANIFEST).exists():
            if read_manifest(folder) == read_manifest(staging, verify=False):
                return
            raise UserError(f"{folder}: holds other data; give another folder or remove it first")
        try:
            os.rename(staging, folder)  # replaces an empty folder, refuses any other
        except OSError as error:
            raise UserError(f"{folder}: cannot write: {error.strerror}; give another folder") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_corpus(folder: Path) -> Corpus:
    """Read what `save_corpus` wrote, verifying every file; UserError when anything differs."""
    manifest = read_manifest(folder)
    try:
        name, kind, counts, meta = (manifest[key] for key in ("name", "kind", "counts", "meta"))
        splits = {split: tuple(read_rows(folder / f"{split}.jsonl")) if n else () for split, n in counts.items()}
    except (KeyError, AttributeError):
        raise UserError(f"{folder / MANIFEST}: describes no corpus; give a folder written by data_prep") from None
    for split, rows in splits.items():
        if len(rows) != counts[split]:
            raise UserError(f"{folder / split}.jsonl: {len(rows)} rows, {MANIFEST} says {counts[split]}")
    return Corpus(name, kind, splits, meta)


def check_unique(rows: Sequence[QARow], what: str) -> None:
    """Raise UserError when two rows have the same question and answer, or the same fact_id and wording."""
    for label, keys in (
        ("question and answer", [(row.question, row.answer) for row in rows]),
        (
            "fact_id and template",
            [(row.fact_id, row.template) if row.fact_id and row.template else None for row in rows],
        ),
    ):
        first: dict[tuple[str, str], int] = {}
        for i, key in enumerate(keys):
            if key is not None and first.setdefault(key, i) != i:
                shown = " / ".join(ascii(part[:60]) for part in key)
                raise UserError(f"{what}: duplicate {label} {shown} (rows {first[key] + 1}, {i + 1}); drop one of them")


def check_disjoint(a: Iterable[QARow], b: Iterable[QARow], what: str) -> None:
    """Raise UserError when rows of `a` are also in `b`, compared by question and answer without case and spacing.

    Args:
        what: names both, e.g. "forget and retain".
    """
    other = {_key(row) for row in b}
    both = [row for row in a if _key(row) in other]
    if both:
        first = ascii(both[0].question[:80])
        raise UserError(f"{len(both)} items in both {what} (first: {first}); drop them from one of the two")


def normalised(text: str) -> str:
    """Return a text without differences of case, spacing and Unicode form, for comparing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _key(row: QARow) -> tuple[str, str]:
    return normalised(row.question), normalised(row.answer)
