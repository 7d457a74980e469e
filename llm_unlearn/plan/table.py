"""The plan of a run, put together."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.plan.memory import ENGINES, SPLIT, Engine, memory
from llm_unlearn.plan.operations import step_operations
from llm_unlearn.plan.workload import Workload, workload


def make_plan(recipe: str, config: Any, processes: int = 1, engines: Sequence[Engine] = ENGINES) -> dict[str, Any]:
    """Return parameters, memory by engine (bytes per process), tokens and operations of a run, as plain values.

    Several processes share the batch, so activations shrink with them; `one` is always planned for one process. Engines
    that shard are left out where a mask or a wrapper needs whole gradients. Raises UserError for anything the run
    itself would refuse before it starts, and for what cannot be planned.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: give at least 1")
    alone = workload(recipe, config)
    several = workload(recipe, config, processes) if processes > 1 else alone
    return {
        "recipe": recipe,
        "processes": processes,
        "parameters": alone.shape.parameters,
        "trainable": alone.shape.trainable,
        "steps": alone.steps,
        "batch": {
            "rows": config.loop.batch_size,
            "micro_batches": several.n_micro,
            "largest": [
                {"rows": p.batch.rows, "width": p.batch.width, "answer_tokens": p.batch.answers, "reads": p.reads}
                for update in several.updates
                for p in update.largest
            ],
        },
        "tokens": {
            "step": round(alone.real_tokens),
            "step_padded": round(
                alone.n_micro * sum(u.share * p.batch.tokens for u in alone.updates for p in u.typical)
            ),
            "run": round(alone.real_tokens * alone.steps),
        },
        "operations": {"step": _operations(alone), "run": _operations(alone) * alone.steps},
        "memory": {
            name: _memory(name, alone if name == "one" else several, processes, alone.data_bytes)
            for name in engines
            if not (alone.beside.whole and any(SPLIT[name]))
        },
        "exact_shape": alone.shape.llama_style,
    }


def _operations(work: Workload) -> int:
    return round(sum(u.share * step_operations(work.shape, u.typical) for u in work.updates) * work.n_micro)


def _memory(engine: Engine, work: Workload, processes: int, data: int) -> dict[str, Any]:
    return memory(
        work.shape,
        [update.largest for update in work.updates],
        engine,
        1 if engine == "one" else processes,
        work.beside,
        n_micro=work.n_micro,
        data=data,
        glibc=platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ,
    ).to_json()
