"""From a model to its `probes.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llm_unlearn.config import digest
from llm_unlearn.data.schema import Corpus, QARow
from llm_unlearn.data.splits import Request, eval_splits
from llm_unlearn.data.tokenise import FormatName, encode_rows
from llm_unlearn.errors import UserError
from llm_unlearn.eval.probes.passes import check_layer
from llm_unlearn.eval.probes.table import Finding, Probe, Settings, Subject, choose
from llm_unlearn.files import read_json, write_atomic
from llm_unlearn.log import finite, get_logger, progress
from llm_unlearn.models.causal import answer_model
from llm_unlearn.models.pretrained import (
    absolute_reference,
    check_vocabulary,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
)
from llm_unlearn.usage import resident_peak

log = get_logger(__name__)
SCHEMA_VERSION = 1
PROBES_FILE = "probes.json"
MIN_ITEMS = 8


def probe_model(
    reference: str,
    corpus: Corpus,
    request: Request,
    *,
    which: Sequence[str] | None = None,
    against: str | None = None,
    settings: Settings | None = None,
    fmt: FormatName = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Run probes on a model and write `probes.json`; return its content and `folder`, where it is.

    It lies beside the model's evaluations, or in `results/` for a model that is not ours, in a folder named after what
    decides the numbers (weights, data, request, settings): probes run there before keep their results.

    Args:
        reference: the model: folder, run@kind or hub name.
        which: names of probes; None runs all that apply.
        against: a second model that `cka` compares with row by row.
        settings: how much is looked at.
        fmt: prompt format of texts.
        out: folder in place of the one beside the model.

    Raises UserError for an unknown probe, an empty forget set, or a model that cannot be loaded or looked into.
    """
    settings = settings or Settings()
    chosen = choose(which)  # mistakes show before a model is loaded
    if settings.items < MIN_ITEMS:
        raise UserError(f"--items {settings.items}: probes need at least {MIN_ITEMS} rows of a set")
    if settings.loss is not None and not settings.loss > 0:
        raise UserError(f"--loss {settings.loss:g}: a mean loss is above 0; give nats per token, such as 0.5")
    rows = probed_rows(corpus, request)
    identity = {
        "model": fingerprint(reference),
        "against": None if against is None else fingerprint(against),
        "data": corpus.identity,
        "rows": digest({name: [row.question for row in some] for name, some in rows.items()}),
        "format": fmt,
        "settings": asdict(settings),
    }
    path = _place(reference, identity, out) / PROBES_FILE
    earlier = _earlier(path, identity)
    subject = _open(reference, against, rows, fmt)
    if settings.layer is not None:
        for model in filter(None, (subject.model, subject.other)):
            check_layer(model, settings.layer)
    ran = _run(chosen, subject, settings, asked=which is not None)
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": absolute_reference(reference),
        "against": against and absolute_reference(against),
        "identity": identity,
        "sets": {name: len(some) for name, some in rows.items()},
        "probes": {**earlier, **ran},
    }
    write_atomic(path, (json.dumps(finite(result), indent=1, allow_nan=False) + "\n").encode())
    return {**result, "ran": list(ran), "folder": str(path.parent)}


def probed_rows(corpus: Corpus, request: Request) -> dict[str, list[QARow]]:
    """Return the rows probes look at: "forget" and "retain" as trained, and "held_out" where the data has them (two-hop
    questions, or a test set, that need nothing forgotten).

    Raises UserError for an empty forget set.
    """
    if not request.forget:
        raise UserError(f"'{corpus.name}': the forget set is empty; give data that is asked to be forgotten (--data)")
    train = corpus.split("train")
    rows = {"forget": [train[i] for i in request.forget], "retain": [train[i] for i in request.retain]}
    splits = eval_splits(corpus, request)
    held_out = splits.get("retain_inf") or splits.get("test", ())
    return {**rows, "held_out": list(held_out)} if held_out else rows


def _open(reference: str, against: str | None, rows: dict[str, list[QARow]], fmt: FormatName) -> Subject:
    tokenizer = load_tokenizer(reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for name in (reference, *([against] if against is not None else [])):
        lm = load_model(name)
        check_vocabulary(lm, tokenizer, name)
        models.append(answer_model(lm).eval().to(device))
    items = {name: encode_rows(tokenizer, some, fmt) for name, some in rows.items()}
    return Subject(models[0], rows, items, models[1] if against is not None else None)


def _run(chosen: Sequence[Probe], subject: Subject, settings: Settings, *, asked: bool) -> dict[str, Any]:
    """Run probes; one that does not apply is left out with a warning unless it was asked for by name."""
    out: dict[str, Any] = {}
    with progress(len(chosen), "probe", "probe") as bar:
        for done, probe in enumerate(chosen):
            bar.update(done, probe.name)
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                found: Finding = probe.fn(subject, settings)
            except UserError as error:
                if asked:
                    raise
                log.warning("%s left out: %s", probe.name, error)
                continue
            cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            out[probe.name] = {
                "lines": [asdict(line) for line in found.lines],
                "detail": found.detail,
                "formula": probe.formula,
                "cost": {**cost, "peak_bytes": float(resident_peak())},
            }
        bar.update(len(chosen))
    return out


def _place(reference: str, identity: dict[str, Any], out: Path | None) -> Path:
    folder = Path(locate(reference))
    home = folder.parent if (folder / "manifest.json").exists() else Path("results")
    return out or home / f"probe-{folder.name}-{digest(identity)[:8]}"


def _earlier(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the probes an earlier call left there. Raises UserError when they are of something else."""
    if path.parent.exists() and (not path.parent.is_dir() or {p.name for p in path.parent.iterdir()} - {PROBES_FILE}):
        raise UserError(f"{path.parent}: holds something else than probes; choose another --out")
    if not path.exists():
        return {}
    known = read_json(path)
    if not isinstance(known, dict) or known.get("identity") != finite(identity):
        raise UserError(f"{path}: is of another model, data or settings; choose another --out")
    return known.get("probes") or {}
