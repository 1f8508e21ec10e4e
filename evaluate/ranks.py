"""The processes that share an evaluation, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from panoptic_cache.pipeline.base.errors import InputError

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)
"""How long a process waits for a slower one; the default of NCCL is ten minutes."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its equals.

    Attributes:
        rank: From 0, the main one.
        world: How many there are.
        device: This process' own, such as `cuda:1`; None where there is nothing to share.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None

    @classmethod
    def current(cls, *, cpu: bool = False) -> Ranks:
        """Joins the others; alone, this costs nothing.

        Args:
            cpu: Leave GPUs alone.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def main(self) -> bool:
        """The one that merges, writes the results and prints."""
        return self.rank == 0

    def gather(self, work: Callable[[], Value]) -> list[Value]:
        """Does the work and returns the values of all ranks, by rank, on every rank.

        Raises:
            InputError: That of the first rank that met one; no rank waits for it in vain.
        """
        if self.world == 1:
            return [work()]
        try:
            mine: tuple[Value | None, InputError | None] = work(), None
        except InputError as error:
            mine = None, error
        values: list[Value] = []
        for value, problem in gather_object([mine]):
            if problem is not None:
                raise problem
            values.append(value)
        return values

    def leave(self) -> None:
        """Ends the group; a process that exits in it warns."""
        if self.world > 1:
            PartialState().destroy_process_group()
