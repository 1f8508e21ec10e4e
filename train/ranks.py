"""What the ranks must agree on: the run, the step and its task, when to stop, whose samples.

Facts travel through a Gloo group of their own, from CPU to CPU: the GPU is not waited for. One
small reduction a step costs well below a millisecond, and no rank ever waits for another that has
left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from panoptic_cache.pipeline.base.errors import InputError

Value = TypeVar("Value")

PATIENCE = 60.0
"""Seconds to wait for a file that another machine wrote."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks found together at the end of a step.

    Attributes:
        signal: Of a rank that was asked to stop, else 0.
        finite: Loss and gradient are finite on every rank.
    """

    signal: int
    finite: bool


class Ranks:
    """The processes of a run; make it on all of them."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raises InputError on every rank where a fact differs between ranks."""
        everyone = self.gather(dict(facts))
        for name, value in everyone[0].items():
            for rank, other in enumerate(everyone):
                if other[name] != value:
                    raise InputError(
                        f"ranks differ: {value} on rank 0, {other[name]} on rank {rank}",
                        where=name,
                        remedy="start every rank with the same command on a shared folder",
                    )

    def check_shared(self, file: Path) -> None:
        """Raises InputError on every rank where one does not see a file that the main rank wrote.

        What a network's file system shows of other machines may be a minute old.
        """
        wanted = self.first(lambda: _content(file))
        end = time.monotonic() + PATIENCE
        while not (seen := wanted is not None and _content(file) == wanted):
            if time.monotonic() > end:
                break
            time.sleep(1)
        for rank, theirs in enumerate(self.gather(seen)):
            if not theirs:
                raise InputError(
                    f"rank {rank} does not see {file.name} that rank 0 has written",
                    where=file.parent,
                    remedy="the run's folder must be on a disk that all machines share",
                )

    def check_disjoint(self, keys: Sequence[str], *, repeats: bool) -> None:
        """Raises InputError where two ranks hold the same samples.

        Args:
            keys: Of this rank's first micro-batch.
            repeats: The same sample may rightly come twice in a step; then only ranks with the
                very same keys are refused.
        """
        everyone = [frozenset(each) for each in self.gather(list(keys))]
        for rank, theirs in enumerate(everyone):
            for earlier, others in enumerate(everyone[:rank]):
                if theirs == others if repeats else theirs & others:
                    raise InputError(
                        f"ranks {earlier} and {rank} train on the same samples, such as"
                        f" {min(theirs & others)}",
                        remedy="every rank needs its own number: use accelerate launch or torchrun",
                    )

    def agree(self, step: int, task: int, *, signal: int, finite: bool) -> Verdict:
        """Exchanges a step's facts before its gradients are applied.

        Args:
            step: This rank's.
            task: Number of this rank's task.
            signal: That this rank got, or 0.
            finite: Whether this rank's loss and gradient are.

        Raises:
            InputError: The ranks are at different steps or tasks; their gradients mean nothing.
        """
        if self._group is None:
            return Verdict(signal, finite)
        # The largest of x and of -x, so one reduction tells both ends.
        facts = torch.tensor([signal, not finite, step, task, -step, -task], dtype=torch.int64)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._group)
        asked, broken, last, high, first, low = facts.tolist()
        if (last, high) != (-first, -low):
            raise InputError(
                f"ranks disagree: steps {-first} to {last}, tasks {-low} to {high}",
                where=f"step {step}",
                remedy="start every rank with the same command",
            )
        return Verdict(asked, not broken)

    def gather(self, mine: Value) -> list[Value]:
        """The values of all ranks, by rank, on every rank."""
        if self._group is None:
            return [mine]
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def first(self, look: Callable[[], Value]) -> Value:
        """What rank 0 finds, on every rank: so that all go on from the same."""
        found: list[Any] = [look() if self._group is None or dist.get_rank() == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        value: Value = found[0]
        return value


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
