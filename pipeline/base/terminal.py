"""The terminal: progress of long work, as a bar or as plain lines elsewhere, and tables."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Seconds between two plain lines."""


class Advance(Protocol):
    """Tells that `count` more units are done; `note` stands beside the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Advances by `count`."""
        ...


@contextmanager
def progress(
    title: str, total: int, unit: str, done: int = 0, *, patience: float = 0.0
) -> Iterator[Advance]:
    """Shows the progress of a block on standard error.

    Args:
        title: What is done, such as `render`.
        total: Units in all.
        unit: Such as `images`.
        done: Units finished by an earlier run; they do not count in the rate.
        patience: Seconds before there is a bar: what is over by then needs none.
    """
    if sys.stderr.isatty():
        with ExitStack() as stack:
            yield _Bar(title, total, unit, done, patience=patience, stack=stack)
    else:
        yield _Lines(title, total, unit, done)


class _Bar:
    """A bar, which appears once the work has lasted for `patience` seconds."""

    def __init__(
        self, title: str, total: int, unit: str, done: int, *, patience: float, stack: ExitStack
    ) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._stack = stack
        self._start, self._new = time.monotonic(), 0
        self._due = self._start + patience
        self._update: Callable[..., None] | None = None if patience else self._show()

    def __call__(self, count: int = 1, note: str = "") -> None:
        self._new += count
        now = time.monotonic()
        if self._update is None:
            if now < self._due:
                return
            self._update = self._show()
        rate = f"{self._new / max(now - self._start, 1e-9):.1f} {self._unit}/s"
        self._update(completed=self._done + self._new, rate=rate, note=note)

    def _show(self) -> Callable[..., None]:
        # Imported here: it takes longer than much of what has a bar.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bar = self._stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        task = bar.add_task(self._title, total=self._total, completed=self._done, rate="", note="")
        return partial(bar.update, task)


class _Lines:
    """A line every few seconds, and one at the end."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = done
        self._start = self._last = time.monotonic()

    def __call__(self, count: int = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < LINE_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        line = f"{self._title} {self._done}/{self._total} {self._unit}"
        log.info("%s, %.1f/s, %s left%s", line, rate, duration(left), f", {note}" if note else "")


def duration(seconds: float) -> str:
    """`42s`, `3m10s`, `2h05m` or `4d03h`; a question mark where unknown."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligns rows in columns, under a header unless all its names are empty.

    Our own: importing rich.table takes 18 ms, a tenth of scoring a few images.

    Args:
        columns: Names of the columns.
        rows: A text for each column.
        left: How many columns, from the first, are aligned to the left.
    """
    lines = [columns, *rows] if any(columns) else rows
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
