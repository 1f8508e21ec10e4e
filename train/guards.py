"""What stops a run, told so that somebody can act on it."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch.distributed import DistError

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.stopping import StopRequest, stop_with_launcher

log = logging.getLogger(__name__)

NAMED = 32
"""Samples that a message names."""

PATIENCE = 60.0
"""Seconds that a run waits for an earlier one to leave its folder: a step and a checkpoint."""

_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""The CPU's allocator and CUDA's libraries raise plain RuntimeErrors."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def not_finite(
    ranks: Ranks,
    step: int,
    losses: Sequence[float],
    keys: Sequence[tuple[str, ...]],
    norm: float,
) -> InputError:
    """Says on every rank where a loss or a gradient stopped being a number.

    Args:
        ranks: All of them call this.
        step: 0-based.
        losses: Of this rank's micro-batches.
        keys: Of their samples.
        norm: Of the gradient over all ranks.
    """
    everyone = ranks.gather(lambda: [*zip(losses, keys, strict=True)])
    losses, keys = zip(*(pair for pairs in everyone for pair in pairs), strict=True)
    guilty = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    what = (
        f"the loss is {losses[guilty[0]]} at step {step}"
        if guilty
        else f"the gradient's norm is {norm} at step {step}, the losses are finite"
    )
    suspects = [key for number in guilty or range(len(keys)) for key in keys[number]]
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return InputError(
        what,
        where=f"batch of {', '.join(suspects[:NAMED])}{more}",
        remedy="lower optim.lr, or use fp32",
        code="not-finite",
    )


@contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Turns running out of memory into one line that says what to lower.

    Args:
        remedy: What to lower.

    Raises:
        InputError: Memory ran out inside.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), "")
        plain = not isinstance(error, torch.OutOfMemoryError | MemoryError)
        if plain and not any(sign in str(error) for sign in _NO_MEMORY):
            raise
        raise InputError(
            f"out of memory: {line[:120]}", remedy=remedy, code="out-of-memory"
        ) from None


def smaller_steps(config: TrainConfig) -> str:
    """What to lower where a training step takes too much memory."""
    data = config.data
    remedies = [f"lower data.micro_batch, now {data.micro_batch}; the batch stays {data.batch}"]
    if not config.model.gradient_checkpointing:
        remedies.append("or set model.gradient_checkpointing=true")
    remedies.append(f"or lower data.size, now {data.size}")
    return ", ".join(remedies)


@contextmanager
def disk_advice(out: Path) -> Iterator[None]:
    """Turns a disk that is full or closed to the run into one line.

    Raises:
        InputError: A file inside could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{error.strerror}",
            where=error.filename or out,
            remedy="make room or rights",
            code="write",
        ) from None


@contextmanager
def rank_advice(request: StopRequest | None = None) -> Iterator[None]:
    """Turns what the libraries say of another rank's end into one line.

    Args:
        request: The launcher, which knows more, may have asked this rank to stop.

    Raises:
        InputError: Another rank was lost; this one knows no reason.
        SystemExit: Likewise, and the launcher is ending the run.
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


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds a run's folder, so that no other run writes into it; for the main rank.

    The ranks of a launcher that was killed finish their step and save, see `stop_with_launcher`.
    The run that goes on must not overtake them, so it waits for `PATIENCE`.

    Raises:
        InputError: Another run holds it for longer.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        began = time.monotonic()
        while True:
            try:
                held.enter_context(Storage(str(out)).locked())
                break
            except InputError as error:
                waited = time.monotonic() - began
                if error.code != "locked" or waited > PATIENCE:
                    raise
                if waited < 1:
                    log.warning("%s: another run is ending here, waiting for it", out)
                time.sleep(1)
            except OSError as error:
                log.warning("%s: cannot be locked, start no second run here: %s", out, error)
                break
        try:
            yield
        finally:
            held.close()
            with suppress(OSError):
                out.rmdir()  # nothing came of it


@contextmanager
def guarded_run(config: TrainConfig) -> Iterator[None]:
    """Everything around a run that a command line wants: the folder's lock, errors as one line."""
    stop_with_launcher()
    out = Path(config.out)
    with ExitStack() as guards:
        guards.enter_context(disk_advice(out))
        if os.environ.get("RANK", "0") == "0":
            guards.enter_context(alone(out))
        guards.enter_context(memory_advice(smaller_steps(config)))
        guards.enter_context(rank_advice())
        yield
