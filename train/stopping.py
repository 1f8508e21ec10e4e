"""What ends a run early: signals that ask for it, and failures, each told in one line.

A preempted job gets SIGTERM and some seconds; Ctrl-C is SIGINT. Schedulers send them to every
process of a job, terminals to the whole foreground group, launchers pass them on once more.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

import cv2
import torch
from torch.distributed import DistError

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import Interrupted, handled
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.ranks import Ranks

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds to wait for an earlier run to leave the folder: a step and a checkpoint."""
NAMED = 32
"""Samples that a message names."""

_PARENT = os.getppid()
_LAUNCHED = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
"""Whether that is accelerate or torchrun; both tell their ranks so."""
_NO_MEMORY = (
    *("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("MPS backend out of memory", "Insufficient memory"),
)
"""The CPU's allocator and CUDA's libraries raise plain RuntimeErrors, OpenCV one of its own."""


class StopRequest:
    """Whether somebody asked this process to stop; as a signal handler, it takes note of that.

    The first signal counts: later ones would only spoil the checkpoint.
    """

    _signal = 0

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Notes a signal."""
        self._signal = self._signal or number

    @property
    def signal(self) -> int:
        """The first signal's number, 0 until there is one.

        A rank whose launcher has gone stops as if by SIGTERM: `accelerate launch` (1.15) dies of a
        SIGTERM without passing it on. Else, in a run of 150 steps whose launcher was asked to stop
        at step 4, the rank made all 150, into the folder of the resumed run.
        """
        if not self._signal and _LAUNCHED and os.getppid() != _PARENT:
            self._signal = signal.SIGTERM
        return self._signal


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes SIGTERM and SIGINT instead of dying of them; works in the main thread only."""
    request = StopRequest()
    main = threading.current_thread() is threading.main_thread()
    with handled(request) if main else nullcontext():
        yield request


@contextmanager
def guarded_run(config: TrainConfig) -> Iterator[None]:
    """What a training process needs around the run: the folder to itself, failures in one line."""
    out = Path(config.out)
    with ExitStack() as guards:
        if os.environ.get("RANK", "0") == "0":
            guards.enter_context(alone(out))
        # TensorBoard writes in a thread, whose error it raises again in the main one.
        guards.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _silent_on_oserror
        guards.enter_context(memory_advice(smaller_steps(config)))
        guards.enter_context(rank_advice())
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(out)
            raise
        except Interrupted as stop:
            complete = [file.parent for file in out.glob("checkpoints/step_*/complete.json")]
            if not stop.advice and complete:
                stop.advice = f"{max(complete)} is complete, --resume goes on from it"
            raise
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise
            raise InputError(
                f"torch.compile fails: {' '.join(str(error).split())[:160]}",
                where="compile",
                remedy="install a C++ compiler and Python's headers, or --set compile=false",
                code="compile",
            ) from None


def _silent_on_oserror(arguments: threading.ExceptHookArgs) -> None:
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds a run's folder, so that no other run writes into it; for the main rank.

    Ranks whose launcher was killed finish their step and save. The run that goes on must not
    overtake them, so it waits for `PATIENCE`, then raises InputError.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as lock:
        for waited in range(math.ceil(PATIENCE) + 1):
            try:
                lock.enter_context(Storage(str(out)).locked())
                break
            except InputError as error:
                if error.code != "locked" or waited >= PATIENCE:
                    raise
                if waited == 0:
                    log.warning("%s: another run is ending here, waiting for it", out)
                time.sleep(1)
        try:
            yield
        finally:
            lock.close()
            with suppress(OSError):
                out.rmdir()  # if nothing was written


def not_finite(
    ranks: Ranks,
    step: int,
    losses: Sequence[float],
    keys: Sequence[tuple[str, ...]],
    norm: float,
) -> InputError:
    """Says on every rank where a loss or a gradient stopped being a number; all ranks call it.

    Losses and sample keys are those of this rank's micro-batches; the norm is the gradient's over
    all ranks.
    """
    everyone = ranks.gather(lambda: [*zip(losses, keys, strict=True)])
    batches = [batch for found in everyone for batch in found]
    guilty = [batch for batch in batches if not math.isfinite(batch[0])]
    what = f"the gradient's norm is {norm} at step {step}, the losses are finite"
    if guilty:
        what = f"the loss is {guilty[0][0]} at step {step}"
    suspects = [key for _, names in guilty or batches for key in names]
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return InputError(
        what,
        where=f"batch of {', '.join(suspects[:NAMED])}{more}",
        remedy="lower optim.lr, or use fp32",
        code="not-finite",
    )


@contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Turns running out of memory into an InputError that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, cv2.error) as error:
        sure = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not sure and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        line = next(iter(str(error).splitlines()), "")[:120]
        raise InputError(f"out of memory: {line}", remedy=remedy, code="out-of-memory") from None


def smaller_steps(config: TrainConfig) -> str:
    """What to lower if a training step takes too much memory."""
    data, again = config.data, "or set model.gradient_checkpointing=true, "
    return (
        f"lower data.micro_batch, now {data.micro_batch}; the batch stays {data.batch}, "
        f"{'' if config.model.gradient_checkpointing else again}"
        f"or lower data.size, now {data.size}"
    )


@contextmanager
def rank_advice(request: StopRequest | None = None) -> Iterator[None]:
    """Turns what the libraries say when another rank ends into one line.

    Where the launcher, which knows more, has asked this rank to stop, it ends without a word.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        if request is not None and request.signal:
            raise SystemExit(128 + request.signal) from None
        raise InputError(
            "another rank has gone, or cannot be reached",
            remedy="its own last line or the launcher's says why; --resume goes on",
            code="rank-lost",
        ) from None
