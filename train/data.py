"""Shards -> batches: who reads which sample when.

The order is stateless. Position p of the whole run belongs to epoch p // N and is sample
permutation(epoch)[p % N]; optimizer step s takes positions [s B, (s + 1) B), rank r of them every
world-th. So each sample comes exactly once an epoch for any number of ranks and loader processes,
every batch is full, and resuming is starting at another step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardIndex, read_index
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.train.augment import Item, Place, draw_augmentation, make_item
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.stopping import stop_with_parent_only

log = logging.getLogger(__name__)

STARVED = ("DataLoader worker (pid", "shared memory", "unable to write to file </torch_")
"""What torch says when a loader process was killed or had no memory to hand a batch over.

Or the pipe to it breaks, an OSError or EOFError.
"""

_PREFIX = "panoptic_cache.pipeline.base.errors.InputError: "


@dataclass(frozen=True)
class Batch:
    """B samples of side S, on any device.

    Row 0 of the tables stands for unlabelled pixels, so that the segment map gathers directly.

    Attributes:
        keys: B sample keys.
        photo: (B, 3, S, S) uint8 RGB.
        index: (B, S, S) uint8 or int32, rows of the tables.
        eds: (B, S, S) uint8, see `panoptic_cache.pipeline.cache.sample`.
        void: (B, S, S) uint8, 0 labelled, 1 unlabelled, 2 crowd, 3 padding.
        eds_scale: (B,) float32, pixels of S for one pixel that `eds` counts.
        colour: (B, 3) float32 factors of brightness, contrast and saturation.
        centroid: (B, R, 2) float32, (u, v) in [-1, 1].
        instance: (B, R) bool, the row is a non-crowd thing with pixels.
        label: (B, R) int64, category, -1 for unlabelled and for rows of no segment.
    """

    keys: tuple[str, ...]
    photo: Tensor
    index: Tensor
    eds: Tensor
    void: Tensor
    eds_scale: Tensor
    colour: Tensor
    centroid: Tensor
    instance: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; without waiting for the copies where memory is pinned."""
        return Batch(
            self.keys,
            *(getattr(self, name).to(device, non_blocking=True) for name in _TENSORS),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return Batch(self.keys, *(getattr(self, name).pin_memory() for name in _TENSORS))


_TENSORS = tuple(field.name for field in fields(Batch) if field.name != "keys")


def collate(items: Sequence[Item]) -> Batch:
    """Stacks items; tables are padded with rows of no segment."""
    rows = max(len(item.label) for item in items)
    index = np.stack([item.index for item in items])

    def table(name: str, fill: float) -> Tensor:
        values = [getattr(item, name) for item in items]
        result = np.full((len(items), rows, *values[0].shape[1:]), fill, values[0].dtype)
        for row, value in zip(result, values, strict=True):
            row[: len(value)] = value
        return torch.from_numpy(result)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(item, name) for item in items]))

    return Batch(
        keys=tuple(item.key for item in items),
        photo=stack("photo"),
        index=torch.from_numpy(index if index.dtype == np.uint8 else index.astype(np.int32)),
        eds=stack("eds"),
        void=stack("void"),
        eds_scale=torch.tensor([item.eds_scale for item in items]),
        colour=stack("colour"),
        centroid=table("centroid", 0.0),
        instance=table("instance", 0),
        label=table("label", -1),
    )


class CachedItems(Dataset[Item]):
    """Items of a local cache by (epoch, position)."""

    def __init__(self, reader: ShardReader, config: DataConfig, seed: int) -> None:
        self._reader, self._config, self._seed = reader, config, seed

    def __getitem__(self, place: Place) -> Item:
        try:
            sample = self._reader.sample(place[1])
            augmentation = draw_augmentation(self._config, self._seed, place)
            return make_item(sample, self._config, augmentation)
        except InputError as error:
            what, where, code = error.what, error.where, error.code
        except OSError as error:
            what, where, code = f"cannot be read: {error.strerror or error}", "", "shard-read"
        shard = f"{shard_of(self._reader.index, place[1])}.tar"
        raise InputError(
            what,
            where=f"{shard}: {where or self._reader.keys[place[1]]}",
            remedy="run panoptic verify --deep; remove the shard and preprocess again",
            code=code,
        )


def shard_of(index: ShardIndex, position: int) -> str:
    """The name of the shard that a position of a cache lies in."""
    ends = accumulate(shard.samples for shard in index.shards)
    return next(s.name for s, end in zip(index.shards, ends, strict=True) if position < end)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order of an epoch, the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def step_places(seed: int, samples: int, batch: int, step: int) -> list[Place]:
    """The `batch` samples of an optimizer step over all ranks; a step may span two epochs."""
    places = (divmod(p, samples) for p in range(step * batch, (step + 1) * batch))
    return [(epoch, int(permutation(seed, epoch, samples)[at])) for epoch, at in places]


class MicroBatches(Sampler[list[Place]]):
    """The micro-batches of one rank, in order, from a step on."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        samples: int,
        steps: range,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._config, self._seed, self._samples = config, seed, samples
        self._steps, self._rank, self._world = steps, rank, world

    def __len__(self) -> int:
        return len(self._steps) * len(micro_batch_sizes(self._config, self._world))

    def __iter__(self) -> Iterator[list[Place]]:
        sizes = micro_batch_sizes(self._config, self._world)
        for step in self._steps:
            places = step_places(self._seed, self._samples, self._config.batch, step)
            mine = iter(places[self._rank :: self._world])
            yield from (list(islice(mine, size)) for size in sizes)


def micro_batch_sizes(config: DataConfig, world: int) -> tuple[int, ...]:
    """What a rank puts through the network for an optimizer step: as few as can be, as equal.

    Raises:
        InputError: The batch does not divide among the ranks.
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
    """The training cache's index.

    Raises:
        InputError: None is named, it is not finished, or it was rendered too small.
    """
    if not config.cache:
        raise InputError("no cache is named", where="data.cache", remedy="--set data.cache=DIR")
    index = read_index(Storage(config.cache))
    if index.samples == 0:
        raise InputError("the cache is empty", where=config.cache)
    check_rendered_size(config, index.settings, config.cache)
    return index


def check_rendered_size(config: DataConfig, settings: Mapping[str, Any], cache: str) -> None:
    """Raises InputError where training would enlarge a cache that was rendered smaller.

    Args:
        config: Of the training.
        settings: That the cache was rendered with.
        cache: Its place.
    """
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


def repeats(config: DataConfig, samples: int, step: int) -> bool:
    """Whether a sample may come twice in a step: at the end of an epoch, or from the stream."""
    return config.reader == "stream" or step * config.batch % samples + config.batch > samples


def indexed_loader(
    reader: ShardReader,
    config: DataConfig,
    *,
    seed: int,
    steps: range,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Micro-batches of the given optimizer steps for one rank.

    It must not go through `Accelerator.prepare`: it is cut into ranks already.
    """
    sampler = MicroBatches(
        config, seed=seed, samples=len(reader), steps=steps, rank=rank, world=world
    )
    return DataLoader(
        cast("Dataset[Batch]", CachedItems(reader, config, seed)),  # collated into batches
        batch_sampler=sampler,
        collate_fn=collate,
        **loader_options(config, seed, pin=pin),
    )


def loader_options(config: DataConfig, seed: int, *, pin: bool) -> dict[str, Any]:
    """What both readers ask of a `DataLoader`."""
    return {
        "num_workers": config.workers,
        "pin_memory": pin,
        "prefetch_factor": 4 if config.workers else None,
        # Else starting draws from the global generator, and a resumed run differs.
        "generator": torch.Generator().manual_seed(seed),
        "worker_init_fn": prepare_worker if config.workers else None,
    }


def iterate(loader: Iterable[Batch]) -> Generator[Batch, None, None]:
    """The loader's batches; close it, so that its processes end.

    An InputError of a loader process reads like one of this process.

    Raises:
        InputError: That, or a loader process died.
    """
    try:
        yield from loader
    except (InputError, RuntimeError, OSError, EOFError) as error:
        # Its message has become a traceback, whose last line is the message.
        line = f"{type(error).__name__}: {error}".splitlines()[-1]
        if isinstance(error, InputError):
            said = InputError(str(error).splitlines()[-1].removeprefix(_PREFIX))
        elif not isinstance(error, RuntimeError) or any(sign in str(error) for sign in STARVED):
            said = InputError(
                f"a loader process failed: {line[:160]}",
                where="data.workers",
                remedy="memory or /dev/shm ran out, as a rule: lower data.workers",
                code="loader",
            )
        else:
            raise
        error.__traceback__ = None  # its frames hold the loader, which is to end its processes
        raise said from None


def prepare_worker(_: int) -> None:
    """One thread a loader process: the processes are the parallelism.

    And it lives as long as the training wants it to, whatever signals the whole job gets.
    """
    stop_with_parent_only()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
