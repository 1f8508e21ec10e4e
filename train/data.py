"""Shards -> batches: who reads which sample when.

The order is stateless. With N samples and a batch of B, position p of the whole run belongs to
epoch p // N and is sample permutation(epoch)[p % N]. Optimizer step s takes the positions
[s B, (s + 1) B), and rank r takes [r::world] of them. So each sample comes exactly once in an epoch
for any number of ranks and loader processes, every batch is full, and resuming means starting at a
later step.

A batch ships indices, not maps: the photo, the segment map, the EDS codes and the void mask as
bytes, and one table row for each segment. Centroid codes, labels and weights are looked up on the
device. A sample of 518 px takes about 1.3 MB; as float maps it would take 19 MB.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardIndex, read_index
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.train.augment import Item, Place, draw_augmentation, make_item
from panoptic_cache.train.config import DataConfig, TrainConfig

log = logging.getLogger(__name__)


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
        return Batch(
            self.keys, *(getattr(self, name).to(device, non_blocking=True) for name in TENSORS)
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return Batch(self.keys, *(getattr(self, name).pin_memory() for name in TENSORS))

    def share_memory(self) -> Batch:
        """The batch in memory that other processes see; RuntimeError where there is no room.

        torch does that itself when a loader process sends a batch, but in a thread whose failure
        nobody hears of: the batch is lost, and training waits for it.
        """
        for name in TENSORS:
            getattr(self, name).share_memory_()
        return self


TENSORS = tuple(field.name for field in fields(Batch) if field.name != "keys")


def collate(items: Sequence[Item]) -> Batch:
    """Stacks items; tables are padded to the longest with rows of no segment."""
    rows = max(len(item.label) for item in items)

    def stack(name: str) -> NDArray[Any]:
        return np.stack([getattr(item, name) for item in items])

    def table(name: str, fill: float) -> Tensor:
        values = [getattr(item, name) for item in items]
        result = np.full((len(items), rows, *values[0].shape[1:]), fill, values[0].dtype)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return torch.from_numpy(result)

    segment_map = stack("segment_map")
    if segment_map.dtype != np.uint8:  # torch does little with uint16
        segment_map = segment_map.astype(np.int32)
    batch = Batch(
        keys=tuple(item.key for item in items),
        photo=torch.from_numpy(stack("photo")),
        segment_map=torch.from_numpy(segment_map),
        eds=torch.from_numpy(stack("eds")),
        void=torch.from_numpy(stack("void")),
        eds_scale=torch.tensor([item.eds_scale for item in items]),
        colour=torch.from_numpy(stack("colour")),
        centroid=table("centroid", 0.0),
        instance=table("instance", 0),
        label=table("label", -1),
    )
    return batch if get_worker_info() is None else batch.share_memory()


@dataclass(frozen=True)
class CachedItems(Dataset[Item]):
    """Items of a local cache by (epoch, position)."""

    reader: ShardReader
    config: DataConfig
    seed: int

    def __getitem__(self, place: Place) -> Item:
        try:
            sample = self.reader.sample(place[1])
            augmentation = draw_augmentation(self.config, self.seed, place)
            return make_item(sample, self.config, augmentation)
        except InputError as error:
            what, where, code = error.what, error.where, error.code
        except OSError as error:
            what, where, code = f"cannot be read: {error.strerror or error}", "", "shard-read"
        shards = self.reader.index.shards
        ends = [*accumulate(shard.samples for shard in shards)]
        shard = shards[bisect(ends, place[1])]
        raise InputError(
            what,
            where=f"{shard.name}.tar: {where or self.reader.keys[place[1]]}",
            remedy="run panoptic verify --deep; remove the shard and preprocess again",
            code=code,
        )


@lru_cache(maxsize=2)  # a step may span two epochs
def permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order of an epoch, the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def step_places(seed: int, samples: int, batch: int, step: int) -> list[Place]:
    """The `batch` samples of an optimizer step over all ranks."""
    places = (divmod(p, samples) for p in range(step * batch, (step + 1) * batch))
    return [(epoch, int(permutation(seed, epoch, samples)[at])) for epoch, at in places]


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
    samples: int
    share: Share

    def __iter__(self) -> Iterator[list[Place]]:
        seed, rank, world = self.share.seed, self.share.rank, self.share.world
        sizes = micro_batch_sizes(self.config, world)
        for step in self.share.steps:
            places = step_places(seed, self.samples, self.config.batch, step)
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


def open_index(config: DataConfig) -> ShardIndex:
    """The training cache's index; InputError where it is missing, empty or rendered too small."""
    if not config.cache:
        raise InputError("no cache is named", where="data.cache", remedy="--set data.cache=DIR")
    index = read_index(Storage(config.cache))
    if index.samples == 0:
        raise InputError("the cache is empty", where=config.cache)
    check_rendered_size(config, index.settings, config.cache)
    return index


def follow_tiles(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the side of the cache's tiles, unless it names another one."""
    tile = config.data.tile or settings.get("tile") or 0
    return replace(config, data=replace(config.data, tile=tile))


def check_rendered_size(config: DataConfig, settings: Mapping[str, Any], cache: str) -> None:
    """Raises InputError where training would enlarge a cache, rendered with `settings`."""
    fit, size = settings.get("fit"), settings.get("size")
    if size is not None and size < config.size and not config.upscale:
        raise InputError(
            f"rendered at {size} px, trained at {config.size} px",
            where=cache,
            remedy=f"preprocess with --size {config.size}, lower data.size, or accept the blur"
            " with --set data.upscale=true",
            code="cache-size",
        )
    if fit == "squash" and config.fit != "squash":
        log.warning("%s: squashed already; data.fit = %s changes nothing", cache, config.fit)
