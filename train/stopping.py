"""Asked to stop: finish the step, save, leave. And loader processes that do not die before it.

A preempted job gets SIGTERM and some seconds; Ctrl-C is SIGINT. Schedulers send them to every
process of a job, terminals to the whole foreground group, launchers pass them on once more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from panoptic_cache.pipeline.base.stopping import SIGNALS

LAUNCHERS = {"accelerate", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}
"""Programs and modules that start ranks and end them."""

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether somebody asked this process to stop.

    Attributes:
        signal: The first signal's number, 0 until there is one.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, _: FrameType | None) -> None:
        """The handler: notes the first signal. Impatience would only spoil the checkpoint."""
        self.signal = self.signal or number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes SIGTERM and SIGINT instead of dying of them; of use in the main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {each: signal.signal(each, request) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_with_launcher() -> None:
    """Asks this process to stop once its launcher is gone, however it went; Linux only.

    `accelerate launch` dies of a SIGTERM without passing it on, and any launcher can be killed. Its
    ranks would train on, unseen, beside the run that goes on from their checkpoints.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    words = parent.read_bytes().decode(errors="replace").split("\0") if parent.exists() else []
    if LAUNCHERS & {Path(word).name for word in words}:
        _at_parents_death(signal.SIGTERM)


def _at_parents_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def stop_with_parent_only() -> None:
    """Lets a loader process outlive the signals that a whole job gets; its parent still ends it.

    Else the step that has to be finished would wait for batches that nobody makes. Who sent a
    signal is known only to who waits for it, hence the thread.

    It does not outlive its parent, whose sockets it has: other ranks would wait for a dead one.
    """
    _at_parents_death(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
