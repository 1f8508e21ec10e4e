"""Ctrl-C and `kill` as one exception that unwinds the work, instead of tracebacks or silence."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Somebody asked the program to stop.

    No subclass of KeyboardInterrupt, which libraries catch and report in their own ways.

    Attributes:
        signal: Which signal.
        advice: What the user may want to know, added on the way up.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        self.signal = signal.Signals(number)
        self.advice = advice
        super().__init__(number, advice)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}{self.advice and ': '}{self.advice}"

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: what a shell reports of a process that they end."""
        return 128 + self.signal.value


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` in the main thread at the first signal, and ignores further ones.

    What follows the first is only the closing of files and workers; impatience would spoil it.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Holds the signals back; threads and processes that start meanwhile never get them.

    Ctrl-C on a terminal goes to every process in the foreground. Workers leave it to the driver.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
