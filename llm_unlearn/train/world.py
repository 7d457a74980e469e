"""What a launcher says of a run's processes, readable before Accelerate has joined them, and what they owe it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_main_rank() -> bool:
    """Return whether this process is the one that talks; without a launcher it is."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return how many processes the launcher announced; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: its processes would train on, their folder locked.

    Linux only. Without a launcher nothing is done, since a shell may go while its program stays.
    """
    # torchrun's mark, and that of `accelerate launch`
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_together(accelerator: Accelerator) -> None:
    """Leave the group of processes once the main one has written what the run came to.

    Under load a process aborts now and then as it ends (gloo's threads, which DDP keeps alive, outlive the group), and
    its launcher ends the others with it: by then nothing may be left to write.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def named_in_errors(step: Callable[[], int]) -> Iterator[None]:
    """Say in the traceback of what fails in one of several processes which one it was, where and when: their lines end
    up in one log.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            rank = os.environ.get("RANK", "?")
            error.add_note(f"in rank {rank} of {world_size()} on {socket.gethostname()}, after step {step()}")
        raise
