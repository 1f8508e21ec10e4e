"""The processes that share a run or an evaluation, and what they tell each other.

`accelerate launch` or `torchrun` starts them. Facts travel through a Gloo group of their own, from
CPU to CPU, so no GPU is waited for: one small reduction a step costs well below a millisecond.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from panoptic_cache.pipeline.base.errors import InputError

Value = TypeVar("Value")

SLOWEST = timedelta(days=1)
"""How long a rank of an evaluation waits for a slower one."""
PATIENCE = 60.0
"""Seconds to wait for a file that another machine wrote."""
_REFUSED = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "model parallelism": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
"""What a launcher's configuration may ask for, and how accelerate tells its processes."""


def check_launcher(precision: str) -> None:
    """Raises InputError where the launcher asks for what a run does not take from there.

    `no` is what accelerate says of a precision or a compiler that nobody has asked for.
    """
    for name, variable in _REFUSED.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"the launcher's configuration asks for {name}, which training does not use",
                where=variable,
                remedy="accelerate launch --multi_gpu, or accelerate config default first",
            )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in {"no", precision}:
        raise InputError(
            f"the launcher asks for {mixed}, the configuration for {precision}",
            where="--mixed_precision",
            remedy=f"launch with --mixed_precision {precision if precision != 'fp32' else 'no'}",
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError(
            "the launcher asks for torch.compile, which is a setting of the run",
            where="--dynamo_backend",
            remedy="launch with --dynamo_backend no, and --set compile=true",
        )


class Verdict(NamedTuple):
    """What all ranks found together at the end of a step."""

    signal: int  # Of a rank that was asked to stop, else 0
    finite: bool  # Loss and gradient are finite on every rank


class Ranks:
    """This process among its equals; make it on all of them, once they form a process group.

    `device` is this process' own, such as `cuda:1`; None where the caller chooses one. By default
    a rank waits Gloo's half an hour for another one.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        device: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None

    @classmethod
    def current(cls, *, cpu: bool = False) -> Ranks:
        """Joins the processes that a launcher has started; alone, this costs nothing."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=SLOWEST)
        return cls(state.process_index, state.num_processes, str(state.device), SLOWEST)

    @property
    def main(self) -> bool:
        """The one that writes results and prints."""
        return self.rank == 0

    def gather(self, work: Callable[[], Value]) -> list[Value]:
        """Does the work; on every rank the values of all, or the first one's InputError."""
        if self._group is None:
            return [work()]
        try:
            mine: tuple[Value | None, InputError | None] = work(), None
        except InputError as error:
            mine = None, error
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self._group)
        # Gloo's threads need the interpreter to let go of the tensors that were sent. A loader
        # process that is forked meanwhile hangs: 4 of 6,000 did without this barrier, which lets
        # them finish, and 0 of 5,000 with it (CPython 3.11, torch 2.13).
        dist.barrier(group=self._group)
        for _, problem in everyone:
            if problem is not None:
                raise problem
        return [value for value, _ in everyone]

    def first(self, work: Callable[[], Value]) -> Value:
        """What rank 0 finds, on every rank, so that all go on from the same."""
        return cast("Value", self.gather(lambda: work() if self.main else None)[0])

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raises InputError on every rank where a fact differs between ranks."""
        everyone = self.gather(lambda: dict(facts))
        for name, value in everyone[0].items():
            for rank, other in enumerate(everyone):
                if other[name] != value:
                    raise InputError(
                        f"ranks differ: {value} on rank 0, {other[name]} on rank {rank}",
                        where=name,
                        remedy="start every rank with the same command on a shared folder",
                    )

    def check_shared(self, file: Path) -> None:
        """Raises InputError on every rank where one does not see a file that rank 0 wrote.

        A network file system may show what other machines wrote as late as a minute after.
        """
        wanted, end = self.first(file.read_bytes), time.monotonic() + PATIENCE
        while (
            not (seen := file.exists() and file.read_bytes() == wanted) and time.monotonic() < end
        ):
            time.sleep(1)
        everyone = self.gather(lambda: seen)
        if not all(everyone):
            raise InputError(
                f"rank {everyone.index(False)} does not see {file.name} that rank 0 has written",
                where=file.parent,
                remedy="the run's folder must be on a disk that all machines share",
            )

    def agree(self, step: int, task: int, *, signal: int, finite: bool) -> Verdict:
        """Exchanges a step's facts before its gradients are applied.

        Raises InputError where ranks are at different steps or tasks: the sum of their gradients
        means nothing.
        """
        if self._group is None:
            return Verdict(signal, finite)
        # The maximum of x and of -x gives both ends in one reduction.
        facts = torch.tensor([signal, not finite, step, task, -step, -task], dtype=torch.int64)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._group)
        asked, broken, last, high, first, low = facts.tolist()
        if (last, high) != (-first, -low):
            raise InputError(
                f"ranks disagree: steps {-first} to {last}, tasks {-low} to {high}",
                where=f"step {-first}",
                remedy="start every rank with the same command",
            )
        return Verdict(asked, not broken)

    def leave(self) -> None:
        """Ends the process group; a process that exits in it warns."""
        if self.world > 1:
            PartialState().destroy_process_group()
