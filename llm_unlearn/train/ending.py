"""Ending a run that was asked to: a signal that came to one of its processes is all processes' at the next step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from llm_unlearn import interrupt
from llm_unlearn.errors import Interrupted

KEY = "llm_unlearn/asked_to_end"
LISTEN_S = 0.2  # between questions to the others, each a round trip over the network


class Ending:
    """Whether a run was asked to end, whichever of its processes the signal came to.

    `agreed` and `interruptible` are collective: every process has to come to them.

    Args:
        accelerator: the run's.
        in_step: whether processes cannot make forward passes without each other: then none breaks work off on its own.
    """

    def __init__(self, accelerator: Any, *, in_step: bool = False) -> None:
        self.accelerator, self.in_step = accelerator, in_step
        self.store = _store() if accelerator.num_processes > 1 else None
        self.listened = 0.0

    @property
    def mine(self) -> bool:
        """Whether a signal came to this process."""
        return interrupt.seen() != 0

    @property
    def reason(self) -> Interrupted:
        """What to raise: the signal that came here, SIGTERM if it came to another process."""
        return Interrupted(interrupt.seen() or signal.SIGTERM)

    def agreed(self) -> bool:
        """Return whether a signal came to any process."""
        if self.store is None:
            return self.mine
        flag = torch.tensor(float(self.mine), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that changes nothing until it is done, ended between its parts (`interrupt.end_if_asked`) when a signal
        comes. Raises Interrupted in every process if one came to any.
        """
        failed: BaseException | None = None
        try:
            with nullcontext() if self.in_step else interrupt.breaking(self._heard):
                yield
        except (Interrupted, Exception) as error:
            failed = error
        if self.agreed():
            raise self.reason
        if failed is not None:
            raise failed

    def _heard(self) -> bool:
        """Whether a signal came here or, as far as the others have told, to them."""
        if self.store is None:
            return self.mine
        if self.mine:
            self.store.set(KEY, b"1")
            return True
        if time.monotonic() - self.listened < LISTEN_S:
            return False
        self.listened = time.monotonic()
        return self.store.check([KEY])


def _store() -> Any:
    """The key-value store that the processes met in: unlike a collective, it can be asked at any time."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
