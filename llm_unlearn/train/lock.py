"""One process at a time in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_unlearn.errors import TooEarly, UserError


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Hold a folder for this process; None locks nothing. The kernel lets go when the process ends, however it ends.

    Raises TooEarly naming the process that holds it, and UserError where files cannot be locked.
    """
    if folder is None:
        yield
        return
    import fcntl  # not on Windows, where the rest of the package works

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another out") from None
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise TooEarly(
                f"{folder}: is being written by process {holder}; wait for it, or choose another out"
            ) from None
        except OSError as error:  # file systems over a network need not know locks
            raise UserError(
                f"{folder}: files cannot be locked there ({error.strerror}); choose an out on another file system"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
