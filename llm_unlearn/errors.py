"""Errors meant for users: one line that says what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what, where, how to fix. Programs exit with 2."""


class Interrupted(BaseException):
    """A signal asked the process to end, and what was under way is saved. Like KeyboardInterrupt no error, so that what
    handles errors lets it pass. Programs exit with `code`: 143 after SIGTERM, 138 after SIGUSR1.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = int(signum)
        self.code = 128 + self.signum


class Diverged(UserError):
    """Numbers of a training that are no longer finite."""


class TooEarly(UserError):
    """What is needed is not there yet, or somebody else is making it: the same again later may work."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the tail of an "unknown ..." message: the nearest known name, or the list of all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"


def run_main(main: Callable[[], None]) -> None:
    """Run a program's main function; turn a UserError into one line on stderr and exit code 2, Ctrl-C into one and 130,
    a signal that asked to end into one and 128 + its number.

    `LLM_UNLEARN_DEBUG=1` lets the traceback through.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LLM_UNLEARN_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Interrupted as error:
        signal.signal(error.signum, signal.SIG_IGN)  # sent again it changes nothing: the process is ending
        name = signal.Signals(error.signum).name
        print(f"ended by {name}; run the same command again to go on", file=sys.stderr)  # noqa: T201
        sys.exit(error.code)
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    """Part from the launcher's other processes: exiting with live gloo threads aborts, two times in three."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
