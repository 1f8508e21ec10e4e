"""Shards -> batches: who reads which sample when.

The order is stateless. With N samples and a batch of B, position p of the whole run belongs to
epoch p // N and is sample permutation(epoch)[p % N]. Optimizer step s takes the positions
[s B, (s + 1) B), and rank r takes [r::world] of them. So each sample comes exactly once in an epoch
for any number of ranks and loader processes, every batch is full, and resuming means starting at a
later step.

Of several caches, N is the number of all samples, of which each cache gives a fixed part. A
permutation says which cache each position of an epoch takes from. A cache's own samples come in
rounds: its k-th of the run is permutation(k // size)[k % size], so all come before any comes again.

A batch ships indices, not maps: the photo, the segment map, the EDS codes and the void mask as
bytes, and one table row for each segment. Centroid codes, labels and weights are looked up on the
device. A sample of 518 px takes about 1.3 MB; as float maps it would take 19 MB.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.train.augment import Item, Place, draw_augmentation, make_item
from panoptic_cache.train.caches import Mix
from panoptic_cache.train.config import DataConfig


@dataclass(frozen=True)
class Batch:
    """B samples of side S, on any device.

    Row 0 of the tables stands for unlabelled pixels, so that the segment map is looked up as it is.
    """

    keys: tuple[str, ...]  # B sample keys
    photo: Tensor  # (B, 3, S, S) uint8 RGB
    segment_map: Tensor  # (B, S, S) uint8 or int32, rows of the tables
    eds: Tensor  # (B, S, S) uint8, see `panoptic_cache.pipeline.cache.sample`
    void: Tensor  # (B, S, S) uint8, 0 labelled, 1 unlabelled, 2 crowd, 3 padding
    eds_scale: Tensor  # (B,) float32, pixels of S for one pixel that `eds` counts
    colour: Tensor  # (B, 3) float32 factors of brightness, contrast and saturation
    centroid: Tensor  # (B, R, 2) float32, (u, v) in [-1, 1]
    instance: Tensor  # (B, R) bool, the row is a non-crowd thing with pixels
    label: Tensor  # (B, R) int64, -1 for unlabelled and for rows of no segment

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; without waiting for the copies where memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return self._each(torch.Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """The batch in memory that other processes see; RuntimeError where there is no room.

        torch does that itself when a loader process sends a batch, but in a thread whose failure
        nobody hears of: the batch is lost, and training waits for it.
        """
        return self._each(torch.Tensor.share_memory_)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(self.keys, *(change(getattr(self, name)) for name in TENSORS))


TENSORS = tuple(field.name for field in fields(Batch) if field.name != "keys")
FILLS = {"centroid": 0.0, "instance": 0, "label": -1}
"""What rows of no segment hold, by table."""


def collate(items: Sequence[Item]) -> Batch:
    """Stacks items; tables are padded to the longest with rows of no segment."""
    tensors = []
    for name in TENSORS:
        values = [np.asarray(getattr(item, name)) for item in items]
        if name in FILLS:
            shape = (max(map(len, values)), *values[0].shape[1:])
            padded = [np.full(shape, FILLS[name], value.dtype) for value in values]
            for row, value in zip(padded, values, strict=True):
                row[: len(value)] = value
            values = padded
        stacked = np.stack(values)
        # torch does little with uint16, and with a scale it would go on in float64.
        kind = {np.uint16: np.int32, np.float64: np.float32}.get(stacked.dtype.type)
        tensors.append(torch.from_numpy(stacked.astype(kind) if kind else stacked))
    batch = Batch(tuple(item.key for item in items), *tensors)
    return batch if get_worker_info() is None else batch.share_memory()


@dataclass(frozen=True)
class CachedItems(Dataset[Item]):
    """Items of local caches by (round, position in all of them)."""

    readers: tuple[ShardReader, ...]
    config: DataConfig
    seed: int

    def __getitem__(self, place: Place) -> Item:
        ends = [*accumulate(map(len, self.readers))]
        number = bisect(ends, place[1])
        reader = self.readers[number]
        at = place[1] - ends[number] + len(reader)
        try:
            sample = reader.sample(at)
            augmentation = draw_augmentation(self.config, self.seed, place)
            return make_item(sample, self.config, augmentation)
        except InputError as error:
            what, where, code = error.what, error.where, error.code
        except OSError as error:
            what, where, code = f"cannot be read: {error.strerror or error}", "", "shard-read"
        shards = reader.index.shards
        shard = shards[bisect([*accumulate(shard.samples for shard in shards)], at)]
        folder = f"{self.config.paths[number]}/" if len(self.readers) > 1 else ""
        raise InputError(
            what,
            where=f"{folder}{shard.name}.tar: {where or reader.keys[at]}",
            remedy="run panoptic verify --deep; remove the shard and preprocess again",
            code=code,
        )


@lru_cache(maxsize=2)  # a step may span two epochs
def epoch_places(seed: int, epoch: int, mix: Mix) -> NDArray[np.int64]:
    """The (N, 2) places of an epoch, the same on every rank."""
    caches = np.repeat(np.arange(len(mix.sizes)), mix.parts)  # (N,), where each sample comes from
    caches = np.random.default_rng([seed, epoch, len(mix.sizes)]).permutation(caches)
    places, start = np.empty((len(caches), 2), np.int64), 0
    for cache, (size, part) in enumerate(zip(*mix, strict=True)):
        rounds, at = np.divmod(np.arange(epoch * part, (epoch + 1) * part), size)
        for number in np.unique(rounds).tolist():
            # For the first cache, NumPy draws the same of [seed, number].
            order = np.random.default_rng([seed, number, cache]).permutation(size)
            at[rounds == number] = order[at[rounds == number]]
        places[caches == cache] = np.stack([rounds, start + at], 1)
        start += size
    return places


def step_places(seed: int, mix: Mix, batch: int, step: int) -> list[Place]:
    """The `batch` samples of an optimizer step over all ranks."""
    numbers = (divmod(p, sum(mix.parts)) for p in range(step * batch, (step + 1) * batch))
    places = (epoch_places(seed, epoch, mix)[at].tolist() for epoch, at in numbers)
    return [(number, position) for number, position in places]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank reads: its part of the given optimizer steps of a run."""

    seed: int
    steps: range
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class MicroBatches(Sampler[list[Place]]):
    """The micro-batches of one rank, in order."""

    config: DataConfig
    mix: Mix
    share: Share

    def __iter__(self) -> Iterator[list[Place]]:
        seed, rank, world = self.share.seed, self.share.rank, self.share.world
        sizes = micro_batch_sizes(self.config, world)
        for step in self.share.steps:
            places = step_places(seed, self.mix, self.config.batch, step)
            mine = iter(places[rank::world])
            yield from (list(islice(mine, size)) for size in sizes)


def micro_batch_sizes(config: DataConfig, world: int) -> tuple[int, ...]:
    """Sizes of the micro-batches that a rank's part of a batch is cut into: as few as possible.

    They differ by one at most. Raises InputError where the batch does not divide among the ranks.
    """
    part, rest = divmod(config.batch, world)
    if rest:
        below = config.batch - rest
        choices = [str(size) for size in (below, below + world) if size]
        raise InputError(
            f"a batch of {config.batch} does not divide among {world} ranks",
            where="data.batch",
            remedy=f"--set data.batch={' or '.join(choices)}",
        )
    size, larger = divmod(part, count := math.ceil(part / config.micro_batch))
    return (size + 1,) * larger + (size,) * (count - larger)
