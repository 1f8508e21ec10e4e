"""The garbage collector, out of the way of work that makes no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Halves the time of making millions of objects, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        # Later collections, that at exit included, would walk them all again and again.
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
