"""The terminal: printable text, log lines, tables, and progress as a bar or as lines elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

log = logging.getLogger(__name__)

BAR_SECONDS, LINE_SECONDS = 0.1, 10.0
"""Seconds between two states of a bar, and between two plain lines."""

WIDEST, LONGEST = 60, 2000
"""Characters of a cell of a table, but for the last one of a row, and of a line."""
CLEAR = "\r\x1b[K"
"""Removes the line with the cursor."""


def plain(text: str, longest: int = LONGEST) -> str:
    """Text in one printable line: a name must not move the cursor, nor fake a second message."""
    if len(text) > longest:
        text = f"{text[: longest - 3]}..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LineFormatter(logging.Formatter):
    """A line for each message of ours, on which no bar stands; those of others may have several."""

    on_bar = False

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message as it is printed."""
        text = super().formatMessage(record)
        lines = [text] if record.name.startswith("panoptic_cache") else text.split("\n")
        clear, LineFormatter.on_bar = CLEAR if LineFormatter.on_bar else "", False
        return clear + "\n".join(map(plain, lines))


@contextmanager
def progress(
    title: str, total: int, unit: str, done: int = 0, *, patience: float = 0.0
) -> Iterator[Callable[..., None]]:
    """Shows on standard error how far a block is, which calls `advance(count=1, note="")`.

    Units that an earlier run has `done` are not in the rate. A bar appears after `patience`
    seconds: what is over by then needs none. Our own: importing that of rich takes 60 ms.
    """
    isatty = sys.stderr.isatty()
    earlier = done
    start = time.monotonic()
    due = start + (patience if isatty else LINE_SECONDS)

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, due
        done += count
        now = time.monotonic()
        if now < due and (done < total or (isatty and now - start < patience)):
            return
        due = now + (BAR_SECONDS if isatty else LINE_SECONDS)
        rate = (done - earlier) / max(now - start, 1e-9)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
        state = f"{done}/{total} {unit}, {rate:.1f}/s, {left} left{note and ', '}{note}"
        if isatty:
            bar = "#" * (20 * done // max(total, 1))
            line = f"{title} [{bar:<20}] {state}"[: shutil.get_terminal_size().columns - 1]
            with suppress(OSError):  # the terminal may have gone
                sys.stderr.write(f"{CLEAR}{line}")
                sys.stderr.flush()
            LineFormatter.on_bar = True
        else:
            log.info("%s %s", title, state)

    try:
        if isatty:
            advance(0)
        yield advance
    finally:
        if LineFormatter.on_bar:
            LineFormatter.on_bar = False
            with suppress(OSError):
                sys.stderr.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligns rows in columns, the first `left` of them to the left; no header if it is empty.

    Our own: importing rich.table takes 18 ms, a tenth of scoring a few images.
    """
    lines = [
        [*(plain(cell, WIDEST) for cell in line[:-1]), plain(line[-1])]
        for line in ([columns, *rows] if any(columns) else rows)
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
