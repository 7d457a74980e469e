"""The pre/post comparison by one command, timed: 4 checkpoints x 4 methods x 3 seeds with gold.

    python benchmarks/prepost.py --jobs 2 --out benchmarks/results/prepost.json

Runs what recipes/configs/study/prepost.yaml describes (finished cells are not run again: for a timing start without
studies/prepost) and writes the comparison with the machine named.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "recipes/configs/study/prepost.yaml")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepost.json"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    from llm_unlearn.config import load_config
    from llm_unlearn.eval.compare import compare
    from llm_unlearn.eval.outcome import load_outcomes
    from llm_unlearn.log import setup
    from llm_unlearn.report.tables import as_json
    from llm_unlearn.study.config import StudyConfig
    from llm_unlearn.study.matrix import plan
    from llm_unlearn.study.runner import run_missing
    from llm_unlearn.study.store import Store, environment

    setup()
    study = load_config(StudyConfig, args.config, args.overrides)
    cells, store = plan(study), Store(Path(study.out))
    fresh = not any(store.done(cell) for cell in cells)
    started = time.perf_counter()
    ended = run_missing(Path(study.out), cells, args.jobs)
    seconds = time.perf_counter() - started
    records = [store.read(cell) or {} for cell in cells]
    content = {
        "what": "checkpoints x methods x seeds against gold",
        "command": f"python benchmarks/prepost.py --jobs {args.jobs}",
        "cells": ended,
        "wall_seconds": seconds if fresh else None,
        "cell_seconds": sum(r.get("seconds", 0.0) for r in records),
        "training": {
            c.label: (r.get("result") or {}).get("report")
            for c, r in zip(cells, records, strict=True)
            if c.kind == "train"
        },
        "comparison": as_json(compare(load_outcomes([Path(study.out)]))),
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{ended}, {seconds:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
