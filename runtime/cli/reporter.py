"""How a command speaks while it works: result lines on one stream, progress and warnings on another."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 5.0


class Reporter(Protocol):
    """What a command's `run` is given to speak through."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Say that `done` of `total` parts of `label` are finished."""

    def line(self, text: str) -> None:
        """Write one line of results."""

    def note(self, text: str) -> None:
        """Write one line about how something was done, which is no result."""

    def warn(self, text: str) -> None:
        """Write one line about something that went on, but not as the user may expect."""


class ConsoleReporter:
    """Writes to streams; a context manager that takes its progress bar away at the end.

    results: where lines go. status: where warnings and progress go, as a bar on a terminal and as lines elsewhere: one
    when a label begins and one when it is finished, and one every five seconds between, with an estimate of what is
    left.
    """

    def __init__(self, results: TextIO, status: TextIO) -> None:
        self._results, self._status = results, status
        self._draws = status.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: tuple[Progress, TaskID] | None = None
        self._label, self._spoke_s = "", 0.0
        self._began = (0, 0.0)  # how much of the label was done when it began, and when that was

    def __enter__(self) -> ConsoleReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_bar()

    def progress(self, label: str, done: int, total: int) -> None:
        label = one_line(label)
        if self._draws:
            self._draw(label, done, total)
            return
        now = time.monotonic()
        if label != self._label:
            self._began = (done, now)
        if label != self._label or done >= total or now - self._spoke_s >= PLAIN_INTERVAL_S:
            self._label, self._spoke_s = label, now
            self._status.write(f"{label}: {done}/{total}{self._left(done, total, now)}\n")
            self._status.flush()

    def _left(self, done: int, total: int, now: float) -> str:
        """How long the rest takes at the pace so far, where there is one."""
        before, began = self._began
        if done <= before or done >= total or now - began < PLAIN_INTERVAL_S:
            return ""
        seconds = round((now - began) / (done - before) * (total - done))
        return f", about {timedelta(seconds=seconds)} left"

    def line(self, text: str) -> None:
        self._remove_bar()
        self._results.write(one_line(text) + "\n")
        self._results.flush()

    def note(self, text: str) -> None:
        self._remove_bar()
        self._status.write(one_line(text) + "\n")
        self._status.flush()

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def _draw(self, label: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _new_bar(self._status, label, total)
        progress, task = self._bar
        progress.update(task, description=label, completed=done, total=total)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def one_line(text: str) -> str:
    """`text` without line breaks or control characters: names from files must not steer a terminal."""
    joined = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def _new_bar(status: TextIO, label: str, total: int) -> tuple[Progress, TaskID]:
    # Slower than the rest of a start, and of use on a terminal alone.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=status)
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = progress.add_task(label, total=total)
    progress.start()
    return progress, task
