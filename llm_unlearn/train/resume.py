"""What a killed run continues from: weights, optimizer, random state and every callback's memory, committed as one
verified folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_unlearn.errors import UserError
from llm_unlearn.train.checkpoint import clean_staging, commit, newest_valid, rotate, step_dir, verify
from llm_unlearn.train.engine import put_weights, trained_weights
from llm_unlearn.train.origin import check_made_from
from llm_unlearn.train.statefile import load_state, save_state

KEEP = 2
FORMAT = 4  # of what the state holds; another one is another code version
RUN_FIELDS = ("seconds", "stop_reason", "loss", "logs", "unseen")


def resume_root(out: Path) -> Path:
    """Return the folder that holds a run's resumable states."""
    return out / "checkpoints"


def save_resume(
    out: Path,
    run: Any,
    optimizer: Any,
    parts: Mapping[str, Sequence[Any]],
    identity: str,
    made_from: Mapping[str, str],
) -> None:
    """Commit the run's state at its present step, then drop older states (the newest two stay)."""
    root = resume_root(out)
    keep = run.accelerator.is_main_process
    # by all processes together
    gathered = {"model": trained_weights(run, keep=keep), "optimizer": optimizer.state_dict()}
    if keep:
        state = {
            **gathered,
            "memory": {name: [part.state_dict() for part in members] for name, members in parts.items()},
            "rng": _random_state(),
            **{name: getattr(run, name) for name in RUN_FIELDS},
        }
        commit(
            step_dir(root, run.step),
            lambda folder: save_state(folder / "state.safetensors", state),
            {"step": run.step, "identity": identity, "made_from": dict(made_from), "format": FORMAT},
        )
        rotate(root, set(_newest_steps(root, KEEP)))
    run.accelerator.wait_for_everyone()


def load_resume(
    out: Path,
    run: Any,
    optimizer: Any,
    parts: Mapping[str, Sequence[Any]],
    identity: str,
    made_from: Mapping[str, str],
) -> int:
    """Load the newest valid state of a run's folder, if there is one; return the step to continue from, 0 without one.
    What killed writers left in the folder, and in those directly below it, is removed first.

    Raises UserError when the state was written by a run of another identity, or one made from other models.
    """
    root = resume_root(out)
    if run.accelerator.is_main_process and out.is_dir():
        for folder in [out, *(path for path in out.iterdir() if path.is_dir() and not path.is_symlink())]:
            if folder.exists():  # it may have been a leftover itself
                clean_staging(folder)
    run.accelerator.wait_for_everyone()
    folder = newest_valid(root) if root.exists() else None
    if folder is None:
        return 0
    meta = verify(folder)
    check_made_from(out, meta.get("made_from", {}), made_from)
    if (meta["identity"], meta.get("format")) != (identity, FORMAT):
        raise UserError(
            f"{folder}: this state belongs to a run with another config, data or code version; choose another out, or "
            "remove the folder"
        )
    state = load_state(folder / "state.safetensors")
    put_weights(run, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, members in parts.items():
        for part, remembered in zip(members, state["memory"][name], strict=True):
            part.load_state_dict(remembered)
    _set_random_state(state["rng"])
    for name in RUN_FIELDS:
        setattr(run, name, state[name])
    return int(meta["step"])


def _newest_steps(root: Path, n: int) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*"))[-n:]


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
