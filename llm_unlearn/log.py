"""What a run tells: log lines and progress on stderr, records in JSONL files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llm_unlearn.errors import UserError
from llm_unlearn.files import write_atomic

ROOT = "llm_unlearn"
PLAIN_EVERY_S = 5.0
BAR_EVERY_S = 0.1

# a model's text or a file name may hold codes that move the cursor or colour the terminal
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_main_process: bool | None = None


def get_logger(name: str) -> logging.Logger:
    """Return a logger below `llm_unlearn`, whose level and lines `setup` decides."""
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def setup(level: str | int = "info", main_process: bool = True) -> None:
    """Send log lines such as `07:31:12 I message` to stderr; other processes than the main one only warn.

    Calling it again replaces the former setting. Raises ValueError for an unknown level.
    """
    global _main_process
    _main_process = main_process
    logger = logging.getLogger(ROOT)
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if not main_process:
        logger.setLevel(max(logger.level, logging.WARNING))
    for handler in [h for h in logger.handlers if isinstance(h, _Stderr)]:
        logger.removeHandler(handler)
    handler = _Stderr()
    handler.setFormatter(_Lines("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False  # notebooks have a handler at the root: each line would come twice


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            # looked up every time: a progress bar puts its own stream there so that lines appear above it
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub("?", super().format(record))


class JsonlLog:
    """Appends one JSON object a line, each on disk's way before `write` returns. NaN and inf are written as null.

    Args:
        path: the file; its folder is made.
        keep: when given, lines of an existing file for which it is false are dropped first: a resumed run
            writes the steps after its checkpoint again. A line torn by a crash is always dropped.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        old = path.read_bytes()
        whole = [line for line in old.splitlines(keepends=True) if _kept(line, keep)]
        if b"".join(whole) != old:
            write_atomic(path, b"".join(whole))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; scalars of numpy and torch are accepted."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write: {error.strerror or error}; free space or choose another out"
            ) from None


def _kept(line: bytes, keep: Callable[[dict[str, Any]], bool] | None) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return keep is None or keep(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False


def finite(value: Any) -> Any:
    """Return plain values for JSON: keys as text, scalars of numpy and torch as numbers, NaN and inf as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Bar:
    """Progress of one piece of work; made by `progress`."""

    def __init__(self, total: int, label: str, unit: str, show: Callable[[Bar], None] | None, every_s: float) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0, ""
        self.started = self._shown = time.monotonic()
        self._first_done: int | None = None
        self._show, self._every_s = show, every_s

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` are done. Cheap enough for every step."""
        if self._first_done is None:
            self._first_done = 0
            if done > 1:  # a resumed run begins in the middle: its speed counts from here
                self._first_done, self.started = done, time.monotonic()
        self.done, self.note = done, note
        now = time.monotonic()
        if self._show is not None and now - self._shown >= self._every_s:
            self._shown = now
            self._show(self)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left in seconds; None before anything is done."""
        made = self.done - (self._first_done or 0)
        if made <= 0:
            return None
        return (time.monotonic() - self.started) * max(self.total - self.done, 0) / made

    def left(self) -> str:
        """The time left in words: `0:02:10 left`."""
        seconds = self.seconds_left
        return f"{_clock(seconds)} left" if seconds is not None else "? left"


@contextmanager
def progress(total: int, label: str, unit: str = "step", enabled: bool = True) -> Iterator[Bar]:
    """Show progress on stderr: a bar on a terminal, else a line with the time left every 5 s.

    Silent when not `enabled`, in other processes than the main one, and under LLM_UNLEARN_QUIET=1.
    """
    if not enabled or not _is_main() or os.environ.get("LLM_UNLEARN_QUIET") == "1":
        yield Bar(total, label, unit, None, math.inf)
    elif sys.stderr.isatty():
        with _rich_bar(total, label, unit) as bar:
            yield bar
    else:
        bar = Bar(total, label, unit, _plain_line, PLAIN_EVERY_S)
        began = time.monotonic()
        yield bar
        if time.monotonic() - began >= PLAIN_EVERY_S:  # short work needs no line of its own
            _say(f"{label} {bar.done}/{total} {unit}s in {_clock(time.monotonic() - began)}", bar.note)


@contextmanager
def _rich_bar(total: int, label: str, unit: str) -> Iterator[Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=False) as shown:
        for column in shown.columns:
            if isinstance(column, TextColumn):
                column.markup = False  # a note such as [0.5] is no markup
        task = shown.add_task(label, total=total, text=f"{unit}s")

        def show(bar: Bar) -> None:
            shown.update(task, completed=bar.done, text=_CONTROL.sub("?", f"{unit}s  {bar.left()}  {bar.note}"))

        bar = Bar(total, label, unit, show, BAR_EVERY_S)
        try:
            yield bar
        finally:
            show(bar)


def _plain_line(bar: Bar) -> None:
    _say(f"{bar.label} {bar.done}/{bar.total} {bar.unit}s, {bar.left()}", bar.note)


def _say(text: str, note: str) -> None:
    line = _CONTROL.sub("?", " ".join((f"{text}, {note}" if note else text).split()))
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} I {line}\n")
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0" if _main_process is None else _main_process
