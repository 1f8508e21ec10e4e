"""Progress of long work with rate and time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    if not sys.stderr.isatty():
        yield _Lines(title, total, unit, done)
    elif not patience:
        with _bar(title, total, unit, done) as advance:
            yield advance
    else:
        with ExitStack() as stack:
            yield _Later(partial(_bar, title, total, unit), done, patience, stack)


@contextmanager
def _bar(title: str, total: int, unit: str, done: int) -> Iterator[Advance]:
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
    start, new = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal new
            new += count
            rate = f"{new / max(time.monotonic() - start, 1e-9):.1f} {unit}/s"
            bar.update(task, advance=count, rate=rate, note=note)

        yield advance


class _Later:
    """A bar that comes when the work turns out to be long."""

    def __init__(
        self,
        bar: Callable[[int], AbstractContextManager[Advance]],
        done: int,
        patience: float,
        stack: ExitStack,
    ) -> None:
        self._bar, self._done, self._stack = bar, done, stack
        self._due = time.monotonic() + patience
        self._advance: Advance | None = None

    def __call__(self, count: int = 1, note: str = "") -> None:
        if self._advance is None:
            if time.monotonic() < self._due:
                self._done += count
                return
            self._advance = self._stack.enter_context(self._bar(self._done))
        self._advance(count, note)


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
