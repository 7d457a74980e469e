"""Signals that ask a process to end: noted when they come, acted on where what is under way can be kept.

Outside `noted` they do what they do by default: the process ends at once. Both ways a shell sees 143 after SIGTERM and
138 after SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llm_unlearn.errors import Interrupted

# what schedulers send ahead of a time limit or a preemption; Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_seen = 0
_asked: Callable[[], bool] | None = None


@contextmanager
def noted() -> Iterator[None]:
    """Note signals instead of ending by them; any number of them are one. In another than the main thread, nothing.

    A signal that nobody has acted on by the end of the block is delivered then.
    """
    global _seen
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _seen = 0
    before = {signum: signal.signal(signum, _note) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    if _seen:
        os.kill(os.getpid(), _seen)


def _note(signum: int, frame: FrameType | None) -> None:
    global _seen
    _seen = _seen or signum


def seen() -> int:
    """Return the signal that came first since `noted` was entered, 0 for none."""
    return _seen


@contextmanager
def breaking(asked: Callable[[], bool]) -> Iterator[None]:
    """Let `end_if_asked` end the work inside the block once `asked()` is true."""
    global _asked
    outer, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = outer


def end_if_asked() -> None:
    """To be called between the parts of long work that loses nothing by being done again.

    Raises Interrupted inside a `breaking` block whose question is answered with yes; else does nothing.
    """
    if _asked is not None and _asked():
        raise Interrupted(_seen or signal.SIGTERM)
