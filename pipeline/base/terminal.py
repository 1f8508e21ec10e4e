"""The terminal: progress of long work, as a bar or as plain lines elsewhere, and tables."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

log = logging.getLogger(__name__)

BAR_SECONDS, LINE_SECONDS = 0.1, 10.0
"""Seconds between two states of a bar, and between two plain lines."""


@contextmanager
def progress(
    title: str, total: int, unit: str, done: int = 0, *, patience: float = 0.0
) -> Iterator[Callable[..., None]]:
    """Shows on standard error how far a block is, which calls `advance(count=1, note="")`.

    Units that an earlier run has `done` are not in the rate. A bar appears after `patience`
    seconds: what is over by then needs none. Our own: importing that of rich takes 60 ms.
    """
    isatty = sys.stderr.isatty()
    earlier, shown = done, False
    start = time.monotonic()
    due = start + (patience if isatty else LINE_SECONDS)

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, due, shown
        done += count
        now = time.monotonic()
        if now < due and (done < total or (isatty and not shown)):
            return
        due = now + (BAR_SECONDS if isatty else LINE_SECONDS)
        rate = (done - earlier) / max(now - start, 1e-9)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
        state = f"{done}/{total} {unit}, {rate:.1f}/s, {left} left{note and ', '}{note}"
        if isatty:
            bar = "#" * (20 * done // max(total, 1))
            line = f"{title} [{bar:<20}] {state}"[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            shown = True
        else:
            log.info("%s %s", title, state)

    try:
        if isatty:
            advance(0)
        yield advance
    finally:
        if shown:
            sys.stderr.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligns rows in columns, the first `left` of them to the left; no header if it is empty.

    Our own: importing rich.table takes 18 ms, a tenth of scoring a few images.
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
