"""What stops a run, told so that somebody can act on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.errors import InputError
from train.config import TrainConfig

NAMED = 32
"""Samples that a message names."""


def not_finite(
    step: int, losses: Sequence[float], keys: Sequence[tuple[str, ...]], norm: float
) -> InputError:
    """Says where a loss or a gradient stopped being a number.

    Args:
        step: 0-based.
        losses: Of this rank's micro-batches.
        keys: Of their samples.
        norm: Of the gradient over all ranks.
    """
    guilty = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    what = (
        f"the loss is {losses[guilty[0]]} at step {step}"
        if guilty
        else f"the gradient's norm is {norm} at step {step}, this rank's losses are finite"
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
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turns running out of memory into one line that says what to lower.

    Raises:
        InputError: Memory ran out inside.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), "")
        # The CPU's allocator raises a plain RuntimeError.
        plain = not isinstance(error, torch.OutOfMemoryError | MemoryError)
        if plain and "can't allocate memory" not in str(error):
            raise
        data = config.data
        remedies = [f"lower data.micro_batch, now {data.micro_batch}; the batch stays {data.batch}"]
        if not config.model.gradient_checkpointing:
            remedies.append("or set model.gradient_checkpointing=true")
        remedies.append(f"or lower data.size, now {data.size}")
        raise InputError(
            f"out of memory: {line[:120]}", remedy=", ".join(remedies), code="out-of-memory"
        ) from None
