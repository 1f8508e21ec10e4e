"""Loader processes: how many batches fit, waiting for the next one, and what ends the wait."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import SIGNALS, Interrupted
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.train.caches import Caches
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import TENSORS, Batch, CachedItems, MicroBatches, Share, collate
from panoptic_cache.train.stopping import StopRequest
from panoptic_cache.train.stream import stream_batches

log = logging.getLogger(__name__)

PREFETCH = 4
"""Batches that a loader process makes ahead, where there is room for them."""
SHARED = Path("/dev/shm")
PATIENCE = 900.0
"""Seconds without a batch that end a run: a streamed shard may take minutes."""
GRACE = 5.0
"""Seconds that a batch may still take once a stop was asked for; they may be twice as many."""
STARVED = ("DataLoader worker (pid", "shared memory", "unable to write to file </torch_", "ancdata")
"""What a RuntimeError of torch says when a loader process was killed or a resource ran out."""


def make_loader(
    config: DataConfig, caches: Caches, share: Share, *, pin: bool = False
) -> DataLoader[Batch]:
    """Micro-batches of one rank by the reader that is configured.

    Not for `Accelerator.prepare`, which would split them again.
    """
    options: dict[str, Any] = {
        "num_workers": config.workers,
        "pin_memory": pin,
        # Else starting draws from the global generator, and a resumed run differs.
        "generator": torch.Generator().manual_seed(share.seed),
    }
    if config.workers:
        options |= {"prefetch_factor": prefetch(config), "worker_init_fn": prepare_worker}
        # A fork server, Python 3.14's default, dies of a signal to the whole job, and its
        # processes with it, before the last step is finished.
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    if config.reader == "stream":
        return DataLoader(stream_batches(config, caches, share), batch_size=None, **options)
    readers = []
    for path, index in zip(config.paths, caches.indexes, strict=True):
        if (local := Storage(path).local) is None:
            raise InputError(
                "the indexed reader needs a local cache",
                where=path,
                remedy="--set data.reader=stream, or copy it to a local disk",
            )
        readers.append(reader := ShardReader(local, len(config.paths)))
        if len(reader) != index.samples:
            raise InputError(
                f"the index counts {index.samples} samples, its shards have {len(reader)}",
                where=path,
                remedy="run panoptic preprocess again: it rewrites the index",
            )
    return DataLoader(
        cast("Dataset[Batch]", CachedItems(tuple(readers), config, share.seed)),  # collated
        batch_sampler=MicroBatches(config, caches.mix, share),
        collate_fn=collate,
        **options,
    )


def prefetch(config: DataConfig) -> int:
    """Batches for each loader process to make ahead; InputError where not even one fits.

    A batch takes shared memory, 64 MB in a container as a rule, and a descriptor for each tensor.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = 6 * config.size**2 * min(config.micro_batch, config.batch)  # bytes: photo and three maps
    room = shutil.disk_usage(SHARED).free // ranks if SHARED.exists() else sys.maxsize
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 200 + len(TENSORS) * (PREFETCH * config.workers + 1)
    if wanted > files:
        most = wanted if most == resource.RLIM_INFINITY else most
        resource.setrlimit(resource.RLIMIT_NOFILE, (files := min(wanted, most), most))
    batches = min(room // size, (files - 64) // len(TENSORS))  # one of them is trained on
    if batches <= config.workers:
        fewer = max(0, batches - 1)
        if room // size <= config.workers:
            what = f"{SHARED} has room for {room >> 20} MB, a batch takes {max(1, size >> 20)} MB"
            remedy = "make it larger (docker run --shm-size=1g), lower data.micro_batch, or"
        else:
            what, remedy = f"at most {files} files may be open", "raise it with ulimit -n, or"
        raise InputError(
            f"{what}: too few for {config.workers} loader processes",
            where="data.workers",
            remedy=f"{remedy} --set data.workers={fewer}",
            code="loader",
        )
    return min(PREFETCH, (batches - 1) // config.workers)


def prepare_worker(_: int) -> None:
    """One thread for each loader process; and only the training ends it, not the job's signals.

    The step that is to be finished would otherwise wait for batches that nobody makes. The process
    still ends when its loader is closed, and within seconds of its parent's death.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def iterate(
    loader: DataLoader[Batch], request: StopRequest | None = None
) -> Generator[Batch, None, None]:
    """The loader's batches; close the generator, so that the loader's processes end.

    Raises InputError where a loader process raised one, died, or makes no batch, and Interrupted
    where a stop was asked for and the batch does not come.
    """
    wait = Wait(request or StopRequest())
    try:
        batches = iter(loader)
        wait.watch()
        while (batch := wait.until(lambda: next(batches, None))) is not None:
            yield batch
    except (InputError, RuntimeError, OSError, EOFError) as error:
        if wait.request.signal:  # whatever it is, it comes of that
            raise Interrupted(wait.request.signal) from None
        said = loader_error(error)
        if said is None:
            raise
        error.__traceback__ = None  # its frames hold the loader, which is to end its processes
        raise said from None
    finally:
        wait.end()


class Wait:
    """Waiting for the next batch in the main thread: what may end it, and only it.

    torch learns that a loader process has died from a signal, and raises wherever the main thread
    is then, in a step or in a checkpoint that is being written. Here that waits for the next batch.
    A loader process that was stopped or has lost a batch sends no signal; a timer ends that wait.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._main = threading.current_thread() is threading.main_thread()
        self._waiting = self._died = self._asked = False
        self._since = 0.0
        self._before: Any = signal.SIG_DFL  # torch's handler, once a loader has started

    def watch(self) -> None:
        """Takes over from the handler that torch has set."""
        if self._main:
            self._before = signal.signal(signal.SIGCHLD, self._on_death)

    def until(self, work: Callable[[], Batch | None]) -> Batch | None:
        """What the work gives, unless the wait for it ends early."""
        if not self._main:
            return work()
        self._since = time.monotonic()
        handler = signal.signal(signal.SIGALRM, self._on_time)
        alarm, _ = signal.setitimer(signal.ITIMER_REAL, GRACE, GRACE)
        try:
            self._waiting = True
            if self._died:
                self._died = False
                self._on_death(signal.SIGCHLD, None)
            return work()
        finally:
            self._waiting = False
            waited = time.monotonic() - self._since
            signal.setitimer(signal.ITIMER_REAL, max(alarm - waited, 0.01) if alarm else 0)
            signal.signal(signal.SIGALRM, handler)

    def end(self) -> None:
        """Ends loader processes, stopped ones too, for which torch and the interpreter wait."""
        self._waiting = False
        for child in multiprocessing.active_children():
            child.kill()
            child.join(GRACE)  # what is left to reap would be an error to torch
        if self._main:
            signal.signal(signal.SIGCHLD, self._before)

    def _on_death(self, number: int, frame: FrameType | None) -> None:
        if not self._waiting:
            self._died = True
        elif callable(self._before):
            self._before(number, frame)

    def _on_time(self, *_: object) -> None:
        if self._asked:
            raise Interrupted(self.request.signal)
        self._asked = bool(self.request.signal)
        if time.monotonic() - self._since > PATIENCE:
            raise InputError(
                f"no batch for {PATIENCE:.0f} seconds",
                where="data.workers",
                remedy="see whether its loader processes run and the cache can be read",
                code="loader",
            )


def loader_error(error: Exception) -> InputError | None:
    """What to say of an error that came from a loader process; None if that is not its cause."""
    # From another process comes a traceback as the message; its last line is what was said.
    last = "".join(str(error).splitlines()[-1:])
    if isinstance(error, InputError):
        name = f"{InputError.__module__}.{InputError.__name__}: "
        return InputError(last.removeprefix(name), where="", code=error.code)
    if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in STARVED):
        return None
    few = any(sign in str(error) for sign in ("open files", "ancdata"))
    remedy = "raise ulimit -n, or" if few else "memory or /dev/shm ran out, as a rule:"
    line = f"{type(error).__name__}: {last.removeprefix(f'{type(error).__name__}: ')}"
    return InputError(
        f"a loader process failed: {line[:160]}",
        where="data.workers",
        remedy=f"{remedy} lower data.workers",
        code="loader",
    )
